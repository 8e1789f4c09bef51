# SPDX-License-Identifier: GPL-2.0
"""What a program does step by step, with pages in place of slots, for whoever writes it down in another form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.programs import effects, language, operands
from harness.programs.language import KINDS, Kind, Operation, Program
from harness.programs.memory import GUARD, LAZY, MAPPED, PROTECTED, READ, Machine, Pages, Step, runs


@dataclass(frozen=True)
class Event:
    """One operation that was done or refused. Pages are counted from the first page that the program uses."""

    operation: Operation
    kind: Kind
    process: int
    #: the first page that it is about, and how many there are
    start: int
    pages: int
    #: the first page of its place, and how many pages there are afterwards
    dst: int
    new: int
    #: what a write writes: one byte for each page
    tags: bytes
    #: the errno with which it is refused; 0 if it is not
    error: int
    #: what each page of each process holds afterwards, see :func:`_row`
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Expected:
    """Pages whose contents are known at the end."""

    process: int
    start: int
    tags: bytes
    #: for each page: ``w`` a userfaultfd write-protects it, ``-`` it does not
    marks: str


@dataclass(frozen=True)
class Story:
    """A program as events."""

    events: tuple[Event, ...]
    expected: tuple[Expected, ...]
    #: the processes that live at the end
    alive: tuple[int, ...]
    #: the page of the arena that is page 0 here
    first: int
    #: how many pages there are from the first to the last that is ever used
    pages: int

    @property
    def kinds(self) -> frozenset[Kind]:
        """The kinds of its operations."""
        return frozenset(each.kind for each in self.events)

    def counted(self, text: str) -> str:
        """What a check said, with its pages counted as they are here."""
        return re.sub(r"\bpage (\d+)", lambda found: f"page {int(found[1]) - self.first}", text)

    @property
    def forks(self) -> bool:
        """Whether there is more than one process."""
        return Kind.FORK in self.kinds

    @property
    def userfaults(self) -> bool:
        """Whether there is a userfaultfd."""
        return Kind.UFFD_REGISTER in self.kinds


def story(program: Program, errors: Sequence[int]) -> Story:
    """The story of a program.

    :param errors: how each operation ends, as a guest said; missing ones are taken to succeed.
    """
    machine = Machine()
    told: list[_Told] = []
    for number, (each, wire) in enumerate(zip(program, language.to_wire(program), strict=True)):
        step = operands.resolve(machine, tuple(wire))
        error = errors[number] if number < len(errors) else 0
        if step is None or error < 0:
            continue
        tags = effects.new_tags(machine, step)
        if error == 0:
            effects.apply(machine, step, tags)
        told.append(_Told(each, step, tags, error, _states(machine)))
        if error:
            told += [_done(machine, Kind.UNMAP, step.process, *gone) for gone in effects.unmapped_by_refusal(step)]
    # As the executor does, for the check of the bytes.
    for process, pages in enumerate(machine.processes):
        for start, end in runs(pages) if pages is not None else ():
            if pages is not None and not pages.all_have(start, end, READ):
                told.append(_done(machine, Kind.PROTECT_READ, process, start, end - start))
    used = [page for each in told for page in _touched(each.step)]
    first, end = min(used, default=0), max(used, default=0) + 1
    living = [(number, pages) for number, pages in enumerate(machine.processes) if pages is not None]
    expected = [
        Expected(number, page - first, machine.contents(pages, page, page + 1), _mark(pages.more[page]))
        for number, pages in living
        for start, stop in runs(pages)
        for page in range(start, stop)
        if not pages.attr[page] & (GUARD | LAZY)
    ]
    return Story(
        tuple(each.event(first, end) for each in told),
        tuple(_joined(expected)),
        tuple(number for number, _ in living),
        first,
        end - first,
    )


_States = list[tuple[bytes, bytes] | None]


@dataclass(frozen=True)
class _Told:
    """An operation with its step, before the pages are counted from the first one."""

    operation: Operation
    step: Step
    tags: bytes
    error: int
    states: _States

    def event(self, first: int, end: int) -> Event:
        step = self.step
        return Event(
            self.operation,
            KINDS[step.kind],
            step.process,
            step.start - first,
            step.pages,
            step.dst - first,
            step.new,
            self.tags,
            self.error,
            tuple("" if state is None else _row(state, first, end) for state in self.states),
        )


def _done(machine: Machine, kind: Kind, process: int, start: int, pages: int) -> _Told:
    """An operation that the executor does by itself."""
    step = Step(language.number(kind), process, start, pages, start, pages, ())
    effects.apply(machine, step)
    return _Told(Operation(kind, process), step, b"", 0, _states(machine))


def _states(machine: Machine) -> _States:
    return [None if pages is None else _state(machine, pages) for pages in machine.processes]


def _touched(step: Step) -> list[int]:
    if step.pages == step.new == 0:
        return []
    return [step.start, step.start + max(step.pages, 1) - 1, step.dst, step.dst + max(step.new, 1) - 1]


def _joined(single: Sequence[Expected]) -> list[Expected]:
    """Neighbouring pages as one."""
    found: list[Expected] = []
    for each in single:
        last = found[-1] if found else None
        if last is not None and last.process == each.process and last.start + len(last.tags) == each.start:
            found[-1] = Expected(last.process, last.start, last.tags + each.tags, last.marks + each.marks)
        else:
            found.append(each)
    return found


def _mark(more: int) -> str:
    return "w" if more & PROTECTED else "-"


def _state(machine: Machine, pages: Pages) -> tuple[bytes, bytes]:
    return bytes(pages.attr), machine.contents(pages, 0, len(pages.attr))


def _row(state: tuple[bytes, bytes], first: int, end: int) -> str:
    """One character for each page: ``.`` nothing is mapped, ``-`` empty, ``#`` guarded, else its contents."""
    attr, contents = state
    shown = []
    for page in range(first, end):
        if not attr[page] & MAPPED:
            shown.append(".")
        elif attr[page] & GUARD:
            shown.append("#")
        else:
            shown.append(_letter(contents[page]))
    return "".join(shown)


def _letter(tag: int) -> str:
    if tag == 0:
        return "-"
    if tag == 1:
        return "A"  # what KSM may merge, as in the pictures of the written tests
    return chr(ord("a") + (tag - 2) % 26)
