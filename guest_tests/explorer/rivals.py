# SPDX-License-Identifier: GPL-2.0
"""A process that makes the kernel walk to the memory of a program while the program runs.

It touches nothing itself. So what the program has written, and where it is mapped, is as without it.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from guest_tests.explorer.arena import BASE, LENGTH, Arena, address
from guest_tests.mm import ksm, numa, syscalls
from guest_tests.mm.pagemap import PRESENT
from harness.programs.memory import ARENA_PAGES

#: how long ksmd may scan in one step, in seconds
_SCAN: Final = 0.002


class Rival:
    """One such process, which rests until it is told to race. A context manager that ends it.

    :param seed: of the order of its steps. When they come, nobody can repeat.
    """

    def __init__(self, seed: int) -> None:
        #: how many steps it has taken: written by the rival
        self._count = mmap.mmap(-1, mmap.PAGESIZE)
        self._merges = ksm.available()
        target = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
                self._race(target, random.Random(seed))
            finally:
                os._exit(1)
        os.waitpid(self.pid, os.WUNTRACED)  # it stops itself

    @property
    def steps(self) -> int:
        """How many steps it has taken."""
        number: int = struct.unpack_from("=Q", self._count)[0]
        return number

    @contextmanager
    def racing(self) -> Iterator[None]:
        """Have it walk until the block ends. It is in no system call then, and ksmd in no scan."""
        os.kill(self.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGSTOP)
            os.waitpid(self.pid, os.WUNTRACED)
            if self._merges:
                ksm.write("run", 0)  # it may have stopped in the middle of this step

    def __enter__(self) -> Rival:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self._count.close()

    def _race(self, target: int, order: random.Random) -> None:
        steps = _steps(target)
        os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            with suppress(OSError):
                order.choice(steps)()
            struct.pack_into("=Q", self._count, 0, self.steps + 1)


def _steps(target: int) -> list[Callable[[], object]]:
    """What it can do to the memory of a process: migrate pages, reclaim them, age them, and have KSM scan them."""
    arena = Arena()
    nodes = numa.nodes()[:2]

    def migrate() -> None:
        nodes.reverse()
        entries = arena.entries(target)[:ARENA_PAGES]
        # Asking for those that are not there would take most of the time.
        present = [address(page) for page, entry in enumerate(entries) if entry & PRESENT]
        if present:
            arena.migrate(target, present, [nodes[0]] * len(present))

    process = syscalls.call("pidfd_open", target)

    def advise(advice: int) -> Callable[[], object]:
        # Where nothing is mapped it goes on, and says ENOMEM in the end (madvise(2)).
        return lambda: syscalls.process_madvise(process, BASE, LENGTH, advice)

    steps: list[Callable[[], object]] = [advise(syscalls.MADV_PAGEOUT), advise(syscalls.MADV_COLD)]
    if len(nodes) > 1:
        steps += [migrate] * 6
    if ksm.available():
        steps.append(lambda: ksm.scan_for(_SCAN))
    return steps
