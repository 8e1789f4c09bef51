# SPDX-License-Identifier: GPL-2.0
"""Threads that repeat a step while a test does something else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from guest_tests.mm.waiting import patience


class Busy:
    """A thread that repeats a step until its ``with`` block ends. An error of the step is raised at the block's end.

    System calls release the interpreter lock. With two CPUs both threads are in the kernel at the same time.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._stop = threading.Event()
        self._error: BaseException | None = None
        #: how often the step was done
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
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


def rounds(seconds: float, fewest: int) -> Iterator[int]:
    """Count up for some seconds, and at least to ``fewest``."""
    end = time.monotonic() + seconds
    number = 0
    while number < fewest or time.monotonic() < end:
        yield number
        number += 1
