# SPDX-License-Identifier: GPL-2.0
"""Runs jobs: on this machine, one after the other or some side by side. ``cluster`` runs them on others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from harness.matrix import job
from harness.matrix.job import Ended, Job

#: Seconds between two looks at what is under way.
TICK = 0.2


@dataclass(frozen=True)
class Tally:
    """What a job has done so far."""

    tests: int = 0
    failures: int = 0


class Executor(Protocol):
    """What a matrix needs to run its jobs."""

    #: how many jobs run at the same time
    slots: int

    def submit(self, task: Job) -> None:
        """Run a job when its turn comes."""

    def as_completed(self, tick: Callable[[], None]) -> Iterator[Ended]:
        """What was submitted, as it ends.

        :param tick: called a few times a second.
        """

    def under_way(self) -> Mapping[str, Tally]:
        """The jobs that run now, by name, as far as that is known."""

    def cancel(self) -> None:
        """End everything within a second. Harmless if nothing runs."""


class LocalExecutor:
    """Runs jobs on this machine.

    :param slots: how many at the same time.
    """

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        # The threads live as long as the executor: a child process ends with the thread that started it.
        self._pool = ThreadPoolExecutor(slots, "cell")
        self._pending: set[Future[Ended]] = set()
        self._stopped = threading.Event()
        self._records: dict[str, _Watched] = {}

    def submit(self, task: Job) -> None:
        """See :class:`Executor`."""
        self._pending.add(self._pool.submit(self._run, task))

    def as_completed(self, tick: Callable[[], None]) -> Iterator[Ended]:
        """See :class:`Executor`."""
        while self._pending:
            done, self._pending = wait(self._pending, TICK, FIRST_COMPLETED)
            for future in done:
                yield future.result()
            tick()

    def under_way(self) -> Mapping[str, Tally]:
        """See :class:`Executor`."""
        return {name: watched.look() for name, watched in list(self._records.items())}

    def cancel(self) -> None:
        """See :class:`Executor`."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, task: Job) -> Ended:
        def watch(path: Path) -> None:
            self._records[task["name"]] = _Watched(path)

        try:
            return job.run(task, self._stopped.is_set, watch)
        finally:
            self._records.pop(task["name"], None)


class _Watched:
    """Counts the lines of a record while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._tally = Tally()

    def look(self) -> Tally:
        """What has been recorded so far."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return self._tally  # not there yet, or not any more
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        tests = [line for line in whole.splitlines() if b'"test": ' in line]
        failures = sum(b'"failed": true' in line for line in tests)
        self._tally = Tally(self._tally.tests + len(tests), self._tally.failures + failures)
        return self._tally
