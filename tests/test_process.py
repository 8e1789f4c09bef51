# SPDX-License-Identifier: GPL-2.0
"""Child processes end with the harness, keep their output, and do not receive the terminal's Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.deadline import Deadline
from harness.errors import HostError
from harness.host.process import Child, find_program
from tests.lab import wait_until

#: starts a child, tells its process id, and waits to be killed
PARENT = """
import sys, time
from pathlib import Path
from harness.host.process import Child
print(Child(["sleep", "60"], Path(sys.argv[1])).pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Child]:
    return lambda *argv: Child(argv, tmp_path / "output")


def ended(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_a_child_tells_its_status_and_what_it_said(start: Callable[..., Child]) -> None:
    child = start("sh", "-c", "echo out; echo err >&2; exit 3")
    assert child.wait(Deadline.after(10)) == 3
    assert child.status == 3
    assert child.said() == "out\nerr"
    assert child.command == "sh -c 'echo out; echo err >&2; exit 3'"


def test_waiting_ends_with_the_deadline(start: Callable[..., Child]) -> None:
    child = start("sleep", "60")
    assert child.wait(Deadline.after(0.05)) is None
    assert child.status is None
    child.kill()
    child.kill()
    assert child.status == -signal.SIGKILL


def test_only_the_end_of_much_talk_is_kept(start: Callable[..., Child]) -> None:
    child = start("sh", "-c", "yes | head -c 100000; echo the end")
    assert child.wait(Deadline.after(10)) == 0
    assert len(child.said()) <= 4096
    assert child.said().endswith("the end")


def test_a_child_has_a_session_of_its_own_and_no_stdin(start: Callable[..., Child]) -> None:
    child = start("sh", "-c", "readlink /proc/self/fd/0; sleep 60")
    wait_until(child.said, "the child to speak", 10)
    assert child.said() == "/dev/null"
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    child.kill()


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "output")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not ended(pid)
        parent.kill()
    wait_until(lambda: ended(pid), "the kernel to end the child", 10)


def test_a_program_that_cannot_be_started_shows_as_its_exit_status(start: Callable[..., Child]) -> None:
    child = start("/no/such/program")
    assert child.wait(Deadline.after(10)) != 0
    assert "/no/such/program" in child.said()


def test_a_missing_program_names_the_package_that_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert find_program("sh", "dash").endswith("/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"^sh is not installed: install it with: apt-get install dash$"):
        find_program("sh", "dash")


def test_a_child_inherits_the_descriptors_it_is_given_and_no_others(tmp_path: Path) -> None:
    given, kept = os.open(tmp_path, os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    try:
        child = Child(["ls", "/proc/self/fd"], tmp_path / "output", pass_fds=[given])
        assert child.wait(Deadline.after(10)) == 0
        assert str(given) in child.said().split()
        assert str(kept) not in child.said().split()
    finally:
        os.close(given)
        os.close(kept)


def test_time_is_not_lost_when_a_child_ends_early(start: Callable[..., Child]) -> None:
    began = time.monotonic()
    assert start("true").wait(Deadline.after(60)) == 0
    assert time.monotonic() - began < 30
