# SPDX-License-Identifier: GPL-2.0
"""``harness doctor`` on this host, and on hosts that lack something."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from harness.commands import doctor
from harness.commands.doctor import Finding, State
from harness.debian import mirror
from tests.integration.terminal import Terminal


def _found(name: str) -> Finding:
    return next(each for each in doctor.findings() if each.name == name)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it; what is linked there is found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The host's network is not what is tested here; the reserved port 9 of this host answers nobody.
    monkeypatch.setenv(mirror.MIRROR_VARIABLE, "http://127.0.0.1:9/debian")


def _program(directory: Path, name: str, says: str = "") -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def test_a_host_without_qemu_is_told_how_to_get_it(bare: Path) -> None:
    finding = _found("qemu arm64")
    assert finding.state is State.MISSING
    assert finding.remedy.endswith("apt-get install qemu-system-arm")


def test_one_emulator_is_enough_and_none_is_not(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vital in ("setpriv", "apt-get", "apt-config", "dpkg-deb"):
        _program(bare, vital)
    assert doctor.main() == 1
    assert "No guest can run here yet" in capsys.readouterr().out
    _program(bare, "qemu-system-aarch64", "QEMU emulator version 9.9.9 (something)")
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"ok +qemu arm64 +9\.9\.9", said)
    assert "Guests of arm64 can run here, but without qemu x86_64" in said


def test_without_setpriv_nothing_runs(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program in ("qemu-system-aarch64", "apt-get", "apt-config", "dpkg-deb"):
        _program(bare, program, "version 9.9.9")
    assert doctor.main() == 1
    assert re.search(r"missing +setpriv .*\n +→ .*apt-get install util-linux", capsys.readouterr().out)


def test_a_mirror_out_of_reach_leaves_the_cache() -> None:
    finding = _found("mirror")
    assert finding.state is State.LESS
    assert "not reachable now" in finding.text


def test_a_missing_keyring_is_a_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(mirror.KEYRING_VARIABLE, str(tmp_path / "nothing"))
    finding = _found("mirror")
    assert finding.state is State.MISSING
    assert finding.remedy.endswith("apt-get install debian-archive-keyring")


def test_a_small_cache_disk_is_said() -> None:
    finding = doctor._space("cache", Path("/dev/shm/not/there/yet"), 1 << 40, "anything", "buy a bigger one")
    assert finding.state is State.LESS
    assert finding.remedy == "buy a bigger one"


def test_a_missing_compiler_is_optional(bare: Path) -> None:
    finding = _found("build arm64")
    assert finding.state is State.OPTIONAL
    assert "flex" in finding.remedy


def test_lines_are_aligned_and_remedies_stand_below() -> None:
    out = io.StringIO()
    report = [Finding("one", State.OK, "fine"), Finding("longer", State.MISSING, "gone", "get it")]
    doctor.print_report(report, out)
    assert out.getvalue().splitlines()[:3] == [
        "  ok        one    fine",
        "  missing   longer gone",
        "                   → get it",
    ]


def test_the_exit_status_is_the_verdict_and_a_pipe_gets_no_colours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.commands.cli", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if "can run here. Try" in done.stdout or "but without" in done.stdout else 1)
    assert "\033" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), ("", True)])
def test_a_person_gets_colours_unless_refused(no_color: str, coloured: bool) -> None:
    with Terminal(
        "harness.commands.cli", "doctor", cwd=Path(os.getcwd()), environment={"NO_COLOR": no_color}
    ) as terminal:
        terminal.status()
    assert ("\033[32mok" in terminal.seen) is coloured
