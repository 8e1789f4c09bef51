# SPDX-License-Identifier: GPL-2.0
"""Looks for the first changed one in a row of versions, some of which may have no verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.bisect.step import Step
from harness.errors import HarnessError
from harness.report.state import State


class WrongBaseline(HarnessError):
    """The ends of a range are not as a bisect needs them: its first kernel has changed already, or its last has not."""


@dataclass(frozen=True)
class Direction:
    """What is looked for: the first bad kernel, or the first one that is good again."""

    #: what the older end is
    old: State = State.GOOD

    @property
    def new(self) -> State:
        """What the newer end is."""
        return State.BAD if self.old is State.GOOD else State.GOOD

    @property
    def word(self) -> str:
        """What the first changed one is called."""
        return "bad" if self.new is State.BAD else "fixed"

    def check_newer(self, step: Step) -> None:
        """Check the newer end.

        :raises WrongBaseline: if it is as the older end should be.
        """
        if step.state is self.old:
            hint = "give an older one, or leave out --fixed" if self.old is State.BAD else "give a newer one"
            other = "" if self.old is State.BAD else "; --fixed looks for the first that is good again"
            raise WrongBaseline(f"the newer end {step.name} is {self.old}, so no change can be found: {hint}{other}")

    def check_older(self, step: Step) -> None:
        """Check the older end.

        :raises WrongBaseline: if it is as the newer end should be.
        """
        if step.state is self.new:
            raise WrongBaseline(
                f"the older end {step.name} is {self.new} already, so no change can be found: give an older one"
            )


@dataclass(frozen=True)
class Found:
    """Where the change is."""

    #: the last one as it was before
    before: Step
    #: the first one that has changed, as far as they have verdicts
    after: Step
    #: those between the two, which have no verdict; the change may be in one of them
    between: tuple[str, ...] = ()


#: Asks one version; also told how many more there will be to ask after it, about.
Ask = Callable[[str, int], Step]


def search(versions: Sequence[str], ask: Ask, direction: Direction) -> Found:
    """Find the change in a row of versions. An end without a verdict is replaced by its neighbour.

    :param versions: the oldest first.
    :raises WrongBaseline: if an end is not as it should be, or fewer than two have a verdict.
    """
    silent: set[int] = set()
    low, high = 0, len(versions) - 1

    def end(places: Sequence[int], other_ends: int) -> tuple[int, Step]:
        for place in places:
            step = ask(versions[place], other_ends + _steps(high - low - 1))
            if step.state is not State.NONE:
                return place, step
            silent.add(place)
        raise WrongBaseline("too few kernels of the range have a verdict: see the reasons above, or give a wider range")

    high, after = end(range(len(versions))[::-1], 1)
    direction.check_newer(after)
    low, before = end(range(high), 0)
    direction.check_older(before)
    while places := [place for place in range(low + 1, high) if place not in silent]:
        place = min(places, key=lambda each: abs(2 * each - low - high))
        step = ask(versions[place], _steps(len(places)) - 1)
        if step.state is State.NONE:
            silent.add(place)
        elif step.state is direction.new:
            high, after = place, step
        else:
            low, before = place, step
    return Found(before, after, tuple(versions[low + 1 : high]))


def _steps(candidates: int) -> int:
    """How many questions it takes to find one of some candidates, or that it is none of them."""
    return max(0, candidates).bit_length()
