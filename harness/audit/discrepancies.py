# SPDX-License-Identifier: GPL-2.0
"""Discrepancies: where the reverse map, the page tables and the kernel's counters contradict each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class DiscrepancyKind(StrEnum):
    """What is wrong. A healthy kernel shows only discrepancies of severity :attr:`Severity.NOTE`."""

    #: the kernel's rmap walk from the page does not find this page-table entry
    UNREACHABLE = "unreachable mapping"
    #: the index of the page, or of its rmap item, is not the index of the address where the page is mapped
    WRONG_INDEX = "wrong index"
    #: the page points to an anon_vma that its VMA is not linked to
    FOREIGN_ANON_VMA = "foreign anon_vma"
    #: an rmap item, a stable node or an anon_vma_chain points to something that no longer exists
    STALE_RMAP_ITEM = "stale rmap item"
    #: a list or a tree of the reverse map contradicts itself
    BROKEN_CHAIN = "broken chain"
    #: a counter differs from the number of things it counts
    COUNT_MISMATCH = "count mismatch"
    #: a page-table entry where its process has no VMA; a move or an unmap left it behind
    STRAY_ENTRY = "stray entry"
    #: a page-table entry for a page that does not exist, or a pointer that does not point to memory
    BAD_POINTER = "bad pointer"


class Severity(StrEnum):
    """How serious a discrepancy is."""

    #: the kernel is wrong
    ERROR = "error"
    #: a lock is held, so the kernel may be changing the objects concerned at this moment
    IN_MOTION = "in motion"
    #: the kernel is designed to clean this up later
    NOTE = "note"


@dataclass(frozen=True)
class Discrepancy:
    """One contradiction that the audit found."""

    kind: DiscrepancyKind
    severity: Severity
    #: "comm[pid]"; empty if no process is concerned
    process: str
    #: "start-end", hexadecimal; empty if no VMA is concerned
    vma: str
    #: the virtual address that the page-table entry maps; the address of the kernel object if there is no entry
    address: int
    #: the frame number of the page; None if no page is concerned
    pfn: int | None
    #: the value that the rest of the kernel's memory implies
    expected: str
    #: the value that was found
    actual: str
    #: the whole discrepancy, in words
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence}"
