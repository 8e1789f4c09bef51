# SPDX-License-Identifier: GPL-2.0
"""The audit: proves for each present anonymous page-table entry that the kernel's reverse walk leads back to it."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace

from harness.audit.backwards import Backwards
from harness.audit.chain import Endless, chain
from harness.audit.findings import Audit, Counts, Kind, Page, Region, Severity
from harness.audit.folios import ANON, KSM, Folio, Folios
from harness.audit.kernel import VM_HUGETLB, VM_IO, VM_MIXEDMAP, VM_PFNMAP, VM_SHARED, Kernel, Process, Vma
from harness.audit.layout import Layout
from harness.audit.ledger import Ledger
from harness.audit.memory import DumpError, Image, Unreadable
from harness.audit.neighbours import apart
from harness.audit.pagetable import Entry, Table
from harness.audit.pagetable import Kind as EntryKind
from harness.audit.rmap import ReverseMap

_MASK = (1 << 64) - 1

#: decides whether a page is kept in Audit.pages: process, address
Keep = Callable[[int, int], bool]


def audit(
    image: Image, layout: Layout, *, pids: Collection[int] = (), keep: Keep = lambda pid, address: False
) -> Audit:
    """Audit a guest's memory.

    :param layout: of the kernel that ran in it.
    :param pids: audit these processes and their descendants alone; none for all. What can only be told from a whole
        guest (whether the kernel counts a mapping that does not exist) is then left out.
    :param keep: which pages to list in the result.
    :raises DumpError: if the dump is damaged, or of another kernel, or has no such process.
    """
    began = time.monotonic()
    result = _Auditor(Kernel(image, layout), pids, keep).run()
    return replace(result, seconds=time.monotonic() - began)


class _Auditor:
    def __init__(self, kernel: Kernel, pids: Collection[int], keep: Keep) -> None:
        self._kernel = kernel
        self._memory = kernel.memory
        self._layout = kernel.layout
        self._keep = keep
        self._whole = not pids
        self._rmap = ReverseMap(kernel)
        self._counts: Counter[str] = Counter()
        self._ledger = Ledger(kernel)
        self._folios = Folios(kernel)
        self._pages: list[Page] = []
        self._regions: list[Region] = []
        everybody = {each.mm: each for each in kernel.processes()}
        self._processes = dict(everybody)
        missing = set(pids).difference(*({each.pid, *each.sharing} for each in everybody.values()))
        if missing:
            raise DumpError(
                f"no process {', '.join(map(str, sorted(missing)))} with memory of its own is there: nothing of it can "
                "be audited. Give processes that ran at that instant, or none for all"
            )
        self._chosen = {
            mm: each for mm, each in everybody.items() if self._whole or not {each.pid, *each.sharing}.isdisjoint(pids)
        }
        while not self._whole:  # descendants
            known = {pid for each in self._chosen.values() for pid in (each.pid, *each.sharing)}
            more = {mm: each for mm, each in everybody.items() if each.parent in known and mm not in self._chosen}
            if not more:
                break
            self._chosen |= more
        #: VMAs by where the kernel keeps them, and by address space
        self._vmas: dict[int, Vma] = {}
        self._spaces: dict[int, list[Vma]] = {}
        #: address spaces whose VMAs cannot be read
        self._unread: set[int] = set()
        #: VMAs whose lists of chain links were followed, and what they hold: anon_vma_chains
        self._followed: set[int] = set()
        self._linked: set[int] = set()
        #: frame of the huge zero page; 0 as long as none was met
        self._huge_zero = 0
        #: (mm, address) of present KSM pages
        self._ksm_places: dict[tuple[int, int], int] = {}

    def run(self) -> Audit:
        self._read_spaces()
        self._adopt()
        self._ledger.unsettled = {mm for mm, each in self._processes.items() if self._is_changing(each)} | self._unread
        for mm, process in self._processes.items():
            # Where no VMA is known, every entry would look like one that has none.
            if mm not in self._unread and (mm in self._chosen or (self._whole and not process.pid)):
                self._audit_space(process)
        backwards = Backwards(
            self._kernel,
            self._rmap,
            self._folios,
            self._ledger,
            self._processes,
            self._vmas,
            self._ksm_places if self._whole else None,
            lambda link: link.vma.at not in self._followed or link.at in self._linked,
        )
        backwards.check_stable_nodes()
        backwards.check_ksm_lists()
        backwards.check_trees()
        if self._whole:
            backwards.check_mapcounts()
            backwards.check_anon_vmas()
        self._counts["rmap_items"] = backwards.rmap_items
        self._counts["anon_vmas"] = len(self._rmap.anon_vmas)
        self._counts["stable_nodes"] = len(self._rmap.stable_nodes)
        return Audit(
            release=self._kernel.facts.release,
            arch=self._layout.arch,
            counts=Counts(**self._counts),
            findings=tuple(self._ledger.findings),
            unlisted=self._ledger.unlisted,
            page_size=self._kernel.page_size,
            regions=tuple(self._regions),
            pages=tuple(self._pages),
        )

    # --- address spaces ----------------------------------------------------------------------------------------------

    def _read_spaces(self) -> None:
        for process in list(self._processes.values()):
            try:
                vmas = self._kernel.vmas(process.mm)
            except Unreadable as error:
                self._ledger.bad_pointer(process, error, "its tree of VMAs")
                vmas = []
                self._unread.add(process.mm)
            self._read_space(process, vmas)

    def _read_space(self, process: Process, vmas: list[Vma]) -> None:
        self._processes[process.mm] = process
        self._spaces[process.mm] = vmas
        self._vmas |= {vma.at: vma for vma in vmas}
        for vma in vmas:
            if vma.mm != process.mm or vma.start >= vma.end:
                self._ledger.add(
                    Kind.BROKEN_CHAIN,
                    process,
                    vma,
                    vma.at,
                    None,
                    f"a VMA of mm {process.mm:#x}",
                    f"mm {vma.mm:#x}, {vma}",
                    "the tree of VMAs of {process} holds one that is not its own, or is empty",
                )

    def _adopt(self) -> None:
        """Find the address spaces and VMAs that are there although no task or no tree has them: yet, or any more."""
        slot = self._layout.offsets.get("mm_slot.mm")
        if slot is not None:
            # KSM knows a process until ksmd comes by after its end, and holds its struct mm_struct (__ksm_exit()).
            with contextlib.suppress(Unreadable):
                for at in self._kernel.ksm_slots():
                    self._adopt_space(self._memory.u64(at + self._layout["ksm_mm_slot.slot"] + slot))
        queue = [vma.anon_vma for vmas in self._spaces.values() for vma in vmas if vma.anon_vma]
        while queue:
            at = queue.pop()
            if at in self._rmap.anon_vmas:
                continue
            anon_vma = self._rmap.anon_vma(at)
            if anon_vma is None or not anon_vma.links:
                continue
            # Who has a VMA in its tree has one in that of its parent, which is therefore there; KSM alone may hold an
            # anon_vma without VMAs, and does not hold its parent.
            queue.append(anon_vma.parent)
            for link in anon_vma.links.values():
                mm = link.vma.mm
                queue += [vma.anon_vma for vma in self._adopt_space(mm) if vma.anon_vma]
                if link.vma.at not in self._vmas and mm in self._processes and self._kernel.held(mm):
                    # munmap() takes a VMA out of the tree of VMAs first, and out of the anon_vmas last; readers may
                    # share the lock in between (vms_complete_munmap_vmas(), mm/vma.c).
                    self._vmas[link.vma.at] = link.vma
                    queue += [link.vma.anon_vma] if link.vma.anon_vma else []

    def _adopt_space(self, mm: int) -> list[Vma]:
        """Read an address space that no task has, unless it was read; returns what is new."""
        if mm in self._spaces:
            return []
        # exit_mmap() takes the pages first, then the anon_vmas, and the tree of VMAs last: as long as something leads
        # here, all of it is there. What is not an address space at all is reported as stale.
        self._spaces[mm] = []
        with contextlib.suppress(Unreadable, DumpError):
            # A process in the middle of fork() has VMAs of its parent in its tree until their copies are ready.
            own = [each for each in self._kernel.vmas(mm) if each.mm == mm]
            if own:
                self._read_space(Process(0, 0, "", mm), own)
        return self._spaces[mm]

    def _is_changing(self, process: Process) -> bool:
        """Whether a process is being forked, is ending, or is changing its VMAs."""
        if not process.pid:
            return True
        try:
            return self._kernel.locked_for_writing(process.mm + self._layout["mm_struct.mmap_lock"])
        except Unreadable:
            return False

    def _audit_space(self, process: Process) -> None:
        self._counts["processes"] += 1
        try:
            pgd = self._memory.translate(self._memory.u64(process.mm + self._layout["mm_struct.pgd"]))
        except Unreadable as error:
            self._ledger.bad_pointer(process, error, "its page tables")
            return
        places: dict[int, int] = {}

        def table(at: int, offset: int, size: int, base: int) -> bytes:
            # A table that serves two ranges of addresses is no table: following it might never end.
            if places.setdefault(at, base) != base:
                raise Unreadable(at, "is a table in two places")
            return self._memory.physical(at + offset, size)

        before: Vma | None = None
        behind = 0  # the end of what was looked at
        for vma in self._spaces[process.mm]:
            self._audit_gap(process, pgd, behind, vma.start, table)
            behind = max(behind, vma.end)
            self._counts["vmas"] += 1
            anonymous = not vma.ops or bool(vma.anon_vma)
            chain = self._check_chain(process, vma)
            if anonymous:
                reasons = apart(before, vma, self._rmap, self._kernel.page_shift) if before else ()
                self._regions.append(
                    Region(
                        process.pid, str(process), vma.start, vma.end, vma.anon_pgoff, vma.anon_vma, vma.flags, reasons
                    )
                )
            before = vma
            if vma.flags & (VM_IO | VM_PFNMAP | VM_HUGETLB):
                self._counts["vmas_left_out"] += 1
                continue
            try:
                for address, entry in self._kernel.tables.scan(pgd, vma.start, vma.end, table):
                    self._audit_entry(process, vma, chain, address, entry)
            except Unreadable as error:
                self._ledger.bad_pointer(process, error, f"its page tables for {vma}", vma)
        self._audit_gap(process, pgd, behind, self._kernel.tables.user_end, table)

    def _audit_gap(self, process: Process, pgd: int, start: int, end: int, table: Table) -> None:
        """Note every entry between two VMAs: there must be none, and no reverse walk comes by it."""
        try:
            for address, entry in self._kernel.tables.scan(pgd, start, end, table):
                self._note_stray(process, address, entry)
        except Unreadable as error:
            self._ledger.bad_pointer(process, error, f"its page tables for {start:x}-{end:x}, where no VMA is,")

    def _note_stray(self, process: Process, address: int, entry: Entry) -> None:
        what, pfn = "holds a swap, migration or marker entry", None
        if entry.kind is EntryKind.PAGE:
            what, pfn = f"maps pfn {entry.pfn:#x}", entry.pfn
            with contextlib.suppress(Unreadable):
                if not entry.special:
                    self._folios.of(entry.pfn).seen += 1  # the kernel counts it as long as it is there
        # munmap() takes VMAs out of their tree first and their pages then, and readers may share the lock by that time
        # (vms_complete_munmap_vmas(), mm/vma.c).
        held = self._kernel.held(process.mm)
        self._ledger.add(
            Kind.STRAY_ENTRY,
            process,
            None,
            address,
            pfn,
            "no entry",
            f"pfn {entry.pfn:#x}" if pfn is not None else "an entry",
            f"{process} {what} at {address:#x}, where it has no VMA: no reverse walk comes by it, and nothing will "
            "ever take it away",
            Severity.IN_MOTION if held else Severity.ERROR,
        )

    def _check_chain(self, process: Process, vma: Vma) -> frozenset[int]:
        """The anon_vmas a VMA belongs to.

        A fault notes the first one and links it under its lock, and shares mmap_lock (__anon_vma_prepare(), mm/rmap.c).
        """
        layout, memory = self._layout, self._memory
        head = vma.at + layout["vm_area_struct.anon_vma_chain"]
        found: list[int] = []
        offset = layout["anon_vma_chain.same_vma"]
        try:
            for link in chain(memory.u64(head), memory.u64, head):
                at = link - offset
                if memory.u64(at + layout["anon_vma_chain.vma"]) != vma.at:
                    self._ledger.broken(
                        process, vma, f"a chain link of {vma} of {process}, at {at:#x}, names another VMA"
                    )
                self._linked.add(at)
                anon_vma = self._rmap.anon_vma(memory.u64(at + layout["anon_vma_chain.anon_vma"]))
                if anon_vma is None:
                    self._ledger.broken(
                        process, vma, f"a chain link of {vma} of {process}, at {at:#x}, leads to no anon_vma"
                    )
                    continue
                if anon_vma.at in found:
                    self._ledger.broken(
                        process,
                        vma,
                        f"{vma} of {process} belongs to anon_vma {anon_vma.at:#x} twice, by its chain link at {at:#x} "
                        "and another one: walks come by its pages twice",
                        self._rmap.locked(anon_vma),
                    )
                found.append(anon_vma.at)
                if at + layout["anon_vma_chain.rb"] not in anon_vma.links:
                    self._ledger.broken(
                        process,
                        vma,
                        f"{vma} of {process} belongs to anon_vma {anon_vma.at:#x}, but its chain link at {at:#x} "
                        "is not in the tree of that anon_vma: the kernel cannot find its pages",
                        self._rmap.locked(anon_vma),
                    )
            self._followed.add(vma.at)
        except Endless as error:
            self._ledger.broken(process, vma, f"the list of anon_vmas of {vma} of {process} does not end: {error}")
        except Unreadable as error:
            self._ledger.bad_pointer(process, error, f"the list of anon_vmas of {vma}", vma)
        if vma.anon_vma and vma.anon_vma not in found:
            own = self._rmap.anon_vma(vma.anon_vma)
            self._ledger.broken(
                process,
                vma,
                f"{vma} of {process} puts new pages into anon_vma {vma.anon_vma:#x}, which it is not in",
                own is not None and self._rmap.locked(own),
            )
        return frozenset(found)

    # --- entries -----------------------------------------------------------------------------------------------------

    def _audit_entry(self, process: Process, vma: Vma, chain: frozenset[int], address: int, entry: Entry) -> None:
        if entry.kind is EntryKind.ABSENT:
            self._counts[self._absent(entry.swap_type)] += 1
            return
        if entry.special:
            self._counts["other"] += 1
            return
        try:
            folio = self._folios.of(entry.pfn)
        except Unreadable:
            self._ledger.add(
                Kind.BAD_POINTER,
                process,
                vma,
                address,
                entry.pfn,
                "a page of memory",
                f"pfn {entry.pfn:#x}",
                f"{process} maps pfn {entry.pfn:#x} at {address:#x}, and there is no such page",
            )
            return
        pages = entry.size >> self._kernel.page_shift
        nameless = not folio.mapping & ANON
        if nameless and (not self._is_anonymous(vma, entry) or self._is_huge_zero(folio, pages)):
            self._counts["other"] += 1
            return
        folio.seen += 1
        ksm = folio.mapping & KSM == KSM
        self._counts["anonymous"] += 1
        self._counts["ksm"] += ksm
        self._counts["huge"] += pages > 1
        if nameless:
            reached, index = self._audit_nameless(process, vma, folio, address, entry.pfn)
        elif ksm:
            reached, index = self._audit_ksm(process, vma, folio, address, chain)
        else:
            reached, index = self._audit_anon(process, vma, folio, address, entry.pfn, chain)
        if self._keep(process.pid, address):
            self._pages.append(Page(process.pid, address, entry.pfn, pages, ksm, reached, index))

    def _is_anonymous(self, vma: Vma, entry: Entry) -> bool:
        """Whether an entry must be for an anonymous page: the page's own word for it is what is audited.

        A private mapping of a file has pages of the file, which are never writable there, and anonymous ones for what
        was written to (do_cow_fault(), can_change_private_pte_writable(), mfill_atomic_install_pte()).
        """
        if vma.flags & VM_MIXEDMAP:
            return False
        return not vma.ops or (entry.writable and not vma.flags & VM_SHARED)

    def _is_huge_zero(self, folio: Folio, pages: int) -> bool:
        """Whether an entry maps the huge zero page, of which there is one, and whose mappings nobody counts.

        Its entries are special in 7.3, and look like any other in 6.12 (set_huge_zero_folio()).
        """
        if pages == 1 or folio.pages == 1 or folio.mapping or folio.mapcount:
            return False
        self._huge_zero = self._huge_zero or folio.pfn
        return folio.pfn == self._huge_zero

    def _audit_nameless(self, process: Process, vma: Vma, folio: Folio, address: int, pfn: int) -> tuple[bool, int]:
        self._ledger.add(
            Kind.UNREACHABLE,
            process,
            vma,
            address,
            pfn,
            "an anon_vma or a stable node",
            f"{folio.mapping:#x}",
            f"pfn {pfn:#x}, mapped by {process} at {address:#x} in {vma}, which is "
            f"{'private, and writable there,' if vma.ops else 'anonymous,'} does not say that it is anonymous: its "
            f"mapping is {folio.mapping:#x}, and the kernel cannot find this mapping",
            self._severity(folio, process, 0),
        )
        return False, folio.index + pfn - folio.pfn

    def _absent(self, swap_type: int) -> str:
        """What an entry that is not present stands for (include/linux/swap.h: files first, then these)."""
        first = self._layout.swap_files
        if swap_type < first:
            return "swap"
        migration = first + bool(self._layout.symbols.get("memory_failure"))
        return "migration" if migration <= swap_type < migration + 3 else "special"

    def _audit_anon(
        self, process: Process, vma: Vma, folio: Folio, address: int, pfn: int, chain: frozenset[int]
    ) -> tuple[bool, int]:
        at = folio.mapping & ~KSM & _MASK
        index = folio.index + pfn - folio.pfn
        wanted = vma.index(address, self._kernel.page_shift)
        reached = self._rmap.reaches(at, folio.index, folio.pages, vma, address)
        if reached and index == wanted:
            return True, index
        where = f"pfn {pfn:#x}, mapped by {process} at {address:#x} in {vma}"
        severity = self._severity(folio, process, at)
        if at not in chain:
            self._ledger.add(
                Kind.FOREIGN_ANON_VMA,
                process,
                vma,
                address,
                pfn,
                " ".join(f"{each:#x}" for each in sorted(chain)) or "none",
                f"{at:#x}",
                f"{where}, names anon_vma {at:#x}, which its VMA does not belong to: "
                + ("the walk comes by it all the same" if reached else "the kernel cannot find this mapping"),
                severity,
            )
        elif index != wanted:
            self._ledger.add(
                Kind.WRONG_INDEX,
                process,
                vma,
                address,
                pfn,
                f"{wanted:#x}",
                f"{index:#x}",
                f"{where}, has index {index:#x} where that address has {wanted:#x}: "
                + ("the walk comes by it by luck" if reached else "the kernel cannot find this mapping"),
                severity,
            )
        else:
            self._ledger.add(
                Kind.UNREACHABLE,
                process,
                vma,
                address,
                pfn,
                f"the link of {vma} under index {index:#x}",
                "not found",
                f"{where}: the search of anon_vma {at:#x} for index {index:#x} does not come by its VMA, so the "
                "kernel cannot find this mapping",
                severity,
            )
        return reached, index

    def _audit_ksm(
        self, process: Process, vma: Vma, folio: Folio, address: int, chain: frozenset[int]
    ) -> tuple[bool, int]:
        self._ksm_places[process.mm, address] = folio.pfn
        where = f"KSM's pfn {folio.pfn:#x}, mapped by {process} at {address:#x} in {vma}"
        at = folio.mapping & ~KSM & _MASK
        node = self._rmap.stable_node(at)
        severity = Severity.IN_MOTION if self._kernel.ksm_at_work else self._severity(folio, process, 0)
        if node is None:
            self._ledger.add(
                Kind.UNREACHABLE,
                process,
                vma,
                address,
                folio.pfn,
                "a stable node",
                f"{at:#x}",
                f"{where}, has no stable node: the kernel cannot find this mapping",
                severity,
            )
            return False, -1
        if node.pfn != folio.pfn:
            self._ledger.add(
                Kind.STALE_RMAP_ITEM,
                process,
                vma,
                address,
                folio.pfn,
                f"{folio.pfn:#x}",
                f"{node.pfn:#x}",
                f"{where}, names the stable node at {at:#x}, which is of pfn {node.pfn:#x}: KSM takes it for freed",
                severity,
            )
        if (process.mm, address) in self._rmap.ksm_places(node):
            index = next((each.index for each in node.items if (each.mm, each.address) == (process.mm, address)), None)
            return True, -1 if index is None else index
        # Why not: an item that is for this place but searches elsewhere, or none at all.
        wanted = vma.index(address, self._kernel.page_shift)
        own = [each for each in node.items if each.address == address and each.mm == process.mm]
        foreign = [each for each in own if each.anon_vma not in chain]
        if foreign:
            self._ledger.add(
                Kind.FOREIGN_ANON_VMA,
                process,
                vma,
                address,
                folio.pfn,
                " ".join(f"{each:#x}" for each in sorted(chain)) or "none",
                f"{foreign[0].anon_vma:#x}",
                f"{where}: its rmap item names anon_vma {foreign[0].anon_vma:#x}, which the VMA does not belong to: "
                "the kernel cannot find this mapping",
                severity,
            )
        elif own and own[0].index is not None and own[0].index != wanted:
            self._ledger.add(
                Kind.WRONG_INDEX,
                process,
                vma,
                address,
                folio.pfn,
                f"{wanted:#x}",
                f"{own[0].index:#x}",
                f"{where}: its rmap item searches index {own[0].index:#x} where that address has {wanted:#x}: the "
                "kernel cannot find this mapping",
                severity,
            )
        else:
            known = ", ".join(f"{each.address:#x} of mm {each.mm:#x}" for each in node.items[:8]) or "nothing"
            self._ledger.add(
                Kind.UNREACHABLE,
                process,
                vma,
                address,
                folio.pfn,
                f"an rmap item for {address:#x} of mm {process.mm:#x}",
                known,
                f"{where}: none of the {len(node.items)} rmap items of its stable node leads there (they are for "
                f"{known}), so the kernel cannot find this mapping",
                severity,
            )
        return False, own[0].index if own and own[0].index is not None else -1

    def _severity(self, folio: Folio, process: Process, anon_vma: int) -> Severity:
        """Whether what looks wrong may be half a change: its locks are held."""
        if folio.locked or self._kernel.locked_for_writing(process.mm + self._layout["mm_struct.mmap_lock"]):
            return Severity.IN_MOTION
        known = self._rmap.anon_vma(anon_vma) if anon_vma else None
        return Severity.IN_MOTION if known is not None and self._rmap.locked(known) else Severity.ERROR


def pages_between(ranges: Iterable[tuple[int, int, int]]) -> Keep:
    """Keeps the pages of some address ranges: (process, start, end)."""
    wanted = tuple(ranges)
    return lambda pid, address: any(who == pid and start <= address < end for who, start, end in wanted)
