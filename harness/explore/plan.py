# SPDX-License-Identifier: GPL-2.0
"""Works out a program ahead of time: its steps, and the bytes that it should leave.

The model takes every operation to succeed. A guest runs such a plan three times as fast as the program itself, because
its emulated processor need not run the model. A program whose plan does not come true is run again with the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from harness.programs import effects, language, memory, operands
from harness.programs.language import KINDS, Kind, Program
from harness.programs.memory import GUARD, LAZY, MAPPED, READ, Machine

_PROTECT_READ: Final = KINDS.index(Kind.PROTECT_READ)
#: kinds that need more than the first process, or a look at the result, or that fail on purpose
_NOT_PLANNED: Final = language.numbers(Kind.FORK, Kind.SCAN, Kind.UFFD_REGISTER, *language.FAILING)

#: kind, first page, pages, first page of the place, pages afterwards, and the bytes that it writes in hexadecimal
PlannedStep = tuple[int, int, int, int, int, str]


@dataclass(frozen=True)
class Plan:
    """A program whose operations all succeed in the first process."""

    steps: list[PlannedStep]
    #: readable ranges and the byte of each page in hexadecimal
    bytes: list[tuple[int, int, str]]
    #: the first mapped page, and the page behind the last
    first: int
    end: int

    def to_wire(self) -> list[Any]:
        """The plan as JSON for the guest."""
        return [self.steps, self.bytes, self.first, self.end]


def plan(program: Program) -> Plan | None:
    """The plan of a program; None if it must be run with the model."""
    machine = Machine()
    pages = machine.processes[0]
    assert pages is not None
    steps: list[PlannedStep] = []
    for wire in language.to_wire(program):
        step = operands.resolve(machine, tuple(wire))
        if step is None:
            continue
        if step.kind in _NOT_PLANNED:
            return None
        tags = effects.new_tags(machine, step)
        steps.append((step.kind, step.start, step.pages, step.dst, step.new, tags.hex()))
        effects.apply(machine, step, tags)
    runs = memory.runs(pages)
    if not runs or not pages.none_has(0, memory.ARENA_PAGES, LAZY | GUARD):
        return None
    for start, end in runs:
        if not pages.all_have(start, end, READ):
            steps.append((_PROTECT_READ, start, end - start, start, end - start, ""))
    wanted = [(start, end, machine.contents(pages, start, end).hex()) for start, end in memory.runs(pages, MAPPED)]
    return Plan(steps, wanted, runs[0][0], runs[-1][1])
