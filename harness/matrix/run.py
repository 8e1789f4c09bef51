# SPDX-License-Identifier: GPL-2.0
"""Runs a matrix: takes what is kept, runs the rest, and tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.debian.apt import Archive
from harness.errors import HarnessError
from harness.host.cache import Cache, Progress
from harness.matrix import job, keys, outcome, table
from harness.matrix.definition import Cell
from harness.matrix.executor import Executor
from harness.matrix.job import Ended, Job
from harness.matrix.outcome import Report, State
from harness.matrix.store import ResultStore

#: pytest's options about what it prints and keeps.
REPORTING = ("-q", "--tb=short", "-p", "no:cacheprovider")


@dataclass(frozen=True)
class Planned:
    """A cell, and what its results depend on."""

    cell: Cell
    #: empty if that could not be found out
    key: str
    identity: Mapping[str, str]
    #: why not
    trouble: str = ""

    @property
    def task(self) -> Job:
        """What an executor runs."""
        cell = self.cell
        return Job(
            name=cell.name,
            python=["-m", "pytest", *cell.arguments, *REPORTING, "-n", str(cell.workers)],
            seconds=cell.minutes * 60,
            content=job.content(),
            resources=list(cell.resources),
        )


def plan(cells: Sequence[Cell], mirror: str, progress: Progress) -> list[Planned]:
    """Find out what the results of each cell depend on.

    :param mirror: base URI of a Debian mirror; empty for the host's own.
    """
    cache = Cache(progress=progress)
    archive = Archive(cache, mirror, progress)
    planned = []
    for cell in cells:
        progress(f"identifying {cell.name}")
        try:
            identity = keys.identity(cell, cache, archive)
            planned.append(Planned(cell, keys.key(identity), identity))
        except HarnessError as error:
            # One kernel that the archive no longer has is no reason not to run the others.
            planned.append(Planned(cell, "", {}, str(error).partition("\n")[0]))
    return planned


class Matrix:
    """One run of a matrix.

    :param planned: its cells.
    :param executor: runs those whose results are not kept.
    :param tell: shows one line for each cell that is done.
    :param progress: shows how far it is.
    """

    def __init__(
        self, planned: Sequence[Planned], executor: Executor, tell: Callable[[str], None], progress: Progress
    ) -> None:
        self._planned = {each.cell.name: each for each in planned}
        self._executor = executor
        self._tell = tell
        self._progress = progress
        self._store = ResultStore()
        self._reports: dict[str, Report] = {}
        #: seconds that each cell took in this run
        self._took: list[float] = []
        self._began = time.monotonic()
        self._running = 0

    @property
    def reports(self) -> list[Report]:
        """What became of the cells so far, in the order of the file."""
        return [
            self._reports.get(name) or outcome.report(each.cell, each.key, State.NOT_RUN)
            for name, each in self._planned.items()
        ]

    def run(self, *, again: bool) -> None:
        """Run all cells. Results are kept as each cell ends, so that it may be interrupted at any time.

        :param again: also those whose results are kept.
        """
        for each in self._planned.values():
            kept = None if again or not each.key else self._store.get(each.key)
            if each.trouble:
                self._done(outcome.report(each.cell, "", State.BROKEN, trouble=each.trouble))
            elif kept is not None:
                self._done(outcome.report(each.cell, each.key, State.KEPT, kept))
            else:
                self._executor.submit(each.task)
                self._running += 1
        for ended in self._executor.as_completed(self._show):
            self._ended(ended)

    def _ended(self, ended: Ended) -> None:
        planned = self._planned[ended["name"]]
        # What a harness error left behind is shown, but the cell runs again next time.
        if not job.unsettled(ended):
            self._store.put(planned.key, planned.identity, ended)
        self._took.append(ended["seconds"])
        self._running -= 1
        self._done(outcome.report(planned.cell, planned.key, State.RAN, ended))

    def _done(self, report: Report) -> None:
        self._reports[report.name] = report
        self._tell(f"[{len(self._reports)}/{len(self._planned)}] {table.cell_line(report)}")

    def _show(self) -> None:
        under_way = self._executor.under_way()
        tests = sum(len(each.tests) for each in self._reports.values())
        tests += sum(each.tests for each in under_way.values())
        surprises = sum(each.surprises for each in self._reports.values())
        surprises += sum(each.failures for each in under_way.values())
        now = ", ".join(f"{name} ({each.tests})" if each.tests else name for name, each in under_way.items())
        self._progress(
            f"{len(self._reports)} of {table.plural(len(self._planned), 'cell')}, {table.plural(tests, 'test')}, "
            f"{table.plural(surprises, 'surprise')}, "
            f"{self._left()}; now {now or 'nothing'}"
        )

    def _left(self) -> str:
        """How long it may still take, judging by the cells that this run has done."""
        if not self._took:
            return f"{table.clock(time.monotonic() - self._began)} so far"
        each = sum(self._took) / len(self._took)
        rounds = -(-self._running // self._executor.slots)
        return f"about {table.clock(each * rounds)} left"
