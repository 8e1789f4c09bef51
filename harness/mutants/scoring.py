# SPDX-License-Identifier: GPL-2.0
"""Runs the tests against each mutant of a kernel until one notices it.

Each run is a pytest process of its own, as in a matrix. Guests are clones of one template, and a clone activates its
mutant before its first test, so no mutant costs a boot.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from harness.build.mutants import Mutant
from harness.build.schemata import RECORD
from harness.errors import UsageError
from harness.host.cache import Progress
from harness.kernels.built import BuildSpec
from harness.matrix import job
from harness.matrix.definition import Cell
from harness.matrix.executor import Executor
from harness.matrix.job import Ended, Job
from harness.matrix.run import REPORTING
from harness.mutants import baseline
from harness.mutants.baseline import Baseline, pytest_name
from harness.mutants.order import History, ordered
from harness.mutants.outcome import How, Kill, Result, State
from harness.report.record import Item
from harness.report.results import AUDIT_SECTION, Outcome

#: The tests that run the explorer's programs.
EXPLORED = "guest_tests/test_explored.py"

#: How many of its programs a mutant has to survive that no test has noticed.
PROGRAMS = 600

#: Has kernel memory audited after each test that moved memory.
AUDITING = "--audit=end"

#: How an audit's report begins the line of an error.
_AUDIT_ERROR = re.compile(r"^error: ", re.MULTILINE)

#: Minutes after which a run of tests is ended.
_MINUTES = 30.0


@dataclass
class _Trial:
    """One mutant, and what is still to be run against it."""

    mutant: Mutant
    #: lists of pytest arguments, one for each run
    runs: deque[list[str]]
    reaching: int
    seconds: float = 0.0
    ran: int = 0
    kills: list[Kill] = field(default_factory=list)
    #: whether the first of the runs is run for the second time
    again: bool = False
    #: why a run could not be judged
    trouble: str = ""


class Scoring:
    """The mutants of one kernel.

    :param cell: names the kernel.
    :param mutants: those to try.
    :param before: the tests without any mutant.
    :param executor: runs pytest.
    :param everything: run all tests against each mutant, and not only until the first kill.
    :param audit: audit kernel memory in each run.
    :param tell: is given each result.
    :param progress: shows how far it is.
    """

    def __init__(
        self,
        cell: Cell,
        mutants: Sequence[Mutant],
        before: Baseline,
        executor: Executor,
        history: History,
        *,
        everything: bool,
        audit: bool,
        tell: Callable[[Result], None],
        progress: Progress,
    ) -> None:
        self._cell = cell
        self._before = before
        self._executor = executor
        self._history = history
        self._everything = everything
        self._auditing = [AUDITING] if audit else []
        self._tell = tell
        self._progress = progress
        self._waiting = deque(sorted(mutants, key=self._expected))
        self._running: dict[str, _Trial] = {}
        self._content = job.content()
        self._results = {each.name: Result(name=each.name, group=each.group, state=State.NOT_RUN) for each in mutants}

    @property
    def results(self) -> list[Result]:
        """What became of the mutants so far."""
        return list(self._results.values())

    def run(self) -> None:
        """Try all mutants."""
        for _ in range(self._executor.slots):
            self._begin()
        for ended in self._executor.as_completed(self._show):
            trial = self._running[ended["name"]]
            self._judge(trial, ended)
            if trial.runs and (self._everything or not trial.kills):
                self._submit(trial)
            else:
                del self._running[trial.mutant.name]
                self._finish(trial)
                self._begin()

    def _expected(self, mutant: Mutant) -> tuple[bool, bool]:
        """Sorts mutants that are killed soon before those that only all tests, or only the explorer, may notice."""
        return not self._history.killers(mutant.name), not self._before.reaching(mutant.name)

    def _begin(self) -> None:
        if not self._waiting:
            return
        mutant = self._waiting.popleft()
        tests = self._before.reaching(mutant.name)
        order = ordered(tests, self._history, mutant.name)
        former = len([test for test in self._history.killers(mutant.name) if test in order])
        split = former if former and not self._everything else len(order)
        runs = [self._chosen(each) for each in (order[:split], order[split:]) if each]
        runs.append([f"--explore={PROGRAMS}", EXPLORED])
        trial = _Trial(mutant, deque(runs), len(tests))
        self._running[mutant.name] = trial
        self._submit(trial)

    def _chosen(self, tests: Sequence[str]) -> list[str]:
        stop = [] if self._everything else ["-x"]
        return [*stop, *(pytest_name(test, self._before.label) for test in tests)]

    def _submit(self, trial: _Trial) -> None:
        mutant = trial.mutant
        kernel = [f"--kernel={self._cell.kernel}", f"--arch={self._cell.arch}", f"--mutant={mutant.name}"]
        if mutant.cpus > 1:
            kernel.append(f"--guest-cpus={mutant.cpus}")
        self._executor.submit(
            Job(
                name=mutant.name,
                python=["-m", "pytest", *REPORTING, *kernel, *self._auditing, *trial.runs[0]],
                seconds=_MINUTES * 60,
                content=self._content,
                resources=[],
            )
        )

    def _judge(self, trial: _Trial, ended: Ended) -> None:
        """Look at one run: count its kills, or have it run once more."""
        trial.seconds += ended["seconds"]
        recording = job.recording(ended)
        items = list(recording.items) if recording else []
        trial.ran += len(items)
        killed, odd = [], []
        for item in items:
            if item.failed:
                kill = self._kill(item, trial.mutant.name)
                killed += [kill] if kill else []
                odd += [] if kill else [f"{item.test}: {item.message}"]
        trial.kills += killed
        if killed and not self._everything:
            trial.runs.clear()
        elif (why := ended["trouble"] or " ".join(odd[:1])) and not trial.again:
            trial.again = True
        else:
            trial.again = False
            trial.trouble = trial.trouble or why
            trial.runs.popleft()

    def _kill(self, item: Item, mutant: str) -> Kill | None:
        """The kill that a failed test is; None if the harness failed, or if the mutant was not reached."""
        if item.outcome == Outcome.MISS:
            return None
        how = _how(item)
        before = self._before.passed.get(item.test)
        reached = baseline.reached(item)
        # A guest that was lost cannot say what the test reached.
        expected = how is How.LOST and (before is None or mutant in before.reached)
        if mutant not in reached and not expected:
            return None
        return Kill(test=item.test, how=how, message=item.message, audited=_audited(item))

    def _finish(self, trial: _Trial) -> None:
        if trial.kills:
            state = State.KILLED
            for each in reversed(trial.kills):
                self._history.add(trial.mutant.name, each.test)
        elif trial.trouble:
            state = State.UNDECIDED
        else:
            state = State.EQUIVALENT if trial.mutant.equivalent else State.SURVIVED
        result = replace(
            self._results[trial.mutant.name],
            state=state,
            kills=tuple(trial.kills),
            seconds=round(trial.seconds, 1),
            reaching=trial.reaching,
            ran=trial.ran,
            trouble="" if trial.kills else trial.trouble,
        )
        self._results[trial.mutant.name] = result
        self._tell(result)

    def _show(self) -> None:
        done = [each for each in self._results.values() if each.state is not State.NOT_RUN]
        survived = sum(each.state is State.SURVIVED for each in done)
        under_way = self._executor.under_way()
        now = ", ".join(f"{name} ({under_way[name].tests if name in under_way else 0})" for name in self._running)
        self._progress(f"{len(done)} of {len(self._results)} mutants, {survived} survived; now {now or 'nothing'}")


def _how(item: Item) -> How:
    if item.message.startswith("guest lost"):
        return How.LOST
    if item.message.startswith(("the kernel complained", "the kernel tainted")):
        return How.CONSOLE
    if item.message.startswith("the audit"):
        return How.AUDIT
    return How.EXPLORER if item.test.startswith(EXPLORED) else How.TEST


def _audited(item: Item) -> bool:
    """Whether the audit of a test reported errors."""
    return any(title == AUDIT_SECTION and _AUDIT_ERROR.search(text) for title, text in item.sections)


def cell_of(spec: BuildSpec, tests: Sequence[str], *, audit: bool) -> Cell:
    """The run without any mutant, as the cell of a matrix.

    :param tests: ids without a kernel's label; empty for all tests.
    :param audit: audit kernel memory.
    """
    chosen = [pytest_name(test, spec.label).removeprefix("guest_tests/") for test in tests]
    return Cell(
        group="mutants",
        kernel=spec.text,
        arch=str(spec.arch),
        options=" ".join((f"--mutant={RECORD}", *([AUDITING] if audit else ()))),
        tests=tuple(chosen),
        minutes=60.0,
    )


def check(ended: Ended) -> Baseline:
    """The baseline that a run has shown.

    :raises UsageError: if it is not complete, or a test failed.
    """
    if ended["trouble"]:
        raise UsageError(f"the tests could not be run without mutants: {ended['trouble']}")
    recording = job.recording(ended)
    assert recording is not None  # or there would be trouble
    return baseline.read(recording)
