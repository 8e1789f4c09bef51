# SPDX-License-Identifier: GPL-2.0
"""Makes programs from a seed, and prefers operations in situations that were seen seldom.

While a program is made, the model runs along and takes each operation to succeed. So each operation finds memory that
it is about. Hypothesis was measured for this work, and is too slow for it: see DECISIONS.md.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, Generic, TypeVar

from harness.programs import effects, operands
from harness.programs.language import (
    COUNTED,
    KINDS,
    MAPPING,
    MOST_PAGES,
    PARTS,
    PLACED,
    PLACES,
    PROCESSES,
    SLOTS,
    TOS,
    Kind,
    Operation,
    Part,
    Program,
    To,
    decoded,
    to_wire,
)
from harness.programs.memory import Machine, Step
from harness.programs.situations import Situation, situation

#: operations of a program
LENGTH: Final = 10
#: how many operations are drawn for each that is taken
_CANDIDATES: Final = 3
#: Of the operations that will probably be refused, the share that is not taken. A program that is refused something
#: cannot run by its plan, which takes three times as long.
_SPARED: Final = 0.93
#: how often a draw may meet nothing before the program ends early
_DRAWS: Final = 12


@dataclass(frozen=True)
class Theme:
    """Which kinds of operations a program is made of."""

    name: str
    #: how often programs have it, relative to the others
    share: float
    #: kinds besides those of every program, by weight
    kinds: dict[Kind, float]


#: kinds that every program may have, by weight; these are cheap
_BASIC: Final[dict[Kind, float]] = {
    Kind.MAP: 14,
    Kind.MAP_SHARED: 1,
    Kind.UNMAP: 4,
    Kind.WRITE: 14,
    Kind.READ: 3,
    Kind.PROTECT_NONE: 0.7,
    Kind.PROTECT_READ: 2,
    Kind.PROTECT_WRITE: 2,
    Kind.MOVE: 24,
    Kind.MOVE_DONTUNMAP: 4,
    Kind.MOVE_RELOCATE: 6,
    Kind.MOVE_MUST_RELOCATE: 6,
    Kind.MOVE_GROW: 2,
    Kind.MOVE_SHRINK: 2,
    Kind.GROW: 3,
    Kind.SHRINK: 2,
    Kind.DONTNEED: 2,
    Kind.FREE: 1,
    Kind.HUGEPAGE: 3,  # or hardly any memory has large folios
    Kind.NOHUGEPAGE: 1,
    Kind.COLD: 0.5,
    Kind.GUARD: 1,
    Kind.UNGUARD: 1,
    Kind.POPULATE: 1,
    Kind.LOCK: 1,
    Kind.UNLOCK: 1,
    Kind.WRITE_SAME: 1,
    Kind.WALK: 2,
    Kind.POKE: 1,
}
_FORKING: Final[dict[Kind, float]] = {
    Kind.FORK: 9,
    Kind.EXIT: 2,
    Kind.DONTFORK: 2,
    Kind.DOFORK: 1,
    Kind.WIPEONFORK: 2,
    Kind.KEEPONFORK: 1,
}
_MERGING: Final[dict[Kind, float]] = {
    Kind.MERGEABLE: 14,
    Kind.UNMERGEABLE: 2,
    Kind.WRITE_SAME: 16,
    Kind.SCAN: 9,
    Kind.UNMERGE_ALL: 1,
}
_SWAPPING: Final[dict[Kind, float]] = {
    Kind.PAGEOUT: 8,
    Kind.RECLAIM: 2,
    Kind.SWAPOFF: 2,
    Kind.HOLD: 4,
    Kind.RELEASE: 2,
    Kind.SOFT_OFFLINE: 1,
}

_MAPPINGS: Final[dict[Kind, float]] = {
    Kind.MAP_FILE: 7,
    Kind.BIND: 3,
    Kind.UNBIND: 2,
    Kind.NAME: 3,
    Kind.UNNAME: 2,
    Kind.DONTFORK: 1,
    Kind.DOFORK: 1,
}
_USERFAULTS: Final[dict[Kind, float]] = {
    Kind.UFFD_REGISTER: 16,
    Kind.UFFD_UNREGISTER: 1,
    Kind.UFFD_PROTECT: 50,  # makes sense only where all of the memory is registered
    Kind.UFFD_UNPROTECT: 10,
    Kind.UFFD_MOVE: 50,  # makes sense only if there is registered memory at the place
}

_UNDO: Final[dict[Kind, float]] = {Kind.MOVE_UNDONE: 24, Kind.MOVE_FALLBACK: 16}

#: Forks, scans and swap take as long as several whole programs under emulation, so that few programs have them.
#: Programs with a userfaultfd or an undo are run with the model, which takes three times as long.
THEMES: Final = (
    Theme("moves", 60, {}),
    Theme("mappings", 22, _MAPPINGS),
    Theme("forks", 4, _FORKING),
    Theme("merges", 4, _MERGING),
    Theme("swap", 4, _SWAPPING),
    Theme("merged swap", 3, {**_MERGING, **_SWAPPING, Kind.RECLAIM: 9, Kind.HOLD: 9}),
    Theme("userfaults", 3, _USERFAULTS),
    Theme("undo", 4, _UNDO),
    Theme("everything", 3, {**_FORKING, **_MERGING, **_SWAPPING, **_MAPPINGS, **_USERFAULTS, **_UNDO}),
)

#: Parts and places, by weight. Uniform choices hardly ever meet memory that borders on other memory, or fits it.
_PARTS: Final = {
    Part.ALL: 10,
    Part.FIRST_HALF: 3,
    Part.SECOND_HALF: 3,
    Part.FIRST: 1.5,
    Part.LAST: 1.5,
    Part.MIDDLE: 1.5,
}
_TOS: Final = {To.PLACE: 5, To.HOME: 4, To.AFTER: 4, To.BEFORE: 4, To.ONTO: 1.5, To.GAP: 1, To.ALONGSIDE: 3}
_MAP_TOS: Final = {To.PLACE: 6, To.AFTER: 2.5, To.BEFORE: 2.5, To.ONTO: 0.7, To.GAP: 1}


_T = TypeVar("_T")


class _Weighted(Generic[_T]):
    """Draws from a table of weights."""

    def __init__(self, weights: dict[_T, float]) -> None:
        self._values = list(weights)
        total = sum(weights.values())
        self._limits = [each / total for each in accumulate(weights.values())]

    def draw(self, number: float) -> _T:
        """The value at a number from 0 to below 1."""
        return self._values[min(bisect(self._limits, number), len(self._values) - 1)]


@dataclass(frozen=True)
class Made:
    """A program, and the situations that it is meant to meet."""

    program: Program
    situations: Sequence[Situation]


def remade(program: Program) -> Made:
    """A program that was made earlier, with the situations that it meets if all its operations succeed."""
    machine = Machine()
    met: list[Situation] = []
    for wire in to_wire(program):
        step = operands.resolve(machine, tuple(wire))
        if step is not None:
            met.append(situation(machine, step))
            _do(machine, step)
    return Made(program, met)


def _do(machine: Machine, step: Step) -> None:
    """Take a step to succeed, unless it is made to fail."""
    if operands.undone(machine, step):
        effects.refuse(machine, step)
    else:
        effects.apply(machine, step, effects.new_tags(machine, step))


class Generator:
    """An endless row of programs.

    :param seed: equal seeds make equal programs, as long as :attr:`seen` develops equally.
    :param kinds: what the kernel supports.
    """

    def __init__(self, seed: int, kinds: Iterable[Kind]) -> None:
        self._random = random.Random(seed)
        available = set(kinds)
        self._themes = [
            (theme, _Weighted({kind: weight for kind, weight in _merged(theme).items() if kind in available}))
            for theme in THEMES
            if not theme.kinds or available.intersection(theme.kinds)
        ]
        self._shares = [theme.share for theme, _ in self._themes]
        self._parts, self._tos, self._map_tos = _Weighted(_PARTS), _Weighted(_TOS), _Weighted(_MAP_TOS)
        #: how often each situation was met
        self.seen: Counter[Situation] = Counter()

    def next(self) -> Made:
        """Make one program."""
        _, kinds = self._random.choices(self._themes, self._shares)[0]
        machine = Machine()
        made: list[Operation] = []
        met: list[Situation] = []
        for number in range(LENGTH):
            best: tuple[int, Step, Situation] | None = None
            found = 0
            for _ in range(_DRAWS):
                step = operands.resolve(machine, self._draw(kinds, machine, first=number == 0))
                if step is None or (operands.likely_refused(machine, step) and self._random.random() < _SPARED):
                    continue
                here = situation(machine, step)
                count = self.seen[here]
                if best is None or count < best[0]:
                    best = (count, step, here)
                found += 1
                if found == _CANDIDATES or count == 0:
                    break
            if best is None:
                continue
            _, step, here = best
            made.append(decoded(step.wire))
            met.append(here)
            self.seen[here] += 1
            _do(machine, step)
        return Made(tuple(made), met)

    def _draw(self, kinds: _Weighted[Kind], machine: Machine, *, first: bool) -> tuple[int, ...]:
        choose = self._random.random
        kind = Kind.MAP if first else kinds.draw(choose())
        alive = [number for number, pages in enumerate(machine.processes) if pages is not None]
        process = alive[int(choose() * len(alive))]
        pages = machine.processes[process]
        assert pages is not None
        used = [slot for slot, where in enumerate(pages.slots) if where is not None]
        slot = used[int(choose() * len(used))] if used else 0
        part = Part.ALL
        to, near, into, arg = To.PLACE, 0, 0, 1
        if kind in PLACED:
            new = kind in MAPPING
            to = (self._map_tos if new else self._tos).draw(choose())
            near = int(choose() * PLACES) if to is To.PLACE else used[int(choose() * len(used))] if used else 0
            # Into a slot that is free, or over one that is not; a whole slot that moves keeps its name mostly.
            into = slot if not new and choose() < 0.6 else int(choose() * SLOTS)
        if kind not in MAPPING | {Kind.GROW, Kind.SHRINK, Kind.FORK}:
            part = self._parts.draw(choose())
        if kind is Kind.FORK:
            process, arg = 0, 1 + int(choose() * (PROCESSES - 1))
        elif kind in COUNTED:
            arg = 1 + int(choose() * (MOST_PAGES if kind in MAPPING else 3))
        return (KINDS.index(kind), process, slot, PARTS.index(part), TOS.index(to), near, into, arg)


def _merged(theme: Theme) -> dict[Kind, float]:
    merged = dict(_BASIC)
    for kind, weight in theme.kinds.items():
        merged[kind] = merged.get(kind, 0) + weight
    return merged
