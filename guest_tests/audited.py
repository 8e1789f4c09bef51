# SPDX-License-Identifier: GPL-2.0
"""Audits of this guest's whole reverse map, from outside, at an instant that the test chooses.

The host freezes the guest, reads the kernel's structures, and proves for each present anonymous page-table entry that
the kernel's reverse walk leads back to it. Unlike a probe it forces nothing, and sees every page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import CarveOut, Mapping
from guest_tests.mm.probes import Place
from harness.agent.session import AUDIT

#: findings shown of one audit
_MOST_SHOWN = 20


@dataclass(frozen=True)
class Seen:
    """What an audit found."""

    #: one line
    summary: str
    #: what is wrong, each with its ``kind``, ``severity``, ``sentence``, ``address``, ``pfn``, ``expected``, ``actual``
    findings: list[dict[str, Any]]
    #: of the places that were asked for, those where an anonymous page is present: does the walk lead back to it?
    reached: dict[Place, bool]

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

    def look(self, label: str = "in the test", places: Iterable[Place] = ()) -> Seen | None:
        """Audit all processes at this instant, and say what was found; None if this run has no audits.

        :param label: completes "audited …" in the report.
        :param places: whether the walk leads back to these is told one by one.
        """
        places = list(places)
        pages = [[place.pid, place.address, place.address + 1] for place in places]
        answer = self._ask({"label": label, "pages": pages})
        if "unavailable" in answer:
            self.unavailable = str(answer["unavailable"])
            return None
        assert "error" not in answer, f"the audit failed {label}: {answer['error']}"
        reached = {(page["pid"], page["address"]): page["reached"] for page in answer["pages"]}
        told = {place: reached[place.pid, place.address] for place in places if (place.pid, place.address) in reached}
        return Seen(answer["summary"], answer["findings"], told)

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
    more = f"\n… and {len(sentences) - _MOST_SHOWN} more" if len(sentences) > _MOST_SHOWN else ""
    assert not sentences, f"audited {label}, the reverse map is wrong:\n{shown}{more}"


def watch(audit: Audit, patch: pytest.MonkeyPatch, *, each_move: bool) -> Callable[[], None]:
    """Audit whenever memory that was moved is about to go, and after each move if asked to.

    :returns: to be called when the test's own part is over.
    """
    moves = 0
    mremap, close = syscalls.mremap, CarveOut.close

    def moved(old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
        nonlocal moves
        address = mremap(old, old_length, new_length, flags, new)
        moves += 1
        if each_move:
            look(f"after mremap({old:#x}, {old_length:#x}, {new_length:#x}, {flags:#x}, {new:#x})")
        return address

    def look(label: str) -> None:
        nonlocal moves
        moves = 0
        if not audit.unavailable and (seen := audit.look(label)) is not None:
            assert_clean(seen, label)

    def closed(area: CarveOut) -> None:
        try:
            over()
        finally:
            close(area)

    def over() -> None:
        if moves:
            look("at the end of the test")

    patch.setattr(syscalls, "mremap", moved)
    patch.setattr(CarveOut, "close", closed)
    return over


def auditor(config: pytest.Config) -> Audit | None:
    """What audits this guest; None outside one."""
    ask = config.stash.get(AUDIT, None)
    return Audit(ask) if ask is not None else None


def places(*mappings: Mapping) -> list[Place]:
    """Every page of some mappings of this process."""
    return [Place(address) for mapping in mappings for address in mapping.page_addresses]
