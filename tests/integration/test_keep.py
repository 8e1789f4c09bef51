# SPDX-License-Identifier: GPL-2.0
"""``--keep``: a person inspects the guest of a failed test."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ssh_guest import KERNEL
from tests.integration.terminal import Terminal

_TESTS = """
def test_fails():
    open("/tmp/trace", "w").write("left by the test")
    assert 1 == 2
def test_is_not_reached():
    pass
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nguest_tests = some_tests\n")
    (tmp_path / "some_tests").mkdir()
    (tmp_path / "some_tests/test_some.py").write_text(_TESTS)
    return tmp_path


def test_keep_waits_with_the_very_guest_that_failed(project: Path) -> None:
    with Terminal("pytest", f"--kernel={KERNEL}", "--keep", cwd=project) as terminal:
        terminal.expect("assert 1 == 2")
        monitor = terminal.expect(r"UNIX-CONNECT:(\S+)")[1]
        gdb = terminal.expect(r"target remote (\S+)'")[1]
        terminal.expect("Enter alone to end it: ")
        assert "QEMU" in _greeting(monitor)
        terminal.type("s\n")
        terminal.expect("guest:.*# ")
        terminal.type("cat /tmp/trace; echo\n")
        terminal.expect("left by the test")
        terminal.type("exit\n")
        terminal.expect("Enter alone to end it: ")
        assert _stub_answers(gdb)
        terminal.type("\n")
        terminal.expect("--keep stops at the first test that fails")
        assert terminal.status() == 1
    assert "1 failed" in terminal.seen
    assert "passed" not in terminal.seen
    assert not Path(monitor).exists()


def test_of_a_guest_that_died_the_console_is_kept(project: Path) -> None:
    (project / "some_tests/test_some.py").write_text(
        "def test_dies():\n    open('/proc/sysrq-trigger', 'w').write('c')\n"
    )
    with Terminal("pytest", f"--kernel={KERNEL}", "--keep", cwd=project) as terminal:
        terminal.expect("the kernel panicked")
        console = terminal.expect(r"console +(\S+)")[1]
        terminal.expect("Enter alone to end it: ")
        assert "sysrq: Trigger a crash" in Path(console).read_text(errors="replace")
        terminal.type("s\n")
        terminal.expect("no shell: ")
        terminal.expect("Enter alone to end it: ")
        terminal.type("\n")
        assert terminal.status() == 1
    assert not Path(console).exists()


def test_keep_needs_a_person(project: Path) -> None:
    argv = [sys.executable, "-m", "pytest", f"--kernel={KERNEL}", "--keep"]
    done = subprocess.run(argv, cwd=project, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "needs a terminal" in done.stderr


def test_keep_does_not_go_with_several_workers(project: Path) -> None:
    with Terminal("pytest", f"--kernel={KERNEL}", "--keep", "-n2", cwd=project) as terminal:
        assert terminal.status() == pytest.ExitCode.USAGE_ERROR
    assert "does not go with -n" in terminal.seen


def _greeting(path: str) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        return sock.recv(4096).decode()


def _stub_answers(path: str) -> bool:
    """Whether a debugger's first question (why did it stop?) is answered."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(path)
        sock.sendall(b"+$?#3f")
        return b"$T" in sock.recv(4096)
