# SPDX-License-Identifier: GPL-2.0
"""Makes a failing program smaller for as long as it fails in the same way.

The language is total, so that every program with operations left out is a program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from harness.programs.language import COUNTED, MAPPING, NAMING, PLACED, SLOTLESS, Kind, Operation, Part, Program, To

#: Runs programs in order until one fails in the same way; returns its number, or None.
FirstFailing = Callable[[Sequence[Program]], int | None]

#: a kind, and one that does less and often serves as well
_SIMPLER: Final = {
    Kind.MOVE_DONTUNMAP: Kind.MOVE,
    Kind.MOVE_RELOCATE: Kind.MOVE,
    Kind.MOVE_MUST_RELOCATE: Kind.MOVE_RELOCATE,
    Kind.MOVE_UNDONE: Kind.MOVE_MUST_RELOCATE,
    Kind.MOVE_FALLBACK: Kind.MOVE_RELOCATE,
    Kind.MOVE_GROW: Kind.MOVE,
    Kind.MOVE_SHRINK: Kind.MOVE,
    Kind.POPULATE: Kind.WRITE,
    Kind.LOCK: Kind.WRITE,
    Kind.WRITE_SAME: Kind.WRITE,
    Kind.POKE: Kind.WRITE,
    Kind.MAP_SHARED: Kind.MAP,
    Kind.MAP_FILE: Kind.MAP,
    Kind.SHRINK: Kind.UNMAP,
    Kind.RECLAIM: Kind.PAGEOUT,
}


def shrink(program: Program, first_failing: FirstFailing) -> Program:
    """The smallest program that was found to fail in the same way.

    :param program: one that fails.
    """
    while True:
        before = program
        for candidates in (_shorter, _simpler, _renamed):
            while True:
                tried = [each for each in candidates(program) if each != program]
                found = first_failing(tried) if tried else None
                if found is None:
                    break
                program = tried[found]
        if program == before:
            return program


def _shorter(program: Program) -> Iterator[Program]:
    """With operations left out, the larger pieces first."""
    size = len(program) // 2
    while size:
        for start in range(0, len(program) - size + 1, size):
            yield program[:start] + program[start + size :]
        size //= 2


def _simpler(program: Program) -> Iterator[Program]:
    """With one operand or one kind made simpler."""
    for number, each in enumerate(program):
        for simple in _simple_forms(each):
            yield (*program[:number], simple, *program[number + 1 :])


def _simple_forms(each: Operation) -> Iterator[Operation]:
    if each.process and each.kind is not Kind.EXIT:
        yield replace(each, process=0)
    if each.part is not Part.ALL:
        yield replace(each, part=Part.ALL)
    if each.kind in PLACED - MAPPING and each.to is not To.HOME:
        # Often the place was the home by accident. Home needs no other slot.
        yield replace(each, to=To.HOME, near=0)
    if each.kind in PLACED and each.to is To.PLACE and each.near > 3:
        yield from (replace(each, near=near) for near in (2, 3))
    if each.kind in COUNTED and each.kind is not Kind.FORK and each.arg > 1:
        yield replace(each, arg=1)
        yield replace(each, arg=each.arg - 1)
    if each.kind in PLACED and each.to not in (To.PLACE, To.HOME):
        yield replace(each, to=To.PLACE, near=5)
    if each.kind in _SIMPLER:
        yield replace(each, kind=_SIMPLER[each.kind])


def _renamed(program: Program) -> Iterator[Program]:
    """With slots named in the order in which they appear, and nothing in fields that mean nothing."""
    names: dict[int, int] = {}

    def named(slot: int) -> int:
        return names.setdefault(slot, len(names))

    made = []
    for each in program:
        fresh = each.kind in MAPPING
        slot = 0 if each.kind in SLOTLESS or fresh else named(each.slot)
        near = each.near
        if each.kind not in PLACED or each.to is To.HOME:
            near = 0
        elif each.to is not To.PLACE:
            near = named(each.near)
        into = named(each.into) if each.kind in NAMING else 0
        to = each.to if each.kind in PLACED else To.PLACE
        arg = each.arg if each.kind in COUNTED else 1
        made.append(replace(each, slot=slot, near=near, into=into, to=to, arg=arg))
    yield tuple(made)
