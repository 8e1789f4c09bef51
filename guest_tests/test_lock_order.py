# SPDX-License-Identifier: GPL-2.0
"""Two calls that move memory of one process at the same time, and take the same locks.

A test may lose two CPUs for ever, so each has a guest of its own, with three CPUs: ``--guest-cpus=3``.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, carve_out
from guest_tests.mm.userfault import FEATURE_MOVE, Userfault
from guest_tests.mm.waiting import patience

#: pages that one page table maps
_TABLE: Final = PAGE_SIZE // 8
_MOVE: Final = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
#: The range of UFFDIO_MOVE in pages. Every other page is there, so that it takes the locks for each of them.
_PAGES: Final = 256
#: The CPUs of the two threads, which may be lost. All others stay on CPU 0.
_LOST: Final = (1, 2)
#: how long they race, in seconds
_SECONDS: Final = 3.0
#: how much CPU time each thread may use without a move, in seconds
_STUCK: Final = 3.0


#: What shows the deadlock. On 6.17.13 and 7.1.13 the third CPU often stops, too, before the test can tell.
_DEADLOCK: Final = ("neither mremap() nor UFFDIO_MOVE returns", "guest lost (hang)", "guest lost (test timeout)")


@pytest.mark.finding("uffd-move-deadlock", match=_DEADLOCK)
def test_mremap_and_uffdio_move_at_once() -> None:
    """No row: a thread moves a page with mremap() from one page table to another and back, again and again. Another
    moves other pages between the same tables with UFFDIO_MOVE (6.8), page by page. They are in different mappings.

    ::

        page table      |         1         |         2         |
        mremap()        |   m <-----------------> m             |
        UFFDIO_MOVE     |       u u u <-----------> u u u       |

    Each of the calls takes the locks of both page tables.

    Every kernel: both threads go on.
    """
    system.require_config("USERFAULTFD")
    system.require_kernel(6, 8, "UFFDIO_MOVE")
    system.require_cpus(1 + len(_LOST))
    with carve_out(4 * _TABLE) as area:
        _keep_others_off()
        racers = _Racers(area)
        began = time.monotonic()
        while time.monotonic() - began < _SECONDS or min(racers.moves()) < 200:
            assert time.monotonic() - began < patience(60), f"the threads move too seldom: {racers.moves()}"
            racers.assert_running()
            time.sleep(0.1)
        racers.stop()


def _keep_others_off() -> None:
    """Keep all other processes off the CPUs that may be lost: one that waits there never runs again.

    6.17.13 was seen to lose the process that tells the host that the guest is alive.
    """
    left = set(range(os.cpu_count() or 1)) - set(_LOST)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is a thread of the kernel that belongs to a CPU
            os.sched_setaffinity(int(process.name), left)


class _Racers:
    """A process with two threads that move memory in their own way, and count their moves.

    It is left behind if it cannot be killed.
    """

    def __init__(self, area: CarveOut) -> None:
        self._counts = mmap.mmap(-1, PAGE_SIZE)
        self._pid = os.fork()
        if not self._pid:
            try:
                self._race(area)
            finally:
                os._exit(1)
        self._seen = (self.moves(), self._cpu_times())

    def _race(self, area: CarveOut) -> None:
        """In the process: start the threads, and wait for ever."""
        first = -(area.page(0) // PAGE_SIZE) % _TABLE  # the first page of the first table
        here, there = area.page(first + 16), area.page(first + _TABLE + 16)
        area.map(first + 16, 1).touch()
        page, other, length, done = area.page(first + 64), area.page(first + _TABLE + 64), _PAGES * PAGE_SIZE, 0
        uffd = Userfault(FEATURE_MOVE)
        uffd.register(area.map(first + 64, _PAGES).touch(range(0, _PAGES, 2)))
        uffd.register(area.map(first + _TABLE + 64, _PAGES))

        def mremap() -> None:
            nonlocal here, there
            syscalls.mremap(here, PAGE_SIZE, PAGE_SIZE, _MOVE, there)
            here, there = there, here

        def uffdio_move() -> None:
            nonlocal page, other, done
            done += uffd.move_some(page + done, other + done, length - done)
            if done == length:
                page, other, done = other, page, 0

        threads = [threading.Thread(target=self._repeat, args=each) for each in enumerate((mremap, uffdio_move))]
        for thread in threads:
            thread.start()
        threads[0].join()

    def _repeat(self, number: int, step: Callable[[], None]) -> None:
        try:
            os.sched_setaffinity(0, {_LOST[number]})
            while True:
                step()
                (count,) = struct.unpack_from("=Q", self._counts, 8 * number)
                struct.pack_into("=Q", self._counts, 8 * number, count + 1)
        finally:
            os._exit(1)

    def moves(self) -> tuple[int, ...]:
        """How often each thread has moved its page."""
        return struct.unpack_from("=QQ", self._counts)

    def _cpu_times(self) -> dict[str, float]:
        """The CPU time that each thread has used, in seconds."""
        times = {}
        for task in Path(f"/proc/{self._pid}/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            times[task.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return times

    def assert_running(self) -> None:
        """Assert that the threads do not use CPU time without a move, and that none has failed.

        Time alone says nothing: whatever runs the guest's CPUs may be busy otherwise.
        """
        ended, _ = os.waitpid(self._pid, os.WNOHANG)
        assert not ended, "a thread failed: what it printed says why"
        moves, times = self.moves(), self._cpu_times()
        if moves != self._seen[0]:
            self._seen = moves, times
            return
        used = [seconds - self._seen[1].get(task, 0.0) for task, seconds in times.items()]
        spinning = [seconds for seconds in used if seconds >= _STUCK]
        assert len(spinning) < 2, (
            f"neither mremap() nor UFFDIO_MOVE returns: after {moves[0]} and {moves[1]} moves their threads have used "
            f"{' and '.join(f'{seconds:.1f}' for seconds in spinning)} s of CPU time without another"
        )

    def stop(self) -> None:
        """End the process."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
