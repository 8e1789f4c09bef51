# SPDX-License-Identifier: GPL-2.0
"""Audits of guests while their tests run: answers the agent's requests, and keeps what came of them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness import paths
from harness.agent import protocol
from harness.audit import debuginfo, dump, picture, walk
from harness.audit.findings import Audit, Finding, Kind, Severity
from harness.audit.layout import Layout
from harness.audit.memory import DumpError
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.errors import HarnessError
from harness.host.cache import Cache, Progress
from harness.kernels.kernel import Kernel
from harness.machine.vm import Vm
from harness.options import MachineOptions

#: findings and pages that are told to the guest, and address ranges that it may ask for
_MOST_TOLD = 200
_MOST_PAGES = 4096
_MOST_RANGES = 64
#: how often what looks wrong or in motion is looked at again, and after how long (seconds)
_AGAIN, _PAUSE = 2, 0.05
#: instants in a picture, the last ones
_MOST_PANELS = 12


class Auditor:
    """Audits the guests of one kernel.

    :param layout: of the kernel; a sentence that says why there is none, where audits were not asked for or cannot be.
    """

    def __init__(self, layout: Layout | str) -> None:
        self._layout = layout
        #: what came of the audits since :meth:`fresh`, and what probes said between one and the next
        self.done: list[tuple[str, Audit]] = []
        self._witnesses: list[dict[str, dict[tuple[int, int], bool]]] = []
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
        self._witnesses = []
        self.seconds = 0.0

    def save_picture(self, title: str) -> Path | None:
        """Draw the audits of this test, one below the other; None if there is nothing to draw.

        :param title: what the test is called; one file is kept of each.
        """
        panels = [
            picture.Panel(label, found, answers)
            for (label, found), answers in zip(self.done, self._witnesses, strict=True)
            if found.pages
        ]
        if not panels:
            return None
        directory = paths.state_dir() / "audits"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / (re.sub(r"[^A-Za-z0-9.+=-]+", "_", title)[-150:] + ".html")
        picture.save(path, title, panels[-_MOST_PANELS:])
        return path

    def audit(self, vm: Vm, label: str, deadline: Deadline, wanted: Mapping[str, Any] | None = None) -> Audit:
        """Stop the guest, audit it, let it go on.

        :param label: says when, for the report.
        :param wanted: what the guest asks for: ``pids`` and ``pages``, see :meth:`answer`.
        :raises HarnessError: if that is not possible.
        """
        if isinstance(self._layout, str):
            raise DumpError(self._layout)
        began = time.monotonic()
        pids, ranges, answers = _wishes(wanted or {})
        looks = [self._look(vm, deadline, pids, ranges)]
        while _lasting(looks) and len(looks) <= _AGAIN:
            # A guest can be stopped between the two halves of a change, by another process than the one under test.
            # That one stands still, waiting for our answer: what is really wrong stays wrong.
            time.sleep(_PAUSE)
            looks.append(self._look(vm, deadline, pids, ranges))
        found = seen_always(looks)
        self.seconds += time.monotonic() - began
        # What probes said comes with the next audit, and belongs to the memory they met: that of the one before.
        if self._witnesses:
            self._witnesses[-1] = answers
        self._witnesses.append({})
        self.done.append((label, found))
        return found

    def _look(self, vm: Vm, deadline: Deadline, pids: list[int], ranges: list[tuple[int, int, int]]) -> Audit:
        assert isinstance(self._layout, Layout)
        with dump.memory_of(vm, deadline) as image:
            return walk.audit(image, self._layout, pids=pids, keep=walk.pages_between(ranges))

    def answer(self, vm: Vm | None, request: protocol.Audit, deadline: Deadline) -> protocol.Audited:
        """Serve the agent.

        It may send ``label`` (text), ``pids`` (whom to audit, all if empty), and ``pages``: address ranges, each as
        process, start, end, whose pages it wants to be told.
        """
        if vm is None or isinstance(self._layout, str):
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
                "wrong": len(found.errors) + found.unlisted,
                "findings": [asdict(each) for each in sorted(found.findings, key=_weight)[:_MOST_TOLD]],
                "pages": [asdict(each) for each in found.pages[:_MOST_PAGES]],
                "seconds": found.seconds,
            }
        )


def auditor(kernel: Kernel, options: MachineOptions, progress: Progress) -> Auditor:
    """What audits guests of a kernel; fetches its debug information if need be."""
    try:
        archive = Archive(Cache(progress=progress), options.debian_mirror, progress)
        return Auditor(debuginfo.layout_of(kernel, archive, fetch=True))
    except HarnessError as error:
        return Auditor(str(error))


def seen_always(looks: Sequence[Audit]) -> Audit:
    """The last of some looks, with what it finds weighed by all of them.

    What was there each time, and was no half change at least once, is an error. The rest is in motion: what is new may
    pass as well. So is what had its locks held each time: that a lock is never let go is for other tests to notice.
    """
    lasting = _lasting(looks)
    wrong = {_key(each) for look in looks for each in look.errors} & lasting

    def weighed(finding: Finding) -> Finding:
        if finding.severity is Severity.NOTE:
            return finding
        return replace(finding, severity=Severity.ERROR if _key(finding) in wrong else Severity.IN_MOTION)

    return replace(looks[-1], findings=tuple(map(weighed, looks[-1].findings)))


_Key = tuple[Kind, str, int, int | None]


def _key(finding: Finding) -> _Key:
    return finding.kind, finding.process, finding.address, finding.pfn


def _lasting(looks: Sequence[Audit]) -> set[_Key]:
    """What was found at each look, but for notes."""
    found = [{_key(each) for each in look.findings if each.severity is not Severity.NOTE} for look in looks]
    return set.intersection(*found)


def _weight(finding: Finding) -> bool:
    return finding.severity is not Severity.ERROR


def _wishes(
    data: Mapping[str, Any],
) -> tuple[list[int], list[tuple[int, int, int]], dict[str, dict[tuple[int, int], bool]]]:
    """What a guest asks for and tells, checked: it may be broken."""
    try:
        pids = [int(each) for each in list(data.get("pids", []))[:_MOST_RANGES]]
        ranges = [(int(pid), int(start), int(end)) for pid, start, end in list(data.get("pages", []))[:_MOST_RANGES]]
        answers: dict[str, dict[tuple[int, int], bool]] = {}
        for name, pid, address, found in list(data.get("answers", []))[:_MOST_PAGES]:
            answers.setdefault(str(name)[:40], {})[int(pid), int(address)] = bool(found)
    except (TypeError, ValueError) as error:
        raise DumpError(f"the guest asks for an audit of nonsense: {str(error)[:200]!r}") from error
    return pids, ranges, answers
