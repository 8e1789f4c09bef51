# SPDX-License-Identifier: GPL-2.0
"""``--audit``: the audits of one test at a time, and what its report says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import HarnessError
from harness.guests.guest import Guest
from harness.host import safe_text
from harness.report.results import AUDIT_SECTION

if TYPE_CHECKING:
    from harness.audit.live import Auditor

#: When guests are audited.
When = Literal["off", "end", "each-move"]

Answer = Callable[[protocol.Audit], protocol.Audited]


@dataclass(frozen=True)
class Audited:
    """What came of the audits of one test."""

    #: how many there were, or None if none could be made
    count: int | None = None
    seconds: float = 0.0
    errors: int = 0
    #: for the report, if the test failed
    evidence: tuple[tuple[str, str], ...] = ()


class Audits:
    """Audits the guests of one kernel.

    :param auditor: does it; None without ``--audit``.
    :param when: as the option says.
    """

    def __init__(self, auditor: Auditor | None, when: When) -> None:
        self._auditor = auditor
        self._when = when

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why there are no audits although they were asked for."""
        if self._auditor is None or self._auditor.able:
            return ()
        return (f"cannot audit: {self._auditor.obstacle}",)

    def begin(self, guest: Guest, seconds: float) -> Answer | None:
        """Start anew for a test; returns what answers its requests, or None where audits were not asked for.

        :param seconds: how long one audit may take.
        """
        auditor = self._auditor
        if auditor is None:
            return None
        auditor.fresh()
        return lambda request: auditor.answer(guest.vm, request, Deadline.after(seconds))

    def end(self, guest: Guest, title: str, seconds: float, *, failed: bool) -> Audited:
        """What came of a test's audits, with one more after a failure.

        :param title: the test's id, for the picture.
        """
        auditor = self._auditor
        if auditor is None or not auditor.able or guest.vm is None:
            return Audited()
        text = ""
        if failed:
            try:
                auditor.audit(guest.vm, "after the failure", Deadline.after(seconds))
            except HarnessError as error:
                text = f"the guest cannot be audited any more: {error}\n"
        errors = sum(len(found.errors) + found.unlisted for _, found in auditor.done)
        text += "\n".join(f"{label}: {safe_text.escape(found.report())}" for label, found in auditor.done)
        if (failed or errors or self._when == "each-move") and (path := auditor.save_picture(title)):
            text += f"\ndrawn in {path}"
        return Audited(len(auditor.done), auditor.seconds, errors, ((AUDIT_SECTION, text),))
