# SPDX-License-Identifier: GPL-2.0
"""Audits of this guest's whole reverse map, from outside, at an instant that the test chooses.

The host freezes the guest, reads the kernel's structures, and proves for each present anonymous page-table entry that
the kernel's reverse walk leads back to it. Unlike a probe it forces nothing, and sees every page.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import CarveOut
from guest_tests.mm.probes import Answer, Place, Probe
from guest_tests.mm.proctree import Child
from harness.agent.session import AUDIT

#: findings shown of one audit
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Seen:
    """What an audit found."""

    #: one line
    summary: str
    #: how many findings are the kernel's fault
    wrong: int
    #: these, and notes; at most some hundred. Each has ``kind``, ``severity``, ``sentence``, ``address``, ``pfn``,
    #: ``expected``, ``actual``
    findings: list[dict[str, Any]]
    #: of the places that were asked for, those where an anonymous page is present: does the walk lead back to it?
    reached: dict[Place, bool]
    #: which page frames they map
    frames: dict[Place, int]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The findings that are the kernel's fault."""
        return [each for each in self.findings if each["severity"] == "error"]


class Audit:
    """Has this guest audited.

    :param ask: hands a request to the host.
    """

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._ask = ask
        #: why there are no audits; empty as long as none was refused
        self.unavailable = ""

    def look(
        self,
        label: str = "in the test",
        places: Iterable[Place] = (),
        shown: Iterable[tuple[int, int, int]] = (),
        answers: Iterable[tuple[str, int, int, bool]] = (),
    ) -> Seen | None:
        """Audit all processes at this instant, and say what was found; None if this run has no audits.

        :param label: completes "audited …" in the report.
        :param places: whether the walk leads back to these is told one by one.
        :param shown: what to draw, where a picture is made: process, start, end.
        :param answers: what probes say, to be drawn beside it: name, process, address, whether it was found.
        """
        places = list(places)
        pages = [*shown, *((place.pid, place.address, place.address + 1) for place in places)]
        answer = self._ask({"label": label, "pages": pages, "answers": list(answers)})
        if "unavailable" in answer:
            self.unavailable = str(answer["unavailable"])
            return None
        assert "error" not in answer, f"the audit failed {label}: {answer['error']}"
        found = {(page["pid"], page["address"]): page for page in answer["pages"]}
        told = {place: found[place.pid, place.address] for place in places if (place.pid, place.address) in found}
        return Seen(
            answer["summary"],
            answer["wrong"],
            answer["findings"],
            {place: page["reached"] for place, page in told.items()},
            {place: page["pfn"] for place, page in told.items()},
        )

    def check(self, label: str = "in the test") -> Seen:
        """Like :meth:`look`; asserts that nothing is wrong, and skips if this run has no audits.

        :raises AssertionError: naming what is wrong.
        """
        seen = self.look(label)
        if seen is None:
            pytest.skip(f"needs an audit from outside: {self.unavailable}")
        assert_clean(seen, label)
        return seen


def assert_clean(seen: Seen, label: str) -> None:
    """Assert that an audit found nothing wrong."""
    sentences = [each["sentence"] for each in seen.errors]
    shown = "\n".join(sentences[:_MOST_SHOWN])
    more = f"\n… and {seen.wrong - _MOST_SHOWN} more" if seen.wrong > _MOST_SHOWN else ""
    assert not seen.wrong, f"audited {label}, the reverse map is wrong:\n{shown}{more}"


class Watch:
    """Audits a test from its first move on: when memory that was moved is about to go, and before each probe.

    Moves of children are audited before these end; not after each of them, as they cannot ask.

    The audit and a probe answer the same question by different means. Where they disagree, one of them is wrong, and
    that is a failure of its own.

    :param each_move: audit after each move, too.
    """

    def __init__(self, audit: Audit, patch: pytest.MonkeyPatch, *, each_move: bool) -> None:
        self._audit = audit
        self._each_move = each_move
        self._pid = os.getpid()
        #: whether there were moves that were not audited since
        self._moved = False
        #: a byte that is not 0 if children moved: they have a copy of everything else here
        self._theirs = mmap.mmap(-1, 1)
        #: what an audit in the middle of the test found wrong, and its label: fails the test in the end
        self._wrong: tuple[Seen, str] | None = None
        self._areas: list[CarveOut] = []
        #: what probes answered since the last audit, for the picture: name, process, address, whether found
        self._answers: list[tuple[str, int, int, bool]] = []
        patch.setattr(syscalls, "mremap", self._watched(syscalls.mremap))
        self._watch_areas(patch)
        self._watch_children(patch)
        walk = Probe.walk

        def watched_walk(probe: Probe, places: Sequence[Place], control: Sequence[Place] | None = None) -> Answer:
            self._collect()
            label = f"before {probe}"
            before = self._look(label, places) if self._moved else None
            self._remember(before, label)
            answer = walk(probe, places, control)
            if before is not None:
                self._compare(before, answer, places)
            return answer

        patch.setattr(Probe, "walk", watched_walk)

    def over(self) -> None:
        """Audit what was moved, and assert that nothing is wrong; to be called while it is still there.

        What an earlier audit found wrong counts too, even if it has passed since.
        """
        self._collect()
        found: list[tuple[Seen, str]] = []
        # A test that fails has its own word for it.
        failing = isinstance(sys.exception(), (Exception, pytest.fail.Exception))
        if self._wrong is not None and not failing:
            found.append(self._wrong)
            self._wrong = None
        if self._moved and (seen := self._look("at the end of the test")) is not None:
            self._moved = False
            found.append((seen, "at the end of the test"))
        for seen, label in found:
            assert_clean(seen, label)

    def failed(self) -> None:
        """Audit for the report of a failure that has another reason."""
        self._look("at the failure")
        self._collect()
        self._moved = False
        self._wrong = None

    def _remember(self, seen: Seen | None, label: str) -> None:
        if seen is not None and seen.wrong and self._wrong is None:
            self._wrong = seen, label

    def _collect(self) -> bool:
        """Take the children's moves for ours; returns whether there were any."""
        if os.getpid() != self._pid:
            return False
        theirs = self._theirs[0] != 0
        self._theirs[0] = 0
        self._moved |= theirs
        return theirs

    def _note_move(self) -> None:
        if os.getpid() == self._pid:
            self._moved = True
        else:
            self._theirs[0] = 1

    def _look(self, label: str, places: Iterable[Place] = ()) -> Seen | None:
        # The link to the host is our own: a child that used it would take answers that are for us.
        if self._audit.unavailable or os.getpid() != self._pid:
            return None
        ranges = [(os.getpid(), area.address, area.end) for area in self._areas]
        answers, self._answers = self._answers, []
        return self._audit.look(label, places, ranges, answers)

    def _compare(self, before: Seen, answer: Answer, places: Sequence[Place]) -> None:
        self._answers += [(answer.probe, place.pid, place.address, True) for place in answer.found]
        self._answers += [(answer.probe, place.pid, place.address, False) for place in answer.lost]
        frame = before.frames.get(places[0])
        told = {place: found for place, found in before.reached.items() if before.frames[place] == frame}
        # Migration moves a page only if all of its mappings are found: one that is lost keeps the others in place.
        if told and all(told.values()) and not before.wrong:
            assert not answer.lost, f"the audit says that the walk finds all places, but not so {answer}"
        for place in answer.found:
            assert told.get(place, True), f"the audit says that the walk does not find {place}, but it does: {answer}"

    def _watched(self, mremap: Callable[..., int]) -> Callable[..., int]:
        def watched_mremap(old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
            call = f"mremap({old:#x}, {old_length:#x}, {new_length:#x}, {flags:#x}, {new:#x})"
            if self._each_move:
                self._look(f"before {call}")
            address = mremap(old, old_length, new_length, flags, new)
            self._note_move()
            if self._each_move and (seen := self._look(f"after {call}")) is not None:
                assert_clean(seen, f"after {call}")
            return address

        return watched_mremap

    def _watch_areas(self, patch: pytest.MonkeyPatch) -> None:
        begin, close = CarveOut.__init__, CarveOut.close

        def watched_begin(area: CarveOut, pages: int) -> None:
            begin(area, pages)
            self._areas.append(area)

        def watched_close(area: CarveOut) -> None:
            try:
                self.over()
            finally:
                close(area)
                if area in self._areas:
                    self._areas.remove(area)

        patch.setattr(CarveOut, "__init__", watched_begin)
        patch.setattr(CarveOut, "close", watched_close)

    def _watch_children(self, patch: pytest.MonkeyPatch) -> None:
        close = Child.close

        def watched_close(child: Child) -> None:
            label = f"before the end of child {child.pid}"
            try:
                # What is left when it has gone is audited as well, at the end of the test.
                if self._collect():
                    self._remember(self._look(label), label)
            finally:
                close(child)

        patch.setattr(Child, "close", watched_close)


def auditor(config: pytest.Config) -> Audit | None:
    """What audits this guest; None outside one."""
    ask = config.stash.get(AUDIT, None)
    return Audit(ask) if ask is not None else None
