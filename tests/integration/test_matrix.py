# SPDX-License-Identifier: GPL-2.0
"""``harness matrix`` with real guests: it is interrupted, goes on where it stopped, and then has nothing to run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.terminal import Terminal
from tests.lab import wait_until

MATRIX = """
[groups.tiny]
kernels = ["debian:6.12"]
arches = ["x86_64", "arm64"]
tests = ["test_flags.py"]
keyword = "is_unknown or are_unknown"
workers = 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a matrix of two cells. What is kept of them is kept there, and not for this user."""
    directory = tmp_path_factory.mktemp("matrix")
    (directory / "tmp").mkdir()
    (directory / "tiny.toml").write_text(MATRIX)
    return directory


def environment(place: Path) -> dict[str, str]:
    return {"XDG_STATE_HOME": str(place / "state"), "TMPDIR": str(place / "tmp"), "COLUMNS": "100"}


def run(place: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.commands.cli", "matrix", "tiny.toml", *more]
    return subprocess.run(
        command, cwd=place, env={**os.environ, **environment(place)}, capture_output=True, text=True, check=False
    )


def machines(place: Path) -> list[str]:
    """The command lines of QEMUs whose files are below ``place``."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = each.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if line.startswith("qemu") or "/qemu" in line.partition("\0")[0]:
            found.append(line)
    return [line for line in found if str(place) in line]


def test_an_interrupted_matrix_goes_on_where_it_stopped(place: Path) -> None:
    words = ("matrix", "tiny.toml", f"--json={place / 'cut.json'}")
    with Terminal("harness.commands.cli", *words, cwd=place, environment=environment(place)) as terminal:
        terminal.expect(r"\[1/2\] debian:6\.12 x86_64: \d+ passed, \d+:\d\d")
        terminal.expect(r"\r\x1b\[Kharness: 1 of 2 cells, \d+ tests, 0 surprises, about [^\r]*now debian:6\.12 arm64")
        wait_until(lambda: any("aarch64" in line for line in machines(place)), "a guest of the second cell", 240)
        terminal.type("\x03")
        terminal.expect("interrupted: the cells that were done are kept")
        assert terminal.status() == 2
    assert machines(place) == [], "guests have to end with the matrix"
    cut = json.loads((place / "cut.json").read_text())
    assert [each["state"] for each in cut["cells"]] == ["ran", "not run"]

    second = run(place, "--json=whole.json", "--html=whole.html")
    assert second.returncode == 0, second.stdout + second.stderr
    assert re.search(r"\[1/2\] debian:6\.12 x86_64: \d+ passed, kept from an earlier run", second.stdout)
    assert re.search(r"\[2/2\] debian:6\.12 arm64: \d+ passed, \d+:\d\d", second.stdout)
    whole = json.loads((place / "whole.json").read_text())
    assert [each["state"] for each in whole["cells"]] == ["kept", "ran"]
    assert all(each["release"].startswith("6.12.") for each in whole["cells"])
    assert {test["outcome"] for each in whole["cells"] for test in each["tests"]} == {"passed"}
    assert "test_flags" in (place / "whole.html").read_text()


def test_a_warm_matrix_runs_nothing_and_a_repeated_one_does(place: Path) -> None:
    """Goes on from the test above; alone it fills the store first."""
    if not (place / "whole.json").exists():
        assert run(place, "--json=whole.json").returncode == 0
    kept = {path: path.stat().st_mtime_ns for path in (place / "state").rglob("cells/*")}
    warm = run(place, "--compare=whole.json")
    assert warm.returncode == 0, warm.stdout + warm.stderr
    assert "2 cells (2 kept)" in warm.stdout
    assert "No changes since whole.json" in warm.stdout
    assert {path: path.stat().st_mtime_ns for path in (place / "state").rglob("cells/*")} == kept
    assert not list((place / "tmp").glob("mremap-harness-*")), "a machine was started, or left something behind"


def test_a_kernel_that_the_archive_does_not_have_breaks_its_cell_only(place: Path) -> None:
    text = MATRIX.replace('["debian:6.12"]', '["debian:6.12", "debian:6.99"]').replace('"x86_64", "arm64"', '"x86_64"')
    (place / "more.toml").write_text(text)
    command = [sys.executable, "-m", "harness.commands.cli", "matrix", "more.toml"]
    done = subprocess.run(
        command, cwd=place, env={**os.environ, **environment(place)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "debian:6.99 x86_64: Debian has no kernel 6.99 for x86_64" in done.stdout
    assert re.search(r"debian:6\.12 x86_64: \d+ passed", done.stdout)
