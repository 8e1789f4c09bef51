# SPDX-License-Identifier: GPL-2.0
"""The ledger: collects the discrepancies of one audit, and decides how serious each of them is."""

from __future__ import annotations

from dataclasses import dataclass

from harness.audit.discrepancies import Discrepancy, DiscrepancyKind, Severity
from harness.audit.kernel import Kernel, Process, Vma
from harness.audit.memory import Unreadable

#: discrepancies kept of one audit; a broken kernel may have one for each page
MOST_DISCREPANCIES = 1000

#: kinds that a healthy kernel shows for a moment, while a process starts, exits or changes its VMAs
_TRANSIENT = (DiscrepancyKind.COUNT_MISMATCH, DiscrepancyKind.STALE_RMAP_ITEM, DiscrepancyKind.BROKEN_CHAIN)


@dataclass(frozen=True, slots=True)
class Where:
    """What a discrepancy is about: a page-table entry of a process, or an object of the kernel."""

    #: the virtual address that the entry maps, or the address of the kernel object
    address: int
    process: Process | None = None
    vma: Vma | None = None
    #: the frame number of the page
    pfn: int | None = None
    #: address spaces (struct mm_struct) that share the kernel object
    mms: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Values:
    """The two values that contradict each other."""

    expected: str
    actual: str


class Ledger:
    """The discrepancies found so far, at most :data:`MOST_DISCREPANCIES`."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.discrepancies: list[Discrepancy] = []
        #: address spaces that are being forked, are exiting, are changing their VMAs, or cannot be read; counters of
        #: objects that they share may differ for a moment from what they count
        self.unsettled: set[int] = set()
        #: number of errors that were not kept
        self.unlisted = 0

    def add(
        self,
        kind: DiscrepancyKind,
        where: Where,
        values: Values,
        sentence: str,
        severity: Severity = Severity.ERROR,
    ) -> None:
        """Note a discrepancy.

        An error becomes "in motion" if it concerns a process that is starting or exiting, or if it is of a kind that
        a change of one of its address spaces explains.
        """
        process = where.process
        transient = kind in _TRANSIENT and not self.unsettled.isdisjoint(where.mms)
        if severity is Severity.ERROR and (transient or (process is not None and not process.pid)):
            severity = Severity.IN_MOTION
        if severity is not Severity.ERROR and len(self.discrepancies) >= MOST_DISCREPANCIES // 2:
            return  # the other half is reserved for errors
        if len(self.discrepancies) >= MOST_DISCREPANCIES:
            self.unlisted += 1
            return
        self.discrepancies.append(
            Discrepancy(
                kind=kind,
                severity=severity,
                process=str(process) if process else "",
                vma=str(where.vma) if where.vma else "",
                address=where.address,
                pfn=where.pfn,
                expected=values.expected,
                actual=values.actual,
                sentence=sentence,
            )
        )

    def broken_links(self, process: Process, vma: Vma, sentence: str, *, tree_locked: bool = False) -> None:
        """Note that the links between a VMA and its anon_vmas contradict each other.

        It is in motion if the process is changing its VMAs.

        :param tree_locked: whether the lock of the anon_vma concerned is held, which makes it in motion as well.
        """
        changing = tree_locked or self._kernel.mmap_write_locked(process.mm)
        self.add(
            DiscrepancyKind.BROKEN_CHAIN,
            Where(vma.at, process, vma),
            Values(expected="consistent links", actual="inconsistent links"),
            sentence,
            Severity.IN_MOTION if changing else Severity.ERROR,
        )

    def unreadable(
        self,
        what: str,
        error: Unreadable,
        process: Process | None = None,
        vma: Vma | None = None,
        severity: Severity = Severity.ERROR,
    ) -> None:
        """Note that a structure cannot be read, because a pointer in it does not point to memory.

        :param what: names the structure and its owner; the sentence begins with it.
        """
        self.add(
            DiscrepancyKind.BAD_POINTER,
            Where(error.address, process, vma),
            Values(expected="memory", actual="none"),
            f"{what} cannot be read: {error}",
            severity,
        )
