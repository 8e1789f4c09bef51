# SPDX-License-Identifier: GPL-2.0
"""Audits of guests while their tests run: answers the agent's requests, and keeps what came of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from harness.agent import protocol
from harness.audit import dump, walk
from harness.audit.findings import Audit
from harness.audit.layout import Layout
from harness.audit.memory import DumpError
from harness.deadline import Deadline
from harness.errors import HarnessError
from harness.vm import Vm

#: findings and pages that are told to the guest, and address ranges that it may ask for
_MOST_TOLD = 200
_MOST_PAGES = 4096
_MOST_RANGES = 64


class Auditor:
    """Audits the guests of one kernel.

    :param layout: of the kernel; a sentence that says why there is none, where audits were not asked for or cannot be.
    """

    def __init__(self, layout: Layout | str) -> None:
        self._layout = layout
        #: what came of the audits since :meth:`fresh`
        self.done: list[tuple[str, Audit]] = []
        #: seconds the guests stood still for them
        self.seconds = 0.0

    @property
    def able(self) -> bool:
        """Whether this kernel's guests can be audited."""
        return isinstance(self._layout, Layout)

    @property
    def obstacle(self) -> str:
        """Why not; empty if they can."""
        return self._layout if isinstance(self._layout, str) else ""

    def fresh(self) -> None:
        """Forget what was done: another test begins."""
        self.done = []
        self.seconds = 0.0

    def audit(self, vm: Vm, label: str, deadline: Deadline, wanted: Mapping[str, Any] | None = None) -> Audit:
        """Stop the guest, audit it, let it go on.

        :param label: says when, for the report.
        :param wanted: what the guest asks for: ``pids`` and ``pages``, see :meth:`answer`.
        :raises HarnessError: if that is not possible.
        """
        if isinstance(self._layout, str):
            raise DumpError(self._layout)
        began = time.monotonic()
        pids, ranges = _wishes(wanted or {})
        with dump.memory_of(vm, deadline) as image:
            found = walk.audit(image, self._layout, pids=pids, keep=walk.pages_between(ranges))
        self.seconds += time.monotonic() - began
        self.done.append((label, found))
        return found

    def answer(self, vm: object, request: protocol.Audit, deadline: Deadline) -> protocol.Audited:
        """Serve the agent.

        It may send ``label`` (text), ``pids`` (whom to audit, all if empty), and ``pages``: address ranges, each as
        process, start, end, whose pages it wants to be told.
        """
        if not isinstance(vm, Vm) or isinstance(self._layout, str):
            why = self._layout if isinstance(self._layout, str) else "this machine's memory cannot be read from outside"
            return protocol.Audited({"unavailable": why})
        try:
            found = self.audit(vm, str(request.data.get("label", ""))[:200], deadline, request.data)
        except HarnessError as error:
            return protocol.Audited({"error": str(error)[:2000]})
        return protocol.Audited(
            {
                "summary": found.summary,
                "counts": asdict(found.counts),
                "findings": [asdict(each) for each in found.findings[:_MOST_TOLD]],
                "pages": [asdict(each) for each in found.pages[:_MOST_PAGES]],
                "seconds": found.seconds,
            }
        )


def _wishes(data: Mapping[str, Any]) -> tuple[list[int], list[tuple[int, int, int]]]:
    """What a guest asks for, checked: it may be broken."""
    try:
        pids = [int(each) for each in list(data.get("pids", []))[:_MOST_RANGES]]
        ranges = [(int(pid), int(start), int(end)) for pid, start, end in list(data.get("pages", []))[:_MOST_RANGES]]
    except (TypeError, ValueError) as error:
        raise DumpError(f"the guest asks for an audit of nonsense: {str(error)[:200]!r}") from error
    return pids, ranges
