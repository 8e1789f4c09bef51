# SPDX-License-Identifier: GPL-2.0
"""Walks the page tables of a process, and has every entry in them checked."""

from __future__ import annotations

import contextlib

from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.kernel import VM_HUGETLB, VM_IO, VM_PFNMAP, Process, Vma
from harness.audit.ledger import Values, Where
from harness.audit.memory import Unreadable
from harness.audit.neighbours import apart
from harness.audit.pages import MappedVma, PageChecks
from harness.audit.pagetable import Entry, EntryKind, Table
from harness.audit.result import Region
from harness.audit.spaces import AddressSpaces
from harness.audit.vma_links import VmaLinkChecks


class EntryChecks:
    """Checks the page tables of processes.

    :param spaces: the VMAs.
    :param links: checks how each VMA is linked to its anon_vmas.
    :param pages: checks each entry inside a VMA.
    """

    def __init__(self, context: Context, spaces: AddressSpaces, links: VmaLinkChecks, pages: PageChecks) -> None:
        self._context = context
        self._spaces = spaces
        self._links = links
        self._pages = pages
        #: the anonymous VMAs that were met
        self.regions: list[Region] = []

    def check(self, process: Process) -> None:
        """Check all VMAs of a process, all entries inside them, and that there is no entry between them."""
        context = self._context
        context.counts["processes"] += 1
        try:
            pgd = context.memory.translate(context.memory.u64(process.mm + context.layout["mm_struct.pgd"]))
        except Unreadable as error:
            context.ledger.unreadable(f"the top page table of {process}", error, process)
            return
        table = self._table_reader()
        before: Vma | None = None
        checked_until = 0
        for vma in self._spaces.of(process):
            self._check_gap(process, pgd, checked_until, vma.start, table)
            checked_until = max(checked_until, vma.end)
            self._check_vma(process, pgd, before, vma, table)
            before = vma
        self._check_gap(process, pgd, checked_until, context.kernel.tables.user_end, table)

    def _table_reader(self) -> Table:
        """Reads page tables of one process, each for one address range only.

        A damaged table may point back to a table above it. Following such a loop would take for ever.
        """
        bases: dict[int, int] = {}

        def table(at: int, offset: int, size: int, base: int) -> bytes:
            if bases.setdefault(at, base) != base:
                raise Unreadable(at, "is used as a page table for two address ranges")
            return self._context.memory.physical(at + offset, size)

        return table

    def _check_vma(self, process: Process, pgd: int, before: Vma | None, vma: Vma, table: Table) -> None:
        context = self._context
        context.counts["vmas"] += 1
        linked = self._links.check(process, vma)
        if not vma.ops or vma.anon_vma:
            self._note_region(process, before, vma)
        if vma.flags & (VM_IO | VM_PFNMAP | VM_HUGETLB):
            context.counts["vmas_left_out"] += 1
            return
        area = MappedVma(process, vma, linked)
        try:
            for address, entry in context.kernel.tables.scan(pgd, vma.start, vma.end, table):
                self._pages.check(area, address, entry)
        except Unreadable as error:
            context.ledger.unreadable(f"the page tables of {process} for VMA {vma}", error, process, vma)

    def _note_region(self, process: Process, before: Vma | None, vma: Vma) -> None:
        context = self._context
        self.regions.append(
            Region(
                pid=process.pid,
                process=str(process),
                start=vma.start,
                end=vma.end,
                pgoff=vma.anon_pgoff,
                anon_vma=vma.anon_vma,
                flags=vma.flags,
                apart=apart(before, vma, context.rmap, context.kernel.page_shift) if before else (),
            )
        )

    def _check_gap(self, process: Process, pgd: int, start: int, end: int, table: Table) -> None:
        """Note every entry in a range without a VMA. There must be none, because rmap walks cannot find it."""
        try:
            for address, entry in self._context.kernel.tables.scan(pgd, start, end, table):
                self._note_stray(process, address, entry)
        except Unreadable as error:
            self._context.ledger.unreadable(
                f"the page tables of {process} for the gap {start:x}-{end:x} between VMAs", error, process
            )

    def _note_stray(self, process: Process, address: int, entry: Entry) -> None:
        context = self._context
        what, pfn = "has a swap, migration or marker entry", None
        if entry.kind is EntryKind.PAGE:
            what, pfn = f"maps pfn {entry.pfn:#x}", entry.pfn
            with contextlib.suppress(Unreadable):
                if not entry.special:
                    context.folios.of(entry.pfn).seen += 1  # the page's mapcount includes this entry
        # munmap() removes VMAs from the VMA tree first and clears their entries afterwards. By then it may hold
        # mmap_lock for reading only (vms_complete_munmap_vmas(), mm/vma.c).
        held = context.kernel.held(process.mm)
        context.ledger.add(
            DiscrepancyKind.STRAY_ENTRY,
            Where(address, process, pfn=pfn),
            Values(expected="no entry", actual=f"pfn {pfn:#x}" if pfn is not None else "an entry"),
            f"{process} {what} at {address:#x}, where it has no VMA: rmap walks cannot find this entry, and no unmap "
            "will clear it",
            Severity.IN_MOTION if held else Severity.ERROR,
        )
