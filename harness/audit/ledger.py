# SPDX-License-Identifier: GPL-2.0
"""Where the parts of an audit write down what they find."""

from __future__ import annotations

from collections.abc import Iterable

from harness.audit.findings import MOST_FINDINGS, Finding, Kind, Severity
from harness.audit.kernel import Kernel, Process, Vma
from harness.audit.memory import Unreadable

#: what is wrong for a moment while a process comes, goes, or changes its VMAs
_LAGGING = (Kind.COUNT_MISMATCH, Kind.STALE_RMAP_ITEM, Kind.BROKEN_CHAIN)


class Ledger:
    """Findings, at most so many."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.findings: list[Finding] = []
        #: address spaces that are being forked, are ending, are changing their VMAs, or cannot be read: counters that
        #: have to do with them may be ahead of what they count
        self.unsettled: set[int] = set()
        #: errors that were not kept
        self.unlisted = 0

    def broken(self, process: Process, vma: Vma, sentence: str, moving: bool = False) -> None:
        """Note a list or tree of a VMA that contradicts itself, unless its process is changing it.

        :param moving: whether it is also changed under another lock, which is held.
        """
        severity = Severity.ERROR
        if moving or self._kernel.locked_for_writing(process.mm + self._kernel.layout["mm_struct.mmap_lock"]):
            severity = Severity.IN_MOTION
        self.add(Kind.BROKEN_CHAIN, process, vma, vma.at, None, "a whole chain", "a broken one", sentence, severity)

    def bad_pointer(
        self,
        process: Process | None,
        error: Unreadable,
        what: str,
        vma: Vma | None = None,
        severity: Severity = Severity.ERROR,
    ) -> None:
        """Note a pointer that leads to no memory, met while following ``what``."""
        whose = f" of {process}" if process else ""
        sentence = f"following {what.removeprefix('its ')}{whose} leads nowhere: {error}"
        self.add(Kind.BAD_POINTER, process, vma, error.address, None, "memory", "none", sentence, severity)

    def add(
        self,
        kind: Kind,
        process: Process | None,
        vma: Vma | None,
        address: int,
        pfn: int | None,
        expected: str,
        actual: str,
        sentence: str,
        severity: Severity = Severity.ERROR,
        mms: Iterable[int] = (),
    ) -> None:
        """Note a finding; see :class:`harness.audit.findings.Finding`. ``{process}`` in the sentence is filled in.

        :param mms: the address spaces it has to do with, beside that of ``process``.
        """
        lagging = kind in _LAGGING and not self.unsettled.isdisjoint(mms)
        if severity is Severity.ERROR and (lagging or (process is not None and not process.pid)):
            severity = Severity.IN_MOTION
        if severity is not Severity.ERROR and len(self.findings) >= MOST_FINDINGS // 2:
            return  # the other half is for what is wrong
        if len(self.findings) >= MOST_FINDINGS:
            self.unlisted += 1
            return
        who, where = str(process) if process else "", str(vma) if vma else ""
        sentence = sentence.replace("{process}", who)
        self.findings.append(Finding(kind, severity, who, where, address, pfn, expected, actual, sentence))
