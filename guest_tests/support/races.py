# SPDX-License-Identifier: GPL-2.0
"""Threads that repeat a step while a test does something else, and words that show whether a write was lost."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Final, Self

from guest_tests.mm import numa
from guest_tests.mm.waiting import patience


class Busy:
    """A thread that repeats a step until its ``with`` block ends. An error of the step is raised at the block's end.

    System calls release the interpreter lock. With two CPUs both threads are in the kernel at the same time.

    :param cpu: the only CPU that it may run on; any by default.
    """

    def __init__(self, step: Callable[[], object], *, cpu: int | None = None) -> None:
        self._step = step
        self._cpu = cpu
        self._stop = threading.Event()
        self._error: BaseException | None = None
        #: how often the step was done
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            if self._cpu is not None:
                os.sched_setaffinity(0, {self._cpu})
            while not self._stop.is_set():
                self._step()
                self.rounds += 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(patience(30))
        if self._thread.is_alive():
            raise TimeoutError("a thread does not return from a system call")
        if self._error is not None:
            raise self._error


class Migrate:
    """A step that migrates all pages to another node than in the step before."""

    def __init__(self, addresses: Sequence[int], pid: int = 0) -> None:
        self._addresses, self._pid = addresses, pid
        self._nodes = numa.nodes()[:2]
        #: how many pages it has migrated
        self.migrated = 0

    def __call__(self) -> None:
        """Migrate them once."""
        self._nodes.reverse()
        nodes = [self._nodes[0]] * len(self._addresses)
        self.migrated += numa.move_pages(self._pid, self._addresses, nodes, numa.MPOL_MF_MOVE_ALL).count(nodes[0])


#: memmove() that does not hold the interpreter lock, unlike that of ctypes: a fault in it may wait for another thread.
_memmove: Final[Any] = ctypes.CDLL(None).memmove
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Words:
    """Words of 8 bytes in memory, which hold zero in the beginning, and each of which counts the writes to it.

    A write by a stale translation goes to a page that nobody can see any more. Then the word has an older number when
    it is read by a fresh one.

    :param addresses: where the words are. They may be changed when the memory moves.
    """

    def __init__(self, addresses: Sequence[int]) -> None:
        self.addresses = addresses
        self._written = [0] * len(addresses)
        self._word = ctypes.c_uint64()

    def step(self) -> None:
        """Check and write each word.

        :raises AssertionError: naming the word whose last write was lost.
        """
        for index in range(len(self.addresses)):
            self.check(index)
            self.write(index)

    def check(self, index: int) -> None:
        """Compare a word with what was last written to it.

        :raises AssertionError: if that write was lost.
        """
        address, expected = self.addresses[index], self._written[index]
        _memmove(ctypes.addressof(self._word), address, 8)
        if self._word.value != expected:
            holds = f"the word of page {index} at {address:#x} holds {self._word.value}, and not {expected}"
            raise AssertionError(f"a write was lost: {holds}")

    def write(self, index: int) -> None:
        """Write the next number to a word."""
        self._written[index] += 1
        self._word.value = self._written[index]
        _memmove(self.addresses[index], ctypes.addressof(self._word), 8)


def rounds(seconds: float, fewest: int) -> Iterator[int]:
    """Count up for some seconds, and at least to ``fewest``."""
    end = time.monotonic() + seconds
    number = 0
    while number < fewest or time.monotonic() < end:
        yield number
        number += 1
