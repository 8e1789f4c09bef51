# SPDX-License-Identifier: GPL-2.0
"""Cells and their results for tests of the matrix that boot nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from harness.matrix import outcome
from harness.matrix.definition import Cell
from harness.matrix.executor import Tally
from harness.matrix.job import Ended, Job
from harness.matrix.outcome import Report, State
from harness.matrix.run import Planned
from harness.report import record
from harness.report.record import Item, KernelFacts

CELL = Cell(group="debian", kernel="debian:6.12", arch="x86_64")


def line(test: str, word: str = "passed", *, failed: bool | None = None, message: str = "", **more: object) -> Item:
    """The line of one test in ``guest_tests/test_a.py``, unless ``test`` names a file.

    :param failed: as its outcome says, if it is None.
    """
    verdict = {"passed": "PASS", "skipped": "SKIP", "MISS": "MISS"}.get(word, "FAIL")
    failed = word in ("failed", "error", "MISS") if failed is None else failed
    name = test if "::" in test else f"guest_tests/test_a.py::{test}"
    given = {"label": "k", "test": name, "outcome": word, "verdict": verdict, "failed": failed, "message": message}
    return Item(**{**given, **more})  # type: ignore[arg-type]


def recorded(*items: Item, status: int | None = None) -> str:
    """The text of a record.

    :param status: pytest's exit status, as the tests say if it is None.
    """
    facts = KernelFacts(label="k", spec="debian:6.12", release="6.12.1", arch="x86_64", accelerator="tcg")
    head = record.header_line(record.header(["pytest"], 1000.0, [facts]))
    status = int(any(item.failed for item in items)) if status is None else status
    return head + "".join(map(record.item_line, items)) + record.end_line(status)


def ended(name: str, *items: Item, trouble: str = "", reruns: tuple[str, ...] = ()) -> Ended:
    """A cell that has run these tests."""
    return Ended(
        name=name,
        status=None if trouble else int(any(item.failed for item in items)),
        trouble=trouble,
        late=False,
        seconds=61.0,
        results=recorded(*items),
        output="the last line",
        host="here",
        reruns=list(reruns),
    )


def report(cell: Cell, *items: Item, trouble: str = "", reruns: tuple[str, ...] = ()) -> Report:
    """What became of a cell."""
    return outcome.report(cell, "key", State.RAN, ended(cell.name, *items, trouble=trouble, reruns=reruns))


def planned(cell: Cell, key: str) -> Planned:
    """A cell under a key."""
    return Planned(cell, key, {"kernel": cell.kernel})


class Scripted:
    """An executor that runs nothing: it says what became of each job as a test wants it.

    :param answer: gives the end of a job.
    """

    slots = 1

    def __init__(self, answer: Callable[[Job], Ended]) -> None:
        self._answer = answer
        self._pending: list[Job] = []
        #: the names of the jobs that were submitted
        self.submitted: list[str] = []

    def submit(self, task: Job) -> None:
        """Remember a job."""
        self._pending.append(task)
        self.submitted.append(task["name"])

    def as_completed(self, tick: Callable[[], None]) -> Iterator[Ended]:
        """Say what became of the jobs."""
        while self._pending:
            tick()
            yield self._answer(self._pending.pop(0))

    def under_way(self) -> Mapping[str, Tally]:
        """The job whose turn it is."""
        return {self._pending[0]["name"]: Tally(3, 1)} if self._pending else {}

    def cancel(self) -> None:
        """Forget what has not run."""
        self._pending.clear()


def script(path: Path, body: str) -> Job:
    """A job that runs a Python program, which finds the path of its record in ``RECORD``."""
    path.write_text(f"import sys\nRECORD = sys.argv[-1].removeprefix('--results=')\n{body}\n")
    return Job(name=path.stem, python=[str(path)], seconds=600.0, content="", resources=[])
