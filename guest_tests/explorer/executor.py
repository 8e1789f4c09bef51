# SPDX-License-Identifier: GPL-2.0
"""Runs one program from beginning to end, and checks what it left."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from guest_tests.explorer import oracles
from guest_tests.explorer.actions import Actions
from guest_tests.explorer.arena import Arena
from guest_tests.explorer.children import Child, ChildDied, fork
from guest_tests.explorer.oracles import Failure, Memory
from guest_tests.explorer.rivals import Rival
from guest_tests.explorer.walks import Walker
from harness.programs import effects, memory, operands
from harness.programs.language import KINDS, PROCESSES, Kind, Wire
from harness.programs.memory import MERGED, Machine, Step
from harness.programs.operands import MOVES

_FORK, _EXIT, _SCAN, _WALK, _REGISTER = (
    KINDS.index(each) for each in (Kind.FORK, Kind.EXIT, Kind.SCAN, Kind.WALK, Kind.UFFD_REGISTER)
)
#: what forgetting does to the model
_RELEASED: Final = Step(KINDS.index(Kind.RELEASE), 0, 0, 0, 0, 0, ())
#: Errors that say why a call is refused. Any other is a failure.
_REFUSALS: Final = frozenset(
    {
        errno.EINVAL,
        errno.EFAULT,
        errno.ENOMEM,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EPERM,
        errno.ENOENT,
        errno.EOPNOTSUPP,
        errno.EBADF,
    }
)
#: errors that say so of one kind of operation
_OWN_REFUSALS: Final = {
    # there is a page
    KINDS.index(Kind.UFFD_MOVE): errno.EEXIST,
    # the page is on no list of the LRU at the moment (soft_offline_page(), mm/memory-failure.c)
    KINDS.index(Kind.SOFT_OFFLINE): errno.EIO,
}
#: how often a page is looked at before it is said to be left in a migration, and seconds between two looks
_TRIES: Final = 4
_PAUSE: Final = 0.01
#: pagemap's soft-dirty bit, which a refused call may set
_SOFT_DIRTY: Final = 1 << 55


@dataclass
class Outcome:
    """What became of one program."""

    #: how each operation ended: 0, an errno, or -1 if it was skipped
    errors: list[int] = field(default_factory=list)
    failure: Failure | None = None
    #: the mappings of each process at the end: first page, page behind the last, permissions
    mappings: list[list[tuple[int, int, str]]] = field(default_factory=list)


class Executor:
    """Runs programs in the calling process, one after the other."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.actions = Actions(self.arena)
        self.walker = Walker(self.arena)
        # In a plan, where the calling process is the only one. The program runs again with the model if this fails.
        self.actions.table[_WALK] = lambda step, _: not self.walker.check_plan(step.start, step.end)
        self._children: list[Child | None] = [None] * PROCESSES
        self.counts: Counter[tuple[int, int]] = Counter()

    def run(
        self,
        program: Sequence[Wire],
        *,
        thorough: bool = False,
        layout: bool = False,
        mappings: bool = False,
        rival: Rival | None = None,
        audit: Callable[[list[int]], None] | None = None,
    ) -> Outcome:
        """Run one program on an empty arena.

        :param mappings: say which mappings there are at the end.
        :param thorough: check every byte, the accounts, and the frames around each refused operation. The accounts of
            programs with a userfaultfd are always checked.
        :param layout: check the layout.
        :param rival: races with the operations, and rests during the checks. The frames around refused operations are
            not compared then, nor what KSM has merged, because the rival changes both.
        :param audit: called after the checks, with the processes, while they still have their memory.
        """
        machine = Machine()
        outcome = Outcome()
        try:
            alone = rival is None
            with nullcontext() if rival is None else rival.racing():
                outcome.failure = self._operations(machine, program, outcome.errors, thorough=thorough, alone=alone)
            if outcome.failure is None:
                self.actions.forget()
                effects.apply(machine, _RELEASED)
                if mappings:
                    outcome.mappings = [
                        oracles.mappings(self._pid(process))
                        for process, pages in enumerate(machine.processes)
                        if pages is not None
                    ]
                failure = None if alone else self._settled(machine)
                uffd = any(wire[0] == _REGISTER for wire in program)
                outcome.failure = failure or self._check(machine, thorough=thorough, layout=layout, uffd=uffd)
            if audit is not None:
                audit([os.getpid(), *filter(None, self._pids())])
        except ChildDied as died:
            outcome.failure = Failure("bytes", 1, 0, str(died))
        finally:
            self.actions.forget()
            for child in self._children:
                if child is not None:
                    child.end()
            self._children = [None] * PROCESSES
            self.arena.reset()
        return outcome

    def run_plan(self, data: Sequence[Any]) -> bool:
        """Run a program that was worked out by the host, as :class:`harness.explore.plan.Plan` describes.

        :returns: whether it came out as planned.
        """
        steps, wanted, first, end = data
        arena = self.arena
        try:
            if not self.actions.all(steps):
                return False
            self.actions.forget()
            expected = [(start, stop, bytes.fromhex(tags)) for start, stop, tags in wanted]
            for start, stop, tags in expected:
                if arena.tags(start, stop) != (tags, tags):
                    return False
            if not self.walker.check_plan(first, end):
                return False
            return all(arena.tags(start, stop) == (tags, tags) for start, stop, tags in expected)
        finally:
            self.actions.forget()
            arena.reset()

    # --- operations --------------------------------------------------------------------------------------------------

    def _operations(
        self, machine: Machine, program: Sequence[Wire], errors: list[int], *, thorough: bool, alone: bool
    ) -> Failure | None:
        table = self.actions.table
        for wire in program:
            step = operands.resolve(machine, wire)
            if step is None:
                errors.append(-1)
                continue
            kind = step.kind
            if self._several(machine, step):
                errors.append(-1)
                continue
            if kind == _WALK:
                errors.append(0)
                failure = self.walker.check(machine, self._pids(), step)
                if failure is not None:
                    return failure
                continue
            tags = effects.new_tags(machine, step)
            compared = alone and (thorough or kind in MOVES)
            before = self.arena.entries(self._pid(step.process)) if compared else None
            if kind == _FORK:
                self._children[wire[-1]] = fork(self.arena, self.actions, [each for each in self._children if each])
                error = 0
            elif kind == _EXIT:
                child = self._children[step.process]
                assert child is not None
                child.end()
                self._children[step.process] = None
                error = 0
            elif step.process:
                child = self._children[step.process]
                assert child is not None
                error = child.do(step, tags)
            else:
                error = table[kind](step, tags)
            errors.append(error)
            if not error:
                effects.apply(machine, step, tags)
                if kind == _SCAN and alone:
                    failure = oracles.check_merged(
                        machine,
                        self._entries(machine),
                        self.walker.zero,
                        inaccessible=self.walker.finds_inaccessible,
                    )
                    if failure is not None:
                        return failure
                continue
            failure = self._refused(machine, step, error, before)
            if failure is not None:
                return failure
        return None

    def _several(self, machine: Machine, step: Step) -> bool:
        """Whether a step may end after the first of several mappings.

        Mappings that are alike may be two all the same. If they were not alike when they were touched, each got an
        anon_vma of its own (anon_vma_compatible(), mm/vma.c).
        """
        pages = machine.processes[step.process]
        assert pages is not None
        if not operands.stops_between(pages, step.kind, step.start, step.end):
            return False
        mapped = oracles.mappings(self._pid(step.process))
        return sum(first < step.end and step.start < end for first, end, _ in mapped) > 1

    def _refused(self, machine: Machine, step: Step, error: int, before: Sequence[int] | None) -> Failure | None:
        """Account for a refused operation, and check that it changed nothing."""
        pages = machine.processes[step.process]
        assert pages is not None
        name = errno.errorcode.get(error, str(error))
        if error not in _REFUSALS and error != _OWN_REFUSALS.get(step.kind):
            text = f"{KINDS[step.kind]} fails with {name}, which says nothing about the call"
            return Failure("refused", step.process, step.start, text)
        effects.refuse(machine, step)
        # The un-merging of KSM pages comes before much that can refuse a move.
        if before is None or any(more & MERGED for more in pages.more[step.start : step.end]):
            return None
        after = self.arena.entries(self._pid(step.process))
        if after == before:
            return None
        for page, (old, new) in enumerate(zip(before, after, strict=True)):
            if (old ^ new) & ~_SOFT_DIRTY and pages.attr[page]:
                text = f"{KINDS[step.kind]} is refused with {name} and changes page {page}: {old:#x} becomes {new:#x}"
                return Failure("refused", step.process, page, text)
        return None

    # --- checks ------------------------------------------------------------------------------------------------------

    def _check(self, machine: Machine, *, thorough: bool, layout: bool, uffd: bool) -> Failure | None:
        there = [process for process, pages in enumerate(machine.processes) if pages is not None]
        if layout or thorough:
            for process in there:
                failure = oracles.check_layout(machine, process, self._pid(process))
                if failure is not None:
                    return failure
        self._make_readable(machine)
        for process in there:
            failure = oracles.check_bytes(machine, process, self._memory(process), all_bytes=thorough)
            if failure is not None:
                return failure
        if thorough or uffd:
            entries = self._entries(machine)
            for process in there:
                failure = oracles.check_accounts(
                    machine, process, self._pid(process), entries[process], self.walker.zero
                )
                if failure is not None:
                    return failure
        failure = self.walker.check(machine, self._pids())
        if failure is not None:
            return failure
        for process in there:
            failure = oracles.check_bytes(machine, process, self._memory(process), all_bytes=thorough)
            if failure is not None:
                return failure
        if uffd:
            entries = self._entries(machine)
            for process in there:
                failure = oracles.check_marks(machine, process, entries[process])
                if failure is not None:
                    return failure
        return None

    def _settled(self, machine: Machine) -> Failure | None:
        """Look for what the rival's migrations have left behind, before anything is read."""
        failure = None
        for attempt in range(_TRIES):
            time.sleep(_PAUSE * attempt)  # the kernel may compact memory by itself
            failure = oracles.check_settled(machine, self._entries(machine))
            if failure is None:
                break
        return failure

    def _make_readable(self, machine: Machine) -> None:
        """Make what cannot be read readable, for the check of its bytes."""
        number = KINDS.index(Kind.PROTECT_READ)
        for process, pages in enumerate(machine.processes):
            if pages is None:
                continue
            for start, end in memory.runs(pages):
                if pages.all_have(start, end, memory.READ):
                    continue
                step = Step(number, process, start, end - start, start, end - start, ())
                child = self._children[process]
                if (child.do(step, b"") if child else self.actions.table[number](step, b"")) == 0:
                    effects.apply(machine, step)

    def _memory(self, process: int) -> Memory:
        return self._children[process] or self.arena

    def _pid(self, process: int) -> int:
        child = self._children[process]
        return child.pid if child else 0

    def _pids(self) -> list[int]:
        return [self._pid(process) for process in range(PROCESSES)]

    def _entries(self, machine: Machine) -> list[Sequence[int]]:
        return [
            self.arena.entries(self._pid(process)) if pages is not None else []
            for process, pages in enumerate(machine.processes)
        ]
