# SPDX-License-Identifier: GPL-2.0
"""The result of an audit: what was examined, and which discrepancies were found."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.audit.discrepancies import Discrepancy, Severity


@dataclass(frozen=True)
class Page:
    """One present anonymous page-table entry, and what the audit found out about it."""

    pid: int
    address: int
    pfn: int
    #: base pages that the entry maps; more than 1 for a PMD entry
    pages: int
    ksm: bool
    #: whether the kernel's rmap walk finds the entry
    reached: bool
    #: the page's index in its anon_vma; -1 for a KSM page of a kernel that stores none (before 7.3)
    index: int


@dataclass(frozen=True)
class Region:
    """A VMA as the audit saw it."""

    pid: int
    process: str
    start: int
    end: int
    #: the index of its first page in the anon_vma, in pages
    pgoff: int
    anon_vma: int
    flags: int
    #: the reasons why it did not merge with the VMA before it; empty if the two are not adjacent
    apart: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The address range, as in /proc/PID/maps."""
        return f"{self.start:x}-{self.end:x}"


@dataclass(frozen=True)
class Counts:
    """How much was examined. A test of the audit checks these numbers, so that an empty audit cannot pass."""

    processes: int = 0
    vmas: int = 0
    #: present anonymous entries; a PMD entry counts once
    anonymous: int = 0
    ksm: int = 0
    huge: int = 0
    #: present entries of file pages, which have another reverse map, and of special pages, which have none
    other: int = 0
    swap: int = 0
    migration: int = 0
    #: hwpoison, device-private and marker entries
    special: int = 0
    #: VMAs that are not audited: hugetlb and device memory
    vmas_left_out: int = 0
    anon_vmas: int = 0
    stable_nodes: int = 0
    rmap_items: int = 0


@dataclass(frozen=True)
class Audit:
    """The result of auditing a guest's memory once."""

    release: str
    arch: str
    counts: Counts
    discrepancies: tuple[Discrepancy, ...]
    #: number of errors that are not in ``discrepancies``, because there were too many
    unlisted: int
    #: the kernel's page size in bytes
    page_size: int = 4096
    regions: tuple[Region, ...] = ()
    pages: tuple[Page, ...] = ()
    #: seconds that the audit took, from opening the dump
    seconds: float = field(default=0.0, compare=False)

    @property
    def errors(self) -> tuple[Discrepancy, ...]:
        """The discrepancies that show a kernel bug."""
        return tuple(each for each in self.discrepancies if each.severity is Severity.ERROR)

    @property
    def summary(self) -> str:
        """One line: what was audited, and how many errors there are."""
        counts, wrong = self.counts, len(self.errors) + self.unlisted
        verdict = f"{wrong} error{'s' * (wrong > 1)}" if wrong else "rmap walks find every one of them"
        return (
            f"{counts.anonymous} anonymous page-table entries ({counts.ksm} of KSM pages, {counts.huge} of huge pages) "
            f"in {counts.processes} processes: {verdict}"
        )

    def report(self) -> str:
        """The whole result in words, several lines."""
        counts = self.counts
        lines = [f"{self.release} ({self.arch}): {self.summary}"]
        lines.append(
            f"not audited: {counts.other} entries of files and special pages, {counts.swap} swap entries, "
            f"{counts.migration} migration entries, {counts.special} other non-present entries, and "
            f"{counts.vmas_left_out} VMAs of hugetlb or device memory"
        )
        lines.append(
            f"reverse map: {counts.anon_vmas} anon_vmas, {counts.stable_nodes} KSM stable nodes and "
            f"{counts.rmap_items} KSM rmap items were examined"
        )
        for severity in Severity:
            lines += [f"{severity}: {each}" for each in self.discrepancies if each.severity is severity]
        if self.unlisted:
            lines.append(f"… and {self.unlisted} more errors")
        return "\n".join(lines)
