# SPDX-License-Identifier: GPL-2.0
"""What an audit says: typed records of what is wrong, and of what was looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

#: findings kept of one audit; a broken kernel may have one for each page
MOST_FINDINGS = 1000


class Kind(StrEnum):
    """What is wrong. Only the notes can be seen on a healthy kernel."""

    #: the kernel's own walk from the page does not come by this page-table entry
    UNREACHABLE = "unreachable mapping"
    #: the page's index, or that of its rmap item, is not the index of the address it is mapped at
    WRONG_INDEX = "wrong index"
    #: the page names an anon_vma that its mapping does not belong to
    FOREIGN_ANON_VMA = "foreign anon_vma"
    #: an rmap item, a stable node or a chain link that leads to something that is not there
    STALE_RMAP_ITEM = "stale rmap item"
    #: a list or tree of the reverse map that contradicts itself
    BROKEN_CHAIN = "broken chain"
    #: a counter that does not fit what was counted
    COUNT_MISMATCH = "count mismatch"
    #: a page-table entry where its process has no VMA: left behind by who moved or unmapped it
    STRAY_ENTRY = "stray entry"
    #: a page-table entry that leads to no page, or a pointer to no memory
    BAD_POINTER = "bad pointer"


class Severity(StrEnum):
    """How much a finding weighs."""

    #: the kernel is wrong
    ERROR = "error"
    #: it may be wrong, but what it is about is locked, so the kernel may be in the middle of changing it
    IN_MOTION = "in motion"
    #: the kernel tidies this up later, by design
    NOTE = "note"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    kind: Kind
    severity: Severity
    #: "comm[pid]"; empty if it is about no process
    process: str
    #: "start-end"; empty if it is about no VMA
    vma: str
    #: of the page-table entry, or of the kernel object where there is none
    address: int
    #: of the page; None if there is none
    pfn: int | None
    #: the two values that disagree
    expected: str
    actual: str
    #: says it all in words
    sentence: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence}"


@dataclass(frozen=True)
class Page:
    """One present anonymous page-table entry, and what the audit found out about it."""

    pid: int
    address: int
    pfn: int
    #: mapped by a page-middle entry: covers ``pages`` pages
    pages: int
    ksm: bool
    #: whether the kernel's walk comes by it
    reached: bool
    #: of its folio, at this page; -1 for KSM before the index was stored
    index: int


@dataclass(frozen=True)
class Region:
    """A VMA as the audit saw it."""

    pid: int
    process: str
    start: int
    end: int
    #: page offset of its start in the anonymous index space
    pgoff: int
    anon_vma: int
    flags: int
    #: what it is not, in words, for a person: why it did not merge with the one before it; empty if not adjacent
    apart: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in /proc/PID/maps."""
        return f"{self.start:x}-{self.end:x}"


@dataclass(frozen=True)
class Counts:
    """What was looked at; none of it may silently be nothing."""

    processes: int = 0
    vmas: int = 0
    #: present anonymous entries, page-middle ones counted once
    anonymous: int = 0
    ksm: int = 0
    huge: int = 0
    #: present entries of files and of special pages such as the zero page: they have another reverse map, or none
    other: int = 0
    swap: int = 0
    migration: int = 0
    #: hwpoison, device-private, and marker entries
    special: int = 0
    #: VMAs that were left out: hugetlb and device memory
    vmas_left_out: int = 0
    anon_vmas: int = 0
    stable_nodes: int = 0
    rmap_items: int = 0


@dataclass(frozen=True)
class Audit:
    """The result of auditing one dump."""

    release: str
    arch: str
    counts: Counts
    findings: tuple[Finding, ...]
    #: findings beyond MOST_FINDINGS
    unlisted: int
    #: bytes
    page_size: int = 4096
    regions: tuple[Region, ...] = ()
    pages: tuple[Page, ...] = ()
    #: seconds it took, from opening the dump
    seconds: float = field(default=0.0, compare=False)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that are the kernel's fault."""
        return tuple(each for each in self.findings if each.severity is Severity.ERROR)

    @property
    def summary(self) -> str:
        """One line: what was looked at, and what was found."""
        counts, wrong = self.counts, len(self.errors) + self.unlisted
        verdict = "the reverse map leads back to each of them" if not wrong else f"{wrong} finding{'s' * (wrong > 1)}"
        return (
            f"{counts.anonymous} anonymous page-table entries ({counts.ksm} of KSM, {counts.huge} huge) of "
            f"{counts.processes} processes: {verdict}"
        )

    def report(self) -> str:
        """Everything in words, several lines."""
        counts = self.counts
        lines = [f"{self.release} ({self.arch}): {self.summary}"]
        lines.append(
            f"accounted for separately: {counts.other} entries of files and special pages, {counts.swap} swap, "
            f"{counts.migration} migration, {counts.special} others; {counts.vmas_left_out} VMAs left out; seen on the "
            f"way: {counts.anon_vmas} anon_vmas, {counts.stable_nodes} stable nodes, {counts.rmap_items} rmap items"
        )
        for severity in Severity:
            lines += [f"{severity}: {each}" for each in self.findings if each.severity is severity]
        if self.unlisted:
            lines.append(f"… and {self.unlisted} more findings")
        return "\n".join(lines)
