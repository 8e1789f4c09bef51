# SPDX-License-Identifier: GPL-2.0
"""Audits guests while their tests run: answers the requests of the agent, and keeps the results for the report."""

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
from harness.audit.discrepancies import Discrepancy, DiscrepancyKind, Severity
from harness.audit.layout import Layout
from harness.audit.memory import DumpError
from harness.audit.result import Audit
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.errors import HarnessError
from harness.host.cache import Cache, Progress
from harness.kernels.kernel import Kernel
from harness.machine.vm import Vm
from harness.options import MachineOptions

#: discrepancies in one answer to a guest
_MOST_DISCREPANCIES = 200
#: pages in one answer to a guest
_MOST_PAGES = 4096
#: address ranges and process IDs that a guest may ask for in one request
_MOST_RANGES = 64
#: times that an audit with discrepancies is repeated
_REPEATS = 2
#: seconds between these repeats
_PAUSE = 0.05
#: audits in a picture; the last ones are drawn
_MOST_PANELS = 12

#: a range of user addresses: process ID, start, end
_Range = tuple[int, int, int]
#: what probes found, by their name: process ID and address to whether the page was found there
_Answers = dict[str, picture.Witness]


class Auditor:
    """Audits the guests of one kernel.

    :param layout: the structure layout of the kernel. If its guests cannot be audited, or audits were not requested, a
        sentence that says why.
    """

    def __init__(self, layout: Layout | str) -> None:
        self._layout = layout
        #: the audits since :meth:`fresh`, each with its label
        self.done: list[tuple[str, Audit]] = []
        #: for each of them, what probes found between it and the next one
        self._witnesses: list[_Answers] = []
        #: seconds that these audits took in all
        self.seconds = 0.0

    @property
    def able(self) -> bool:
        """Whether this kernel's guests can be audited."""
        return isinstance(self._layout, Layout)

    @property
    def obstacle(self) -> str:
        """Why this kernel's guests cannot be audited; empty if they can."""
        return self._layout if isinstance(self._layout, str) else ""

    def fresh(self) -> None:
        """Forget the audits so far, because another test begins."""
        self.done = []
        self._witnesses = []
        self.seconds = 0.0

    def save_picture(self, title: str) -> Path | None:
        """Draw the audits of this test, one below the other.

        :param title: the name of the test. The picture replaces an earlier one of the same name.
        :returns: the picture's file; None if there is nothing to draw.
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
        """Stop a guest, audit it, and let it continue.

        An audit that finds an error, or something in motion, is repeated, because the guest may have been stopped while
        a process was in the middle of a change. The process under test waits for the answer meanwhile, so an error in
        its memory does not disappear.

        :param label: says when the audit happens, for the report.
        :param wanted: the guest's request, see :meth:`answer`; None to audit everything.
        :raises HarnessError: if the guest cannot be audited.
        """
        if isinstance(self._layout, str):
            raise DumpError(self._layout)
        began = time.monotonic()
        pids, ranges, answers = _parse_request(wanted or {})
        looks = [self._look(vm, deadline, pids, ranges)]
        while _in_all(looks) and len(looks) <= _REPEATS:
            time.sleep(_PAUSE)
            looks.append(self._look(vm, deadline, pids, ranges))
        found = seen_always(looks)
        self.seconds += time.monotonic() - began
        # A request brings the answers of probes since the audit before it. They are drawn with that earlier audit,
        # which saw the memory as it was before these probes.
        if self._witnesses:
            self._witnesses[-1] = answers
        self._witnesses.append({})
        self.done.append((label, found))
        return found

    def _look(self, vm: Vm, deadline: Deadline, pids: list[int], ranges: list[_Range]) -> Audit:
        assert isinstance(self._layout, Layout)
        with dump.memory_of(vm, deadline) as image:
            return walk.audit(image, self._layout, pids=pids, keep=walk.pages_between(ranges))

    def answer(self, vm: Vm | None, request: protocol.Audit, deadline: Deadline) -> protocol.Audited:
        """Answer a request of the agent.

        A request may hold ``label`` (text), ``pids`` (the processes to audit; all if empty), ``pages`` (address ranges,
        each as process ID, start, end; the answer lists the pages in them), and ``answers`` (what probes found since
        the last audit, each as the probe's name, process ID, address, whether the page was found).

        :param vm: the guest's machine.
        """
        if isinstance(self._layout, str):
            return protocol.Audited({"unavailable": self._layout})
        if vm is None:
            return protocol.Audited({"unavailable": "the memory of this machine cannot be read from outside"})
        try:
            found = self.audit(vm, str(request.data.get("label", ""))[:200], deadline, request.data)
        except HarnessError as error:
            return protocol.Audited({"error": str(error)[:2000]})
        return protocol.Audited(
            {
                "summary": found.summary,
                "counts": asdict(found.counts),
                "wrong": len(found.errors) + found.unlisted,
                "discrepancies": [asdict(each) for each in _errors_first(found)[:_MOST_DISCREPANCIES]],
                "pages": [asdict(each) for each in found.pages[:_MOST_PAGES]],
                "seconds": found.seconds,
            }
        )


def auditor(kernel: Kernel, options: MachineOptions, progress: Progress) -> Auditor:
    """The auditor for guests of a kernel. It fetches the kernel's debug information if needed."""
    try:
        archive = Archive(Cache(progress=progress), options.debian_mirror, progress)
        return Auditor(debuginfo.layout_of(kernel, archive, fetch=True))
    except HarnessError as error:
        return Auditor(str(error))


def seen_always(looks: Sequence[Audit]) -> Audit:
    """Combine repeated audits of one guest into the last of them.

    A discrepancy is an error if every audit found it, and at least one of them as an error. Any other discrepancy is in
    motion, except for notes. One that only the last audit found may be a change that began meanwhile. One whose lock
    was held at every audit stays in motion, because other tests notice a lock that is never released.
    """
    in_all = _in_all(looks)
    errors = {_key(each) for look in looks for each in look.errors} & in_all

    def weighed(found: Discrepancy) -> Discrepancy:
        if found.severity is Severity.NOTE:
            return found
        return replace(found, severity=Severity.ERROR if _key(found) in errors else Severity.IN_MOTION)

    return replace(looks[-1], discrepancies=tuple(map(weighed, looks[-1].discrepancies)))


_Key = tuple[DiscrepancyKind, str, int, int | None]


def _key(found: Discrepancy) -> _Key:
    """What makes discrepancies of two audits the same one."""
    return found.kind, found.process, found.address, found.pfn


def _in_all(looks: Sequence[Audit]) -> set[_Key]:
    """The discrepancies that every audit found, without notes."""
    found = [{_key(each) for each in look.discrepancies if each.severity is not Severity.NOTE} for look in looks]
    return set.intersection(*found)


def _errors_first(found: Audit) -> list[Discrepancy]:
    return sorted(found.discrepancies, key=lambda each: each.severity is not Severity.ERROR)


def _parse_request(data: Mapping[str, Any]) -> tuple[list[int], list[_Range], _Answers]:
    """Check a guest's request; returns its process IDs, address ranges, and answers of probes.

    :raises DumpError: if the request is malformed, because the guest may be broken.
    """
    try:
        pids = [int(each) for each in list(data.get("pids", []))[:_MOST_RANGES]]
        ranges = [(int(pid), int(start), int(end)) for pid, start, end in list(data.get("pages", []))[:_MOST_RANGES]]
        answers: dict[str, dict[tuple[int, int], bool]] = {}
        for name, pid, address, found in list(data.get("answers", []))[:_MOST_PAGES]:
            answers.setdefault(str(name)[:40], {})[int(pid), int(address)] = bool(found)
    except (TypeError, ValueError) as error:
        raise DumpError(f"the guest's request for an audit is malformed: {str(error)[:200]!r}") from error
    return pids, ranges, dict(answers)
