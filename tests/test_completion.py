# SPDX-License-Identifier: GPL-2.0
"""Options are completed in shells, from what is known locally. No network is used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.pytest_plugin import completion
from tests.test_kernels_command import package, write_list

pytest.importorskip("argcomplete")

#: What bash splits words at.
BASH = " \t\n\"'><=;|&(:"


def completed(line: str, tmp_path: Path, breaks: str = "") -> list[str]:
    """What pytest offers for a line, as argcomplete's script for bash asks it."""
    answer = tmp_path / "answer"
    answer.touch()
    done = subprocess.run(
        [sys.executable, "-m", "pytest"],
        cwd=tmp_path,
        env=os.environ
        | {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_IFS": "\n",
            "_ARGCOMPLETE_COMP_WORDBREAKS": breaks,
            "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
            "COMP_LINE": line,
            "COMP_POINT": str(len(line.encode())),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [each.strip() for each in answer.read_text().splitlines()]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("pytest --kernel=debian:6.", ["--kernel=debian:6.12.117", "--kernel=debian:6.12.118"]),
        ("pytest --kernel debian:6.12.118", ["debian:6.12.118"]),
        ("pytest --kernel=linux-s", ["--kernel=linux-source-7.3"]),
        ("pytest --kernel=rel", ["--kernel=relocate-anon", "--kernel=relocate-anon-6.12"]),
        ("pytest --kernel=relocate-anon:ka", ["--kernel=relocate-anon:kasan"]),
        (
            "pytest --kernel=relocate-anon:kasan:d",
            ["--kernel=relocate-anon:kasan:d" + end for end in ("ebug", "warf")],
        ),
        ("pytest --kernel=unpatched --kernel=relocate-anon-", ["--kernel=relocate-anon-6.12"]),
        ("pytest --kernel=debian:trixie-b", ["--kernel=debian:trixie-backports"]),
        ("pytest --kernel=./bz", ["--kernel=./bzImage"]),
        ("pytest --kernel=nothing", []),
        ("pytest --arch=arm", ["--arch=arm64"]),
        ("pytest --preset=ka", ["--preset=kasan"]),
        ("pytest --expect-f", ["--expect-findings"]),
    ],
)
def test_what_a_shell_offers(line: str, found: list[str], tmp_path: Path) -> None:
    write_list("trixie", "amd64", package("6.12.118-1"), package("6.12.117-1"))
    write_list("trixie-backports", "amd64", package("7.3.4-1", "linux-source-7.3", "all"))
    (tmp_path / "bzImage").touch()
    assert completed(line, tmp_path) == found


def test_bash_gets_the_part_behind_the_last_place_where_it_splits(tmp_path: Path) -> None:
    write_list("trixie", "amd64", package("6.12.118-1"))
    assert completed("pytest --kernel=debian:6", tmp_path, BASH) == ["6.12.118"]


def test_a_damaged_cache_offers_what_is_known_without_it(tmp_path: Path) -> None:
    (write_list("trixie", "amd64") / "packages.json").write_text("{")
    assert completed("pytest --kernel=unp", tmp_path) == ["--kernel=unpatched", "--kernel=unpatched-6.12"]


def test_without_a_shell_that_asks_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    program = (
        "import sys, pytest; pytest.main(['--version', '--version']);"
        "print([each for each in sys.modules if 'completion' in each])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_debian_versions_take_no_preset() -> None:
    assert completion.kernels("debian:ka") == []


def test_a_kernel_that_was_completed_is_appended(tmp_path: Path) -> None:
    """argcomplete parses the words before the cursor with the same actions."""
    assert completed("pytest --arch=x86_64 --arch=arm64 --kernel=unpatched --preset=fas", tmp_path) == ["--preset=fast"]
