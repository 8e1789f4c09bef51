# SPDX-License-Identifier: GPL-2.0
"""Runs the same programs on two kernels and compares what a user can see: refusals, and mappings at the end.

Only operations that both kernels have are made. The contents of pages need no comparison, because each kernel is
checked against the model.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from harness.deadline import Deadline
from harness.explore.runner import Outcome, Runner
from harness.programs.generate import Generator
from harness.programs.language import Program
from harness.programs.shrink import shrink

#: programs of one order
BATCH: Final = 100
#: Of differences that look alike before they are shrunk, how many are shrunk. Others are only counted.
_SHRUNK: Final = 3
#: how many candidates of one step of shrinking are sent at once
_CANDIDATES: Final = 40


@dataclass
class Difference:
    """A program that two kernels treat differently."""

    program: Program
    outcomes: tuple[Outcome, Outcome]
    #: how many programs showed it
    times: int = 1

    @property
    def shape(self) -> tuple[str, ...]:
        """The same for equal differences: the operations, and what differs."""
        return (*(each.kind for each in self.program), self.text)

    @property
    def text(self) -> str:
        """What differs, in a sentence."""
        first, second = self.outcomes
        for number, (one, other) in enumerate(zip(first.errors, second.errors, strict=False)):
            if one != other:
                return f"operation {number + 1} {_ended(one)} on the first kernel and {_ended(other)} on the second"
        return f"the mappings are {first.mappings} on the first kernel and {second.mappings} on the second"


def _ended(error: int) -> str:
    return "succeeds" if error == 0 else "is skipped" if error == -1 else f"fails ({os.strerror(error)})"


def _alike(program: Program, one: Outcome, other: Outcome) -> tuple[str, int, int]:
    """The first operation that ends differently, and how; equal for differences that look alike."""
    for operation, first, second in zip(program, one.errors, other.errors, strict=False):
        if first != second:
            return operation.kind, first, second
    return "mappings", 0, 0


class Comparison:
    """Two kernels side by side.

    :param tell: is told after each row: programs, and differences.
    :param found: is told of each new difference.
    """

    def __init__(
        self,
        runners: tuple[Runner, Runner],
        seed: int,
        tell: Callable[[int, int], None],
        found: Callable[[Difference], None],
    ) -> None:
        self._runners = runners
        first, second = runners
        self._generator = Generator(seed, [kind for kind in first.kinds if kind in second.kinds])
        self._tell = tell
        self._found = found
        self._alike: Counter[tuple[str, int, int]] = Counter()
        self.differences: dict[tuple[str, ...], Difference] = {}
        self.programs = 0
        #: programs that the kernels treated differently
        self.different = 0
        #: programs that an oracle complained about, which are for an exploration of one kernel
        self.failed = 0
        self.seconds = 0.0

    def run(self, deadline: Deadline) -> None:
        """Compare until the deadline."""
        began = time.monotonic()
        while not deadline.passed:
            programs = [self._generator.next().program for _ in range(BATCH)]
            for program, outcomes in self._outcomes(programs):
                if outcomes[0] != outcomes[1]:
                    self._look_into(program, outcomes)
            self.programs += len(programs)
            self.seconds = time.monotonic() - began
            self._tell(self.programs, len(self.differences))

    def _outcomes(self, programs: Sequence[Program]) -> list[tuple[Program, tuple[Outcome, Outcome]]]:
        """What both kernels made of programs, as far as neither failed."""
        found: list[list[Outcome | None]] = []
        for runner in self._runners:
            seen: list[Outcome | None] = []
            while len(seen) < len(programs):
                batch = runner.run(programs[len(seen) :], outcomes=True)
                passed = batch.done if batch.failure is None else batch.done - 1
                seen += batch.outcomes[:passed]
                if batch.failure is not None:
                    seen.append(None)
                    self.failed += 1
            found.append(seen)
        return [
            (program, (one, other))
            for program, one, other in zip(programs, *found, strict=False)
            if one is not None and other is not None
        ]

    def _look_into(self, program: Program, outcomes: tuple[Outcome, Outcome]) -> None:
        self.different += 1
        alike = _alike(program, *outcomes)
        self._alike[alike] += 1
        if self._alike[alike] > _SHRUNK:
            return
        small = shrink(program, self._first_different)
        again = self._outcomes([small])
        difference = Difference(small, again[0][1] if again else outcomes)
        known = self.differences.get(difference.shape)
        if known is not None:
            known.times += 1
            return
        self.differences[difference.shape] = difference
        self._found(difference)

    def _first_different(self, candidates: Sequence[Program]) -> int | None:
        for start in range(0, len(candidates), _CANDIDATES):
            some = candidates[start : start + _CANDIDATES]
            for program, (one, other) in self._outcomes(some):
                if one != other:
                    return start + some.index(program)
        return None
