# SPDX-License-Identifier: GPL-2.0
"""Tests of the library on the kernel under test: trees of processes."""

from __future__ import annotations

import errno
import functools
import os
import signal
from pathlib import Path

import pytest

from guest_tests.mm import syscalls, system, waiting
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping
from guest_tests.mm.proctree import Child, ChildDied


def test_a_child_sees_our_memory_and_keeps_its_own_changes(area: CarveOut) -> None:
    mapping = area.map(0, 3).fill()
    with Child() as child:
        child.call(mapping.check)
        child.call(mapping.fill, seed=7)
        mapping.check()
        with pytest.raises(AssertionError, match="page 0") as caught:
            child.call(mapping.check)
        assert any(f"in process {child.pid}" in note for note in caught.value.__notes__)


def test_a_raised_error_keeps_its_errno() -> None:
    with Child() as child, pytest.raises(OSError, match="EINVAL") as caught:
        child.call(syscalls.mprotect, 1, PAGE_SIZE, syscalls.PROT_READ)  # not aligned
    assert caught.value.errno == errno.EINVAL


def test_a_skip_in_a_child_is_a_skip_here() -> None:
    with Child() as child, pytest.raises(pytest.skip.Exception, match="needs Linux 99"):
        child.call(system.require_kernel, 99, 0, "the future")


def test_children_run_side_by_side() -> None:
    with Child() as first, Child() as second:
        first.start(os.getpid)
        second.start(os.getpid)
        assert (second.result(), first.result()) == (second.pid, first.pid)


def test_a_killed_child_is_reported_with_its_signal_and_what_it_was_doing() -> None:
    with Child() as child:
        with pytest.raises(ChildDied, match=r"was killed by SIGSEGV during Mapping\.touch") as caught:
            child.call(Mapping(PAGE_SIZE, 1).touch)
        assert caught.value.signal == signal.SIGSEGV
        with pytest.raises(ChildDied):
            child.call(os.getpid)


def test_an_exiting_child_is_reported_with_its_status() -> None:
    with Child() as child, pytest.raises(ChildDied, match="exited with status 3"):
        child.call(os._exit, 3)


def test_a_child_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child() as child:
        child.start(signal.pause)
        with pytest.raises(TimeoutError, match="did not finish"):
            child.result(seconds=0.05)
        assert child.alive
    assert not child.alive


def test_grandchildren_are_forked_by_children(area: CarveOut) -> None:
    mapping = area.map(0, 2).fill()
    with Child() as child:
        child.call(mapping.fill, seed=1)
        with child.fork() as grandchild:
            assert grandchild.call(os.getppid) == child.pid
            assert grandchild.call(mapping.read, 0) == child.call(mapping.read, 0) != mapping.read(0)


def test_nothing_is_left_of_a_tree() -> None:
    with Child() as child:
        first, second = child.fork(), child.fork()
        third = second.fork()
        second.start(signal.pause)
        tree = [child.pid, first.pid, second.pid, third.pid]
        assert all(Path(f"/proc/{pid}").exists() for pid in tree)
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]


def test_a_grandchild_may_outlive_its_parent(area: CarveOut) -> None:
    mapping = area.map(0, 2).fill()
    with Child() as child:
        mortal, survivor = child.fork(), child.fork(outlive_parent=True)
        assert child.kill() == signal.SIGKILL
        assert mortal.wait() == signal.SIGKILL
        assert survivor.call(os.getppid) == os.getpid()
        survivor.call(mapping.check)
    assert not survivor.alive


def test_a_childs_own_children_die_with_it() -> None:
    with Child() as child:
        pid = child.call(_fork_without_telling)
        assert Path(f"/proc/{pid}").exists()
    waiting.wait_until(functools.partial(_dead, pid), "the grandchild's end")


def _fork_without_telling() -> int:
    global _untold
    _untold = Child()
    return _untold.pid


_untold: Child | None = None


def _dead(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
    return False
