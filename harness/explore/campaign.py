# SPDX-License-Identifier: GPL-2.0
"""Explores one kernel: makes programs, runs them, and confirms and shrinks those that fail."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final

from harness.deadline import Deadline
from harness.explore.corpus import Best
from harness.explore.plan import Plan, plan
from harness.explore.runner import Batch, Failure, Runner
from harness.judging import findings
from harness.programs.generate import Generator, Made, remade
from harness.programs.language import Kind, Program
from harness.programs.shrink import shrink

#: Programs of one order. The guest forks a process for each order, which takes 0.2 s under emulation.
BATCH: Final = 800
#: The same in races, where a batch has a rival, and a program takes several times as long.
RACE_BATCH: Final = 100
#: how many plans may have run behind the one that was announced last
UNANNOUNCED: Final = 9
#: how often a program races before it is said to pass
RACES: Final = 30
#: The rival turns ksmd on and off, for which two of these would wait. It moves pages between nodes, as a walk does.
#: Pages that it has had merged lose the mark of a userfaultfd, and which ones these are is not known.
_NOT_IN_RACES: Final = frozenset({Kind.SCAN, Kind.UNMERGE_ALL, Kind.WALK, Kind.UFFD_PROTECT, Kind.UFFD_UNPROTECT})
#: how many candidates of one step of shrinking are sent at once
_CANDIDATES: Final = 40
#: With audits, one plan in so many is run with the model instead, because plans are not audited.
_AUDITED: Final = 20


@dataclass
class Found:
    """A failure with the smallest program that shows it."""

    program: Program
    failure: Failure
    #: how each operation of it ends
    errors: list[int]
    #: the kernel's release
    release: str
    #: how many programs failed in this way
    times: int = 1
    #: seconds from the beginning until it was met
    after: float = 0.0
    #: the name of the known finding that it shows; empty if it is new
    known: str = ""
    #: in a race: in which run it failed when it was last asked; 0 if there is no race
    runs: int = 0

    @property
    def shape(self) -> tuple[str, ...]:
        """The check that noticed and the kinds of the operations: the same for equal failures."""
        return (self.failure.oracle, *(each.kind for each in self.program))


@dataclass
class Progress:
    """How far a campaign is."""

    programs: int = 0
    operations: int = 0
    #: pages seen to move in forced walks
    walked: int = 0
    situations: int = 0
    #: programs that were run by their plans alone
    planned: int = 0
    #: programs that the walks could say nothing of
    unable: int = 0
    #: programs that failed once, and not again
    unconfirmed: int = 0
    seconds: float = 0.0
    found: dict[tuple[str, ...], Found] = field(default_factory=dict)
    #: how often each kind ended with each errno, in the programs that were run with the model
    counts: Counter[tuple[Kind, int]] = field(default_factory=Counter)

    @property
    def failures(self) -> int:
        """How many programs failed, repeatably or not."""
        return self.unconfirmed + sum(each.times for each in self.found.values())

    @property
    def new(self) -> list[Found]:
        """What shows no known finding."""
        return [each for each in self.found.values() if not each.known]

    @property
    def rate(self) -> float:
        """Programs a minute."""
        return self.programs / self.seconds * 60 if self.seconds else 0.0


class Campaign:
    """Explores the kernel of one runner.

    :param seed: equal seeds make equal programs on kernels that have the same operations.
    :param release: the kernel's release, for what is found.
    :param arch: its architecture.
    :param tell: is told of the progress after each batch.
    :param found: is told of each new failure.
    :param earlier: programs of earlier explorations, which run first.
    :param races: have another process walk to the memory of each program while it runs. A failure need not come again
        then, so that it is confirmed and shrunk by running a program many times.
    """

    def __init__(
        self,
        runner: Runner,
        seed: int,
        release: str,
        arch: str,
        tell: Callable[[Progress], None],
        found: Callable[[Found], None],
        *,
        earlier: Sequence[Program] = (),
        races: bool = False,
    ) -> None:
        self._runner = runner
        self._earlier = earlier
        #: the programs for a later exploration
        self.best = Best()
        self._seed, self._races = seed, races
        self._release, self._arch = release, arch
        self._tell = tell
        self._found = found
        kinds = [each for each in runner.kinds if not (races and each in _NOT_IN_RACES)]
        self._generator = Generator(seed, kinds)
        self._began = time.monotonic()
        self.progress = Progress()

    def run(self, deadline: Deadline, programs: int | None = None) -> None:
        """Explore until the deadline, or until that many programs have run."""
        size = RACE_BATCH if self._races else BATCH
        earlier = iter(self._earlier)
        with ThreadPoolExecutor(1, "generate") as pool:
            ahead = pool.submit(self._make, earlier, size)
            while not deadline.passed and (programs is None or self.progress.programs < programs):
                made = ahead.result()
                ahead = pool.submit(self._make, earlier, size)
                self._batch(*made)
                self.progress.seconds = time.monotonic() - self._began
                self.progress.situations = len(self.best.seen)
                self._tell(self.progress)

    def _make(self, earlier: Iterator[Program], count: int) -> tuple[list[tuple[Made, Plan]], list[Program]]:
        """Programs with plans, and programs that have none.

        :param earlier: programs that are taken before new ones are made.
        """
        planned, others = [], []
        for number in range(count):
            known = next(earlier, None)
            made = self._generator.next() if known is None else remade(known)
            self.best.add(made)
            modelled = self._races or (self._runner.audits_programs and number % _AUDITED == 0)
            worked_out = None if modelled else plan(made.program)
            if worked_out is None:
                others.append(made.program)
            else:
                planned.append((made, worked_out))
        return planned, others

    def _batch(self, planned: list[tuple[Made, Plan]], others: list[Program]) -> None:
        again: list[Program] = []
        rest = planned
        ended = 0
        while rest:
            batch = self._runner.run_plans([each for _, each in rest])
            self.progress.walked += batch.walked
            again += [rest[number][0].program for number in batch.untrue]
            if batch.failure is None:
                break
            # The guest or the process ended in the middle, so that nothing is known of the plans before, nor of those
            # that a guest does not announce one by one.
            ended += 1
            done = batch.done + UNANNOUNCED
            again += [made.program for made, _ in rest[:done]]
            rest = rest[done:]
        self.progress.planned += len(planned) - len(again)
        known = self.progress.failures
        self._programs(others + again)
        if ended and self.progress.failures == known:
            self.progress.unconfirmed += ended
        self.progress.programs += len(planned) + len(others)
        self.progress.operations += sum(len(made.program) for made, _ in planned) + sum(map(len, others))

    def _programs(self, programs: list[Program]) -> None:
        """Run programs with the model, and look into each that fails."""
        rest = programs
        while rest:
            batch = self._run(rest)
            self.progress.walked += batch.walked
            self.progress.unable += batch.unable
            self.progress.counts += batch.counts
            if batch.failure is None:
                return
            if batch.failure.oracle == "console":
                self._search(rest[: batch.done])
            else:
                self._look_into(rest[batch.done - 1])
            rest = rest[batch.done :]

    def _search(self, programs: list[Program]) -> None:
        """Look for the program after which the kernel complained, in halves."""
        if len(programs) == 1:
            self._look_into(programs[0])
            return
        for half in (programs[: len(programs) // 2], programs[len(programs) // 2 :]):
            self._runner.renew()
            if self._run(half).failure is not None:
                self._search(half)
                return
        self.progress.unconfirmed += 1

    # --- failures ----------------------------------------------------------------------------------------------------

    def _look_into(self, program: Program) -> None:
        """Confirm a failure in a fresh guest, shrink it, and tell it if it is new."""
        after = time.monotonic() - self._began
        confirmed = self.confirm(program)
        if confirmed is None:
            self.progress.unconfirmed += 1
            return
        oracle = confirmed[0].oracle

        def first_failing(candidates: Sequence[Program]) -> int | None:
            return self._first_failing(candidates, oracle)

        small = shrink(program, first_failing)
        # Without the operations that are skipped, if it fails all the same.
        failure, batch = self.confirm(small) or confirmed
        done = tuple(each for each, error in zip(small, batch.errors, strict=False) if error != -1)
        if len(done) < len(small) and len(batch.errors) == len(small):
            without = self.confirm(done)
            if without is not None:
                small, (failure, batch) = done, without
        runs = batch.done if self._races else 0
        found = Found(small, failure, batch.errors, self._release, after=after, runs=runs)
        finding = findings.shown_by(oracle, found.shape[1:], self._release, self._arch)
        found.known = finding.name if finding else ""
        known = self.progress.found.get(found.shape)
        if known is not None:
            known.times += 1
            return
        self.progress.found[found.shape] = found
        self._found(found)

    def confirm(self, program: Program) -> tuple[Failure, Batch] | None:
        """Run one program thoroughly in a fresh guest."""
        self._runner.renew()
        batch = self._run([program], thorough=True)
        return None if batch.failure is None else (batch.failure, batch)

    def _first_failing(self, candidates: Sequence[Program], oracle: str) -> int | None:
        """The first program that fails with the same oracle."""
        passed = 0
        while passed < len(candidates):
            # The last program of an order is audited.
            some = candidates[passed : passed + (1 if oracle == "audit" else _CANDIDATES)]
            batch = self._run(some, thorough=True)
            if batch.failure is None:
                passed += len(some)
                continue
            at = passed + (batch.done - 1) // self._times
            if batch.failure.oracle == oracle:
                return at
            passed = at + 1
        return None

    @property
    def _times(self) -> int:
        """How often a program is run before it is said to pass."""
        return RACES if self._races else 1

    def _run(self, programs: Sequence[Program], *, thorough: bool = False) -> Batch:
        """Run programs; thoroughly means each of them as often as it takes."""
        rival = self._seed if self._races else None
        times = self._times if thorough else 1
        return self._runner.run([each for each in programs for _ in range(times)], thorough=thorough, rival=rival)
