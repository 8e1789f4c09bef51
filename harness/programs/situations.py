# SPDX-License-Identifier: GPL-2.0
"""The situation of an operation: what was so of its memory and of its place when it was done.

Pairs of an operation and a situation are counted, and programs with rare pairs are preferred.
"""

from __future__ import annotations

from typing import Final

from harness.programs.language import KINDS, PLACED, SLOTLESS, Kind, numbers
from harness.programs.memory import (
    ARENA_PAGES,
    BOUND,
    FILED,
    FORKED,
    GUARD,
    HELD,
    HUGE,
    LAZY,
    LOCKED,
    MAPPED,
    MERGEABLE,
    MERGED,
    NAMED,
    PROTECTED,
    READ,
    REGISTERED,
    SHARED,
    SMALL,
    SWAPPED,
    TOUCHED,
    WRITE,
    Machine,
    Pages,
    Step,
)

#: an operation's kind, and numbers that stand for its situation
Situation = tuple[int, int, int, int, int, int]

_ATTR: Final = SHARED | WRITE | MERGEABLE | LOCKED | GUARD | LAZY | READ
_MORE: Final = TOUCHED | FORKED | MERGED | SWAPPED | HELD | PROTECTED
_NOWHERE: Final = numbers(*SLOTLESS)
_PLACED: Final = numbers(*PLACED, Kind.GROW)


def situation(machine: Machine, step: Step) -> Situation:
    """The situation of a step that is about to be done."""
    pages = machine.processes[step.process]
    assert pages is not None
    if step.kind in _NOWHERE:
        alive = sum(each is not None for each in machine.processes)
        everything = 0
        for value in set(pages.more):
            everything |= value
        return step.kind, alive, everything & _MORE, 0, 0, 0
    attr = more = kept = 0
    for value in set(pages.attr[step.start : step.end]):
        attr |= value
    for value in set(pages.more[step.start : step.end]):
        more |= value
    for value in set(pages.kept[step.start : step.end]):
        kept |= value
    away = 0
    if step.pages:
        # Whether the mapping is at its home, and whether the place is.
        away = int(pages.home[step.start] != step.start) | int(pages.home[step.start] == step.dst) << 1
        away |= _cuts(pages, step) << 2
    place = _surroundings(pages, step) if step.kind in _PLACED else 0
    return step.kind, attr & _ATTR, more & _MORE, kept, away, place


def _cuts(pages: Pages, step: Step) -> int:
    """Whether the same mapping goes on in front of the pages, and behind them."""
    return _goes_on(pages, step.start - 1, step.start) | _goes_on(pages, step.end, step.end - 1) << 1


def _goes_on(pages: Pages, page: int, inside: int) -> int:
    if not 0 <= page < ARENA_PAGES or not pages.attr[page] & MAPPED:
        return 0
    return int(pages.home[page] - page == pages.home[inside] - inside)


def _surroundings(pages: Pages, step: Step) -> int:
    """What is at the place and on both sides of it."""
    inside = any(pages.attr[step.dst : step.dst + step.new]) if step.dst != step.start else False
    home = pages.home[step.start]
    left = _side(pages, step.dst - 1, home - 1)
    right = _side(pages, step.dst + step.new, home + step.new)
    return left | right << 3 | int(inside) << 6


def _side(pages: Pages, page: int, fitting: int) -> int:
    """0: nothing is mapped; else whether it was touched, and whether its page offset fits."""
    if not 0 <= page < ARENA_PAGES or not pages.attr[page] & MAPPED:
        return 0
    return 1 | (pages.more[page] & TOUCHED) << 1 | int(pages.home[page] == fitting) << 2


_WORDS: Final = (
    (SHARED, "shared"),
    (LOCKED, "locked"),
    (GUARD, "guarded"),
    (LAZY, "lazily freed"),
    (MERGEABLE, "mergeable"),
)
_HISTORY: Final = (
    (TOUCHED, "touched"),
    (FORKED, "forked"),
    (MERGED, "merged"),
    (SWAPPED, "swapped out"),
    (HELD, "held"),
    (PROTECTED, "write-protected"),
)
_KEPT: Final = (
    (FILED, "of a file"),
    (BOUND, "bound to a node"),
    (NAMED, "named"),
    (REGISTERED, "registered"),
    (HUGE, "for huge pages"),
    (SMALL, "for small pages"),
)


def words(found: Situation) -> str:
    """A situation for people, as far as the memory itself goes."""
    kind, attr, more, kept, away, _ = found
    told = ((_WORDS, attr), (_HISTORY, more), (_KEPT, kept))
    said = [word for table, bits in told for bit, word in table if bits & bit]
    if kind not in _NOWHERE:
        said.append("away from home" if away & 1 else "at home")
    return f"{KINDS[kind]}: {', '.join(said)}"
