# SPDX-License-Identifier: GPL-2.0
"""Kernels, architectures and the mirror in pytest's configuration file. No test here boots."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.stage import STAGE

#: The forms that pytest reads, with the same meaning.
FILES = {
    "pytest.ini": "[pytest]\nguest_tests = checks\nkernel =\n    debian:6.12\n    debian:7.3\narch = arm64\n",
    "pyproject.toml": '[tool.pytest.ini_options]\nguest_tests = "checks"\nkernel = ["debian:6.12", "debian:7.3"]\n'
    'arch = ["arm64"]\n',
}


@pytest.fixture(params=FILES)
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A project of somebody else with kernels in its configuration."""
    top = tmp_path / "project"
    (top / "checks").mkdir(parents=True)
    (top / request.param).write_text(FILES[request.param])
    (top / "checks/test_guest.py").write_text("def test_guest():\n    pass\n")
    (top / "test_host.py").write_text("def test_host():\n    pass\n")
    (top / "stage.py").write_text(textwrap.dedent(STAGE))
    return top


def run(top: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "stage", "-v", *args]
    return subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)


def passed(done: subprocess.CompletedProcess[str]) -> set[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    words = (word for line in done.stdout.splitlines() if "PASSED" in line for word in line.split())
    return {word.rpartition("::")[2] for word in words if "::" in word}


BOTH = {"test_guest[debian:6.12-arm64]", "test_guest[debian:7.3-arm64]"}


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_guest_tests_run_on_the_kernels_of_the_file_and_the_others_on_the_host(project: Path, workers: str) -> None:
    assert passed(run(project, "-n", workers)) == {*BOTH, "test_host"}


@pytest.mark.parametrize(
    ("args", "kernels"),
    [
        (("--kernel=debian:6.18",), {"debian:6.18-arm64"}),
        (("--arch=x86_64",), {"debian:6.12-x86_64", "debian:7.3-x86_64"}),
        (("--kernel=debian:6.18", "--arch=x86_64"), {"debian:6.18-x86_64"}),
        (("-o", "kernel=debian:6.1"), {"debian:6.1-arm64"}),
    ],
)
def test_the_command_line_wins(project: Path, args: tuple[str, ...], kernels: set[str]) -> None:
    assert passed(run(project, "checks", *args)) == {f"test_guest[{each}]" for each in kernels}


def test_tests_of_the_host_can_be_run_alone(project: Path) -> None:
    assert passed(run(project, "test_host.py")) == {"test_host"}


def test_a_kernel_on_the_command_line_still_refuses_tests_of_the_host(project: Path) -> None:
    done = run(project, "test_host.py", "--kernel=debian:6.12")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "none would run in a guest" in done.stdout + done.stderr


def test_without_kernels_guest_tests_skip(project: Path) -> None:
    done = run(project, "-o", "kernel=", "-rs")
    assert "1 passed, 1 skipped" in done.stdout
    assert "give --kernel" in done.stdout


def test_a_directory_with_nothing_but_kernels_runs_the_projects_own_tests(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nkernel = debian:6.12\narch = arm64\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "test_example"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "test_example.py::" in done.stdout
    assert "[debian:6.12-arm64" in done.stdout


def test_the_mirror_is_taken_from_the_file_and_from_the_command_line_first(tmp_path: Path) -> None:
    # Nothing listens on the reserved port 9 of this host, so the error names the mirror that was asked.
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nkernel = debian:6.12\ndebian_mirror = http://127.0.0.1:9/of-the-file\n"
    )

    def asked(*args: str) -> str:
        command = [sys.executable, "-m", "pytest", "-k", "test_example", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout

    assert "127.0.0.1:9/of-the-file" in asked()
    assert "127.0.0.1:9/of-the-line" in asked("--debian-mirror=http://127.0.0.1:9/of-the-line")


@pytest.mark.parametrize("line", ["arch = sparc", "kernel = nothing"])
def test_a_wrong_value_is_a_usage_error(tmp_path: Path, line: str) -> None:
    (tmp_path / "pytest.ini").write_text(f"[pytest]\n{line}\n" + ("" if "kernel" in line else "kernel = debian:\n"))
    done = run_plain(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert line.split()[-1] in done.stderr


def test_a_value_of_a_wrong_type_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\nkernel = 7\n")
    done = run_plain(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout + done.stderr
    assert "INTERNALERROR" not in done.stdout


def run_plain(top: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pytest"], cwd=top, capture_output=True, text=True, check=False)
