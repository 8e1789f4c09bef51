# SPDX-License-Identifier: GPL-2.0
"""Boards: machines reached by SSH. A guest plays the board."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import paramiko
import pytest

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import GuestLost, HostError, LostCondition
from harness.guests import board, ssh
from harness.host.cache import silent
from harness.kernels import grammar, kernel
from harness.machine import payload
from harness.markers import MARKERS
from tests.integration.ssh_guest import Home, answer, running

_TESTS = """
import os, signal, time
def test_leaves_a_line_in_the_log():
    open("/dev/kmsg", "w").write("<4>a word from the board\\n")
def test_fails():
    assert os.getcwd() == "elsewhere"
def test_kills_the_agent():
    os.kill(os.getpid(), signal.SIGKILL)
def test_never_ends():
    time.sleep(1000)
"""


@pytest.fixture(scope="module")
def transport() -> Iterator[paramiko.Transport]:
    with running() as guest:
        opened = ssh.connect(guest)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def home(transport: paramiko.Transport, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    directory = tmp_path_factory.mktemp("home")
    made = Home(directory, transport)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(directory))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        yield made
    made.close()


@pytest.fixture(autouse=True)
def _known(home: Home) -> None:
    home.know_the_board()


@pytest.fixture(scope="module")
def fleet(home: Home) -> Iterator[board.BoardFleet]:
    directory = home.path / "some_tests"
    directory.mkdir()
    (directory / "test_board.py").write_text(_TESTS)
    tests = payload.tests_archive(directory, MARKERS)
    made = board.BoardFleet(_spec(), tests, ["some_tests", "--tb=short"], silent)
    yield made
    made.close()


def _spec() -> kernel.SshSpec:
    spec = grammar.parse("ssh://root@board")
    assert isinstance(spec, kernel.SshSpec)
    return spec


def _run(fleet: board.BoardFleet, name: str, seconds: float = 60.0) -> tuple[list[str], str]:
    """Outcomes of one test on the board, and the log."""
    guest, collected = fleet.fresh()
    try:
        nodeid = f"some_tests/test_board.py::{name}"
        assert nodeid in collected.nodeids
        answers = list(guest.run(protocol.Run(nodeid, "", "1a2b"), Deadline.after(seconds)))
        return [each["outcome"] for each in answers if isinstance(each, dict)], guest.console_bytes().decode()
    finally:
        guest.close()


def _traces(transport: paramiko.Transport) -> str:
    return answer(transport, "ls -d /tmp/mremap-board-*; pgrep -f 'harness.agen[t] --stdio'")


def test_tests_run_on_a_board_and_nothing_stays_there(fleet: board.BoardFleet, transport: paramiko.Transport) -> None:
    outcomes, log = _run(fleet, "test_leaves_a_line_in_the_log")
    assert outcomes == ["passed"] * 3
    assert "mremap-board" in _traces(transport)
    begin, word, end = (
        log.index(text) for text in ("harness: begin 1a2b", "a word from the board", "harness: end 1a2b")
    )
    assert begin < word < end
    fleet.close()
    assert "mremap-board" not in _traces(transport)


def test_a_failure_on_a_board_is_a_failure(fleet: board.BoardFleet) -> None:
    assert _run(fleet, "test_fails")[0] == ["passed", "failed", "passed"]


def test_a_dead_agent_is_noticed_and_the_next_one_works(fleet: board.BoardFleet) -> None:
    with pytest.raises(GuestLost) as caught:
        _run(fleet, "test_kills_the_agent")
    assert caught.value.condition is LostCondition.AGENT_DIED
    assert _run(fleet, "test_leaves_a_line_in_the_log")[0] == ["passed"] * 3


def test_a_test_that_never_ends_is_ended(fleet: board.BoardFleet, transport: paramiko.Transport) -> None:
    with pytest.raises(GuestLost) as caught:
        _run(fleet, "test_never_ends", 3.0)
    assert caught.value.condition is LostCondition.TEST_TIMEOUT
    assert "--stdio" not in answer(transport, "ps -o args | grep '[h]arness.agent'")


def test_a_lost_connection_is_no_verdict_and_leaves_nothing(
    fleet: board.BoardFleet, transport: paramiko.Transport
) -> None:
    guest, _ = fleet.fresh()
    session = fleet._session
    assert session is not None
    session.transport.sock.close()
    until = Deadline.after(20)
    while session.transport.is_active():
        until.check("the loss to be noticed")
        time.sleep(0.1)
    with pytest.raises(GuestLost) as caught:
        guest.carrier.check()
    assert caught.value.condition is LostCondition.CONNECTION_LOST
    guest.close()
    until = Deadline.after(20)
    while "mremap-board" in _traces(transport):
        until.check("the board to be clean")
        time.sleep(0.2)


def test_an_unknown_board_is_refused(home: Home) -> None:
    home.know_nobody()
    with pytest.raises(HostError, match=r"not among your known hosts.*connect once with: ssh -p 22 root@board"):
        board.connect(_spec(), Deadline.after(30))


def test_a_board_with_another_key_is_refused(home: Home) -> None:
    home.know(paramiko.ECDSAKey.generate())
    with pytest.raises(HostError, match="host key of board"):
        board.connect(_spec(), Deadline.after(30))


def test_a_stranger_is_told_to_make_ssh_work_first(home: Home) -> None:
    with home.without_keys(), pytest.raises(HostError, match=r"accepts none of your keys.*ssh -p 22 root@board"):
        board.connect(_spec(), Deadline.after(30))


def test_pytest_takes_a_board_for_a_kernel(home: Home, tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nguest_tests = some_tests\n")
    (tmp_path / "some_tests").mkdir()
    (tmp_path / "some_tests/test_board.py").write_text(_TESTS)
    command = [sys.executable, "-m", "pytest", "--kernel=ssh://root@board", "-v", "-k", "leaves or fails"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "some_tests/test_board.py::test_leaves_a_line_in_the_log[ssh-board] PASSED" in done.stdout
    assert "some_tests/test_board.py::test_fails[ssh-board] FAILED" in done.stdout
    assert "root@board, port 22" in done.stdout
    assert "pytest --kernel=ssh://root@board 'some_tests/test_board.py::test_fails[ssh-board]'" in done.stdout
