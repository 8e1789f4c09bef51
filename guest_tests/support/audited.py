# SPDX-License-Identifier: GPL-2.0
"""Audits of this guest's whole reverse map by the host, at a moment that the test chooses.

The host freezes the guest, reads the kernel's structures, and proves for each present anonymous page-table entry that
the kernel's reverse walk leads back to it. Unlike a probe, an audit forces no walk, and it covers every page.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from guest_tests.mm.mapping import CarveOut
from guest_tests.mm.probes import Answer, Place, Probe
from guest_tests.mm.proctree import Child
from guest_tests.support.observer import Observed, Observer
from harness.agent.session import AUDIT

#: how many findings a message shows
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Seen:
    """What an audit found."""

    #: the result in one line
    summary: str
    #: how many findings are errors of the kernel
    wrong: int
    #: errors and notes, at most some hundred. Each has ``kind``, ``severity``, ``sentence``, ``address``, ``pfn``,
    #: ``expected``, ``actual``
    findings: list[dict[str, Any]]
    #: whether the walk leads back to a place; for places that were asked for and have an anonymous page present
    reached: dict[Place, bool]
    #: the page frame that each of those places maps
    frames: dict[Place, int]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The findings that are errors of the kernel."""
        return [each for each in self.findings if each["severity"] == "error"]


class Audit:
    """Asks the host to audit this guest.

    :param ask: sends a request to the host and returns its answer.
    """

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._ask = ask
        #: why this run has no audits; empty until the host refuses one
        self.unavailable = ""

    def look(
        self,
        label: str = "in the test",
        places: Iterable[Place] = (),
        shown: Iterable[tuple[int, int, int]] = (),
        answers: Iterable[tuple[str, int, int, bool]] = (),
    ) -> Seen | None:
        """Audit all processes now.

        :param label: completes "audited …" in the report.
        :param places: the answer says of each of these whether the walk leads back to it.
        :param shown: ranges for the picture in the report: process, start, end.
        :param answers: answers of probes for the same picture: name, process, address, whether it was found.
        :returns: what was found; None if this run has no audits.
        :raises AssertionError: if the host could not audit.
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
            answer["discrepancies"],
            {place: page["reached"] for place, page in told.items()},
            {place: page["pfn"] for place, page in told.items()},
        )

    def check(self, label: str = "in the test") -> Seen:
        """Audit all processes now, and assert that nothing is wrong. Skips if this run has no audits.

        :raises AssertionError: naming what is wrong.
        """
        seen = self.look(label)
        if seen is None:
            pytest.skip(f"needs an audit by the host: {self.unavailable}")
        assert_clean(seen, label)
        return seen


def assert_clean(seen: Seen, label: str) -> None:
    """Assert that an audit found nothing wrong."""
    sentences = [each["sentence"] for each in seen.errors]
    shown = "\n".join(sentences[:_MOST_SHOWN])
    more = f"\n… and {seen.wrong - _MOST_SHOWN} more" if seen.wrong > _MOST_SHOWN else ""
    assert not seen.wrong, f"audited {label}, the reverse map is wrong:\n{shown}{more}"


class Watch(Observer):
    """Audits a test from its first move on: before moved memory is unmapped, before each probe, and at the end.

    The moves of a child are audited before the child ends. They cannot be audited one by one, because a child cannot
    ask the host.

    An audit and a probe answer the same question by different means. Where they disagree one of them is wrong, and the
    test fails for that reason.

    :param each_move: audit after each move, too.
    """

    def __init__(self, audit: Audit, observed: Observed, *, each_move: bool) -> None:
        self._audit = audit
        self._observed = observed
        self._each_move = each_move
        self._pid = os.getpid()
        #: whether there were moves since the last audit
        self._moved = False
        #: a byte that is not 0 if children moved: they have a copy of everything else here
        self._theirs = mmap.mmap(-1, 1)
        #: what an audit in the middle of the test found wrong, and its label; fails the test at its end
        self._wrong: tuple[Seen, str] | None = None
        #: the audit before the walk that a probe forces now
        self._before: Seen | None = None
        #: what probes answered since the last audit, for the picture: name, process, address, whether found
        self._answers: list[tuple[str, int, int, bool]] = []
        observed.subscribe(self)

    def over(self) -> None:
        """Audit what was moved, and assert that nothing is wrong. Call it while the memory is still there.

        What an earlier audit found wrong counts too, even if it has healed since.
        """
        self._collect()
        found: list[tuple[Seen, str]] = []
        # A test that fails has a reason of its own to report.
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

    # -- what the test does

    def area_closing(self, area: CarveOut) -> None:
        """See :meth:`Observer.area_closing`."""
        self.over()

    def moving(self, call: str) -> None:
        """See :meth:`Observer.moving`."""
        if self._each_move:
            self._look(f"before {call}")

    def moved(self, call: str, result: int | OSError) -> None:
        """See :meth:`Observer.moved`."""
        if isinstance(result, OSError):
            return
        if os.getpid() == self._pid:
            self._moved = True
        else:
            self._theirs[0] = 1
        if self._each_move and (seen := self._look(f"after {call}")) is not None:
            assert_clean(seen, f"after {call}")

    def walking(self, probe: Probe, places: Sequence[Place]) -> None:
        """See :meth:`Observer.walking`."""
        self._collect()
        label = f"before {probe}"
        self._before = self._look(label, places) if self._moved else None
        self._remember(self._before, label)

    def walked(self, answer: Answer, places: Sequence[Place]) -> None:
        """See :meth:`Observer.walked`."""
        if self._before is not None:
            self._compare(self._before, answer, places)

    def child_closing(self, child: Child) -> None:
        """See :meth:`Observer.child_closing`."""
        # What is left when the child has ended is audited as well, at the end of the test.
        if self._collect():
            label = f"before the end of child {child.pid}"
            self._remember(self._look(label), label)

    # -- audits

    def _remember(self, seen: Seen | None, label: str) -> None:
        if seen is not None and seen.wrong and self._wrong is None:
            self._wrong = seen, label

    def _collect(self) -> bool:
        """Count the children's moves as this process's own; returns whether there were any."""
        if os.getpid() != self._pid:
            return False
        theirs = self._theirs[0] != 0
        self._theirs[0] = 0
        self._moved |= theirs
        return theirs

    def _look(self, label: str, places: Iterable[Place] = ()) -> Seen | None:
        # Only this process may use the link to the host: a child would take answers that are meant for its parent.
        if self._audit.unavailable or os.getpid() != self._pid:
            return None
        ranges = [(os.getpid(), area.address, area.end) for area in self._observed.areas]
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


def auditor(config: pytest.Config) -> Audit | None:
    """What audits this guest; None where the tests do not run in a guest."""
    ask = config.stash.get(AUDIT, None)
    return Audit(ask) if ask is not None else None
