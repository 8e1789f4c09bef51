# SPDX-License-Identifier: GPL-2.0
"""The audit: proves for each present anonymous page-table entry that the kernel's reverse walk leads back to it.

Then the other way round: what the reverse map holds must exist, and what the kernel counts must be what is there.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from harness.audit.findings import MOST_FINDINGS, Audit, Counts, Finding, Kind, Page, Region, Severity
from harness.audit.kernel import VM_HUGETLB, VM_IO, VM_PFNMAP, Kernel, Process, Vma
from harness.audit.layout import Layout
from harness.audit.memory import Image, Unreadable
from harness.audit.neighbours import apart
from harness.audit.pagetable import Entry
from harness.audit.pagetable import Kind as EntryKind
from harness.audit.rmap import MOST_LINKS, AnonVma, Link, ReverseMap, StableNode

#: the low bits of folio->mapping (include/linux/page-flags.h)
_ANON, _KSM = 1, 3
#: struct ksm_rmap_item.address: "is listed from the stable tree" (mm/ksm.c)
_STABLE_FLAG = 0x200
#: mm_slots and rmap items of one process that are followed
_MOST_SLOTS = 1 << 16
_MOST_ITEMS = 1 << 20
_MASK = (1 << 64) - 1

#: decides whether a page is kept in Audit.pages: process, address
Keep = Callable[[int, int], bool]


@dataclass(slots=True)
class _Folio:
    at: int
    pfn: int
    mapping: int
    index: int
    pages: int
    #: entries that map it, as the kernel counts
    mapcount: int
    locked: bool
    #: entries that were found
    seen: int = 0


def audit(
    image: Image, layout: Layout, *, pids: Collection[int] = (), keep: Keep = lambda pid, address: False
) -> Audit:
    """Audit a guest's memory.

    :param layout: of the kernel that ran in it.
    :param pids: audit these processes and their descendants alone; none for all. What can only be told from a whole
        guest (whether the kernel counts a mapping that does not exist) is then left out.
    :param keep: which pages to list in the result.
    :raises DumpError: if the dump is damaged, or of another kernel.
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
        self._findings: list[Finding] = []
        self._unlisted = 0
        self._folios: dict[int, _Folio | None] = {}
        self._pages: list[Page] = []
        self._regions: list[Region] = []
        everybody = {each.mm: each for each in kernel.processes()}
        self._processes = dict(everybody)
        self._chosen = everybody if self._whole else {mm: each for mm, each in everybody.items() if each.pid in pids}
        while not self._whole:  # descendants
            known = {each.pid for each in self._chosen.values()}
            more = {mm: each for mm, each in everybody.items() if each.parent in known and mm not in self._chosen}
            if not more:
                break
            self._chosen |= more
        #: VMAs by where the kernel keeps them, and by address space
        self._vmas: dict[int, Vma] = {}
        self._spaces: dict[int, list[Vma]] = {}
        #: (mm, address) of present KSM pages
        self._ksm_places: dict[tuple[int, int], int] = {}
        #: rmap items in the stable tree that hold a reference to an anon_vma
        self._held: Counter[int] = Counter()

    def run(self) -> Audit:
        for process in list(self._processes.values()):
            self._read_space(process)
        self._adopt()
        for mm, process in self._processes.items():
            if mm in self._chosen or (self._whole and not process.pid):
                self._audit_space(process)
        for node in self._rmap.stable_nodes.values():
            if node is not None:
                self._check_stable_node(node)
        self._check_ksm_lists()
        if self._whole:
            self._check_folios()
            self._check_anon_vmas()
        self._counts["anon_vmas"] = len(self._rmap.anon_vmas)
        self._counts["stable_nodes"] = len(self._rmap.stable_nodes)
        return Audit(
            release=self._kernel.facts.release,
            arch=self._layout.arch,
            counts=Counts(**self._counts),
            findings=tuple(self._findings),
            unlisted=self._unlisted,
            page_size=self._kernel.page_size,
            regions=tuple(self._regions),
            pages=tuple(self._pages),
        )

    # --- address spaces ----------------------------------------------------------------------------------------------

    def _read_space(self, process: Process) -> None:
        try:
            vmas = self._kernel.vmas(process.mm)
        except Unreadable as error:
            self._bad_pointer(process, error, "its tree of VMAs")
            vmas = []
        self._spaces[process.mm] = vmas
        self._vmas |= {vma.at: vma for vma in vmas}
        for vma in vmas:
            if vma.mm != process.mm or vma.start >= vma.end:
                self._add(
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
        """Find the address spaces that anon_vmas still lead to although their tasks have ended."""
        queue = [vma.anon_vma for vmas in self._spaces.values() for vma in vmas if vma.anon_vma]
        while queue:
            at = queue.pop()
            if at in self._rmap.anon_vmas:
                continue
            anon_vma = self._rmap.anon_vma(at)
            for link in anon_vma.links.values() if anon_vma else ():
                mm = link.vma.mm
                if mm in self._spaces:
                    continue
                try:
                    if self._memory.s32(mm + self._layout["mm_struct.mm_users"]) <= 0:
                        self._spaces[mm] = []  # it has been torn down: what leads here is reported as stale
                        continue
                except Unreadable:
                    self._spaces[mm] = []
                    continue
                process = Process(0, 0, "", mm)
                self._processes[mm] = process
                self._read_space(process)
                queue += [vma.anon_vma for vma in self._spaces[mm] if vma.anon_vma]

    def _audit_space(self, process: Process) -> None:
        self._counts["processes"] += 1
        try:
            pgd = self._memory.translate(self._memory.u64(process.mm + self._layout["mm_struct.pgd"]))
        except Unreadable as error:
            self._bad_pointer(process, error, "its page tables")
            return
        places: dict[int, int] = {}

        def table(at: int, offset: int, size: int, base: int) -> bytes:
            # A table that serves two ranges of addresses is no table: following it might never end.
            if places.setdefault(at, base) != base:
                raise Unreadable(at, "is a table in two places")
            return self._memory.physical(at + offset, size)

        before: Vma | None = None
        for vma in self._spaces[process.mm]:
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
                self._bad_pointer(process, error, f"its page tables for {vma}", vma)

    def _check_chain(self, process: Process, vma: Vma) -> frozenset[int]:
        """The anon_vmas a VMA belongs to."""
        layout, memory = self._layout, self._memory
        head = vma.at + layout["vm_area_struct.anon_vma_chain"]
        found: list[int] = []
        offset = layout["anon_vma_chain.same_vma"]
        try:
            link = memory.u64(head)
            while link != head:
                if len(found) > MOST_LINKS:
                    self._broken(process, vma, f"the list of anon_vmas of {vma} of {process} does not end")
                    break
                at = link - offset
                if memory.u64(at + layout["anon_vma_chain.vma"]) != vma.at:
                    self._broken(process, vma, f"a chain link of {vma} of {process}, at {at:#x}, names another VMA")
                anon_vma = self._rmap.anon_vma(memory.u64(at + layout["anon_vma_chain.anon_vma"]))
                if anon_vma is None:
                    self._broken(process, vma, f"a chain link of {vma} of {process}, at {at:#x}, leads to no anon_vma")
                else:
                    found.append(anon_vma.at)
                    if at + layout["anon_vma_chain.rb"] not in anon_vma.links:
                        self._broken(
                            process,
                            vma,
                            f"{vma} of {process} belongs to anon_vma {anon_vma.at:#x}, but its chain link at {at:#x} "
                            "is not in the tree of that anon_vma: the kernel cannot find its pages",
                        )
                link = memory.u64(link)
        except Unreadable as error:
            self._bad_pointer(process, error, f"the list of anon_vmas of {vma}", vma)
        if vma.anon_vma and vma.anon_vma not in found:
            self._broken(
                process, vma, f"{vma} of {process} puts new pages into anon_vma {vma.anon_vma:#x}, which it is not in"
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
            folio = self._folio(entry.pfn)
        except Unreadable:
            self._add(
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
        if not folio.mapping & _ANON:
            self._counts["other"] += 1
            return
        folio.seen += 1
        ksm = folio.mapping & _KSM == _KSM
        self._counts["anonymous"] += 1
        self._counts["ksm"] += ksm
        pages = entry.size >> self._kernel.page_shift
        self._counts["huge"] += pages > 1
        if ksm:
            reached, index = self._audit_ksm(process, vma, folio, address, chain)
        else:
            reached, index = self._audit_anon(process, vma, folio, address, entry.pfn, chain)
        if self._keep(process.pid, address):
            self._pages.append(Page(process.pid, address, entry.pfn, pages, ksm, reached, index))

    def _absent(self, swap_type: int) -> str:
        """What an entry that is not present stands for (include/linux/swap.h: files first, then these)."""
        first = self._layout.swap_files
        if swap_type < first:
            return "swap"
        migration = first + bool(self._layout.symbols.get("memory_failure"))
        return "migration" if migration <= swap_type < migration + 3 else "special"

    def _folio(self, pfn: int) -> _Folio:
        """The folio a frame belongs to.

        :raises Unreadable: if there is none.
        """
        page = self._kernel.page(pfn)
        offset = self._layout.offsets.get("page.compound_head", self._layout.offsets.get("page.compound_info", 8))
        link = self._memory.u64(page + offset)
        if link & 1:
            # From 7.0 on the link may be a mask to be laid over the tail's own address, larger than any address.
            page = link - 1 if link - 1 <= page else page & (link - 1)
        if page not in self._folios:
            self._folios[page] = None
            self._folios[page] = self._read_folio(page)
        found = self._folios[page]
        if found is None:
            raise Unreadable(page)
        return found

    def _read_folio(self, page: int) -> _Folio:
        layout = self._layout
        data = self._memory.read(page, layout.sizes["page"])
        (flags,) = struct.unpack_from("<Q", data, layout["page.flags"])
        (mapping,) = struct.unpack_from("<Q", data, layout["folio.mapping"])
        (index,) = struct.unpack_from("<Q", data, layout["folio.index"])
        (mapcount,) = struct.unpack_from("<i", data, layout["folio._mapcount"])
        pages = 1
        if flags >> layout.flags["PG_head"] & 1:
            order = self._memory.u64(page + layout["folio._flags_1"]) & 0xFF
            mapcount = self._memory.s32(page + layout["folio._large_mapcount"])
            pages = 1 << min(order, 20)
        locked = bool(flags >> layout.flags["PG_locked"] & 1)
        return _Folio(page, self._kernel.pfn(page), mapping, index, pages, mapcount + 1, locked)

    def _audit_anon(
        self, process: Process, vma: Vma, folio: _Folio, address: int, pfn: int, chain: frozenset[int]
    ) -> tuple[bool, int]:
        at = folio.mapping & ~_KSM & _MASK
        index = folio.index + pfn - folio.pfn
        wanted = vma.index(address, self._kernel.page_shift)
        reached = self._rmap.reaches(at, folio.index, folio.pages, vma, address)
        if reached and index == wanted:
            return True, index
        where = f"pfn {pfn:#x}, mapped by {process} at {address:#x} in {vma}"
        severity = self._severity(folio, process, at)
        if at not in chain:
            self._add(
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
            self._add(
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
            self._add(
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
        self, process: Process, vma: Vma, folio: _Folio, address: int, chain: frozenset[int]
    ) -> tuple[bool, int]:
        self._ksm_places[process.mm, address] = folio.pfn
        where = f"KSM's pfn {folio.pfn:#x}, mapped by {process} at {address:#x} in {vma}"
        at = folio.mapping & ~_KSM & _MASK
        node = self._rmap.stable_node(at)
        severity = self._severity(folio, process, 0)
        if node is None:
            self._add(
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
            self._add(
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
            self._add(
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
            self._add(
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
            self._add(
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

    def _severity(self, folio: _Folio, process: Process, anon_vma: int) -> Severity:
        """Whether what looks wrong may be half a change: its locks are held."""
        if folio.locked or self._kernel.locked_for_writing(process.mm + self._layout["mm_struct.mmap_lock"]):
            return Severity.IN_MOTION
        known = self._rmap.anon_vma(anon_vma) if anon_vma else None
        return Severity.IN_MOTION if known is not None and self._locked(known) else Severity.ERROR

    def _locked(self, anon_vma: AnonVma) -> bool:
        try:
            return self._kernel.locked_for_writing(anon_vma.root + self._layout["anon_vma.rwsem"])
        except Unreadable:
            return False

    # --- the other way round -----------------------------------------------------------------------------------------

    def _check_stable_node(self, node: StableNode) -> None:
        try:
            folio = self._folio(node.pfn)
            right = folio.mapping == node.at | _KSM
            locked = folio.locked
        except Unreadable:
            right = locked = False
        severity = Severity.IN_MOTION if locked else Severity.ERROR
        if not right:
            # A node does not hold its page: if the page was freed, KSM drops the node when it next comes by
            # (ksm_get_folio()). A page that is still mapped and names this node is another matter: _audit_ksm().
            self._node_finding(
                Kind.STALE_RMAP_ITEM,
                node,
                "its own page",
                f"pfn {node.pfn:#x}",
                "is for a page that is not its own any more; KSM will drop it",
                Severity.NOTE,
            )
        for trouble in node.troubles:
            self._node_finding(Kind.BROKEN_CHAIN, node, "a whole list", trouble, f"is damaged: {trouble}")
        if node.length != len(node.items):
            self._node_finding(
                Kind.COUNT_MISMATCH,
                node,
                str(len(node.items)),
                str(node.length),
                f"counts {node.length} rmap items and has {len(node.items)}",
                severity,
            )
        for item in node.items:
            if item.head != node.at:
                self._node_finding(
                    Kind.STALE_RMAP_ITEM,
                    node,
                    f"{node.at:#x}",
                    f"{item.head:#x}",
                    f"has an rmap item, for {item.address:#x} of mm {item.mm:#x}, that names another node",
                    severity,
                )
            anon_vma = self._rmap.anon_vma(item.anon_vma)
            if anon_vma is None or anon_vma.refcount <= 0:
                self._node_finding(
                    Kind.STALE_RMAP_ITEM,
                    node,
                    "a live anon_vma",
                    f"{item.anon_vma:#x}",
                    f"has an rmap item, for {item.address:#x} of mm {item.mm:#x}, whose anon_vma is gone",
                    severity,
                )
            elif self._whole and self._ksm_places.get((item.mm, item.address)) != node.pfn:
                # A page that is written to, moved or unmapped leaves its item behind until ksmd comes by again.
                self._node_finding(
                    Kind.STALE_RMAP_ITEM,
                    node,
                    f"pfn {node.pfn:#x} at {item.address:#x}",
                    "another page, or none",
                    f"has an rmap item for {item.address:#x} of mm {item.mm:#x}, where the page is not mapped any "
                    "more; ksmd will drop it",
                    Severity.NOTE,
                )

    def _node_finding(
        self,
        kind: Kind,
        node: StableNode,
        expected: str,
        actual: str,
        what: str,
        severity: Severity = Severity.ERROR,
    ) -> None:
        sentence = f"the stable node at {node.at:#x}, of pfn {node.pfn:#x}, {what}"
        self._add(kind, None, None, node.at, node.pfn, expected, actual, sentence, severity)

    def _check_ksm_lists(self) -> None:
        """Follow KSM's list of every process it knows: items that are nowhere mapped, but in the stable tree."""
        head = self._kernel.symbol("ksm_mm_head")
        if not head or not self._layout.has("ksm_mm_slot.slot"):
            return
        layout, memory = self._layout, self._memory
        node = layout["ksm_mm_slot.slot"] + layout["mm_slot.mm_node"]
        flag = layout["ksm_rmap_item.address"]
        try:
            slot = memory.u64(head + node) - node & _MASK
            for _ in range(_MOST_SLOTS):
                if slot == head:
                    break
                item = memory.u64(slot + layout["ksm_mm_slot.rmap_list"])
                for _ in range(_MOST_ITEMS):
                    if not item:
                        break
                    self._counts["rmap_items"] += 1
                    if memory.u64(item + flag) & _STABLE_FLAG:
                        self._check_listed(item)
                    item = memory.u64(item + layout["ksm_rmap_item.rmap_list"])
                else:
                    self._add_ksm_loop(slot)
                slot = memory.u64(slot + node) - node & _MASK
            else:
                self._add_ksm_loop(head)
        except Unreadable as error:
            self._bad_pointer(None, error, "KSM's list of rmap items")

    def _add_ksm_loop(self, at: int) -> None:
        sentence = f"KSM's list at {at:#x} does not end"
        self._add(Kind.BROKEN_CHAIN, None, None, at, None, "an end", "none", sentence)

    def _check_listed(self, at: int) -> None:
        item = self._rmap.item(at)
        self._held[item.anon_vma] += 1
        known = item.head in self._rmap.stable_nodes
        node = self._rmap.stable_node(item.head)
        if node is not None and not known:
            self._check_stable_node(node)
        if node is None or all(each.at != at for each in node.items):
            self._add(
                Kind.BROKEN_CHAIN,
                self._processes.get(item.mm),
                None,
                at,
                node.pfn if node else None,
                f"a place in the list of the stable node at {item.head:#x}",
                "none",
                f"the rmap item at {at:#x}, for {item.address:#x} of mm {item.mm:#x}, says it belongs to the stable "
                f"node at {item.head:#x}, which does not list it: the kernel cannot find this mapping",
            )

    def _check_folios(self) -> None:
        for folio in self._folios.values():
            if folio is None or not folio.mapping & _ANON or not folio.seen or folio.seen == folio.mapcount:
                continue
            self._add(
                Kind.COUNT_MISMATCH,
                None,
                None,
                folio.at,
                folio.pfn,
                str(folio.seen),
                str(folio.mapcount),
                f"pfn {folio.pfn:#x} is mapped by {folio.seen} page-table entries, and the kernel counts "
                f"{folio.mapcount}",
                Severity.IN_MOTION if folio.locked else Severity.ERROR,
            )

    def _check_anon_vmas(self) -> None:
        users = Counter(vma.anon_vma for vma in self._vmas.values() if vma.anon_vma)
        alive = [each for each in self._rmap.anon_vmas.values() if each is not None and each.links]
        children = Counter(each.parent for each in alive)
        below = Counter(each.root for each in alive if each.root != each.at)
        for anon_vma in (each for each in self._rmap.anon_vmas.values() if each is not None):
            severity = Severity.IN_MOTION if self._locked(anon_vma) else Severity.ERROR
            for trouble in anon_vma.troubles:
                self._anon_finding(Kind.BROKEN_CHAIN, anon_vma, "a whole tree", trouble, trouble, severity)
            for link in anon_vma.links.values():
                self._check_link(anon_vma, link, severity)
            counted = (
                ("VMAs", "num_active_vmas", users[anon_vma.at], anon_vma.active),
                ("children", "num_children", children[anon_vma.at], anon_vma.children),
            )
            for what, name, found, noted in counted:
                if found != noted:
                    self._anon_finding(
                        Kind.COUNT_MISMATCH,
                        anon_vma,
                        str(found),
                        str(noted),
                        f"it has {found} {what} and counts {noted} ({name})",
                        severity,
                    )
            least = bool(anon_vma.links) + below[anon_vma.at] + self._held[anon_vma.at]
            if anon_vma.refcount < least:
                self._anon_finding(
                    Kind.COUNT_MISMATCH,
                    anon_vma,
                    f"at least {least}",
                    str(anon_vma.refcount),
                    f"it is referred to {least} times and counts {anon_vma.refcount}: it will be freed too early",
                    severity,
                )

    def _check_link(self, anon_vma: AnonVma, link: Link, severity: Severity) -> None:
        if link.vma.at not in self._vmas:
            self._anon_finding(
                Kind.STALE_RMAP_ITEM,
                anon_vma,
                "a VMA of a process",
                f"{link.vma.at:#x}",
                f"its tree leads to a VMA at {link.vma.at:#x} that no process has",
                severity,
            )
        elif link.anon_vma != anon_vma.at:
            self._anon_finding(
                Kind.BROKEN_CHAIN,
                anon_vma,
                f"{anon_vma.at:#x}",
                f"{link.anon_vma:#x}",
                f"its tree holds a link at {link.at:#x} that belongs to anon_vma {link.anon_vma:#x}",
                severity,
            )
        else:
            below = [anon_vma.links[each].subtree_last for each in (link.left, link.right) if each in anon_vma.links]
            largest = max([link.last, *below])
            if link.subtree_last != largest:
                self._anon_finding(
                    Kind.BROKEN_CHAIN,
                    anon_vma,
                    f"{largest:#x}",
                    f"{link.subtree_last:#x}",
                    f"its tree notes {link.subtree_last:#x} as the last index below the link of {link.vma}, and it is "
                    f"{largest:#x}: searches may turn back too early",
                    severity,
                )

    def _anon_finding(
        self, kind: Kind, anon_vma: AnonVma, expected: str, actual: str, what: str, severity: Severity
    ) -> None:
        sentence = f"anon_vma {anon_vma.at:#x}: {what}"
        self._add(kind, None, None, anon_vma.at, None, expected, actual, sentence, severity)

    # --- findings ----------------------------------------------------------------------------------------------------

    def _broken(self, process: Process, vma: Vma, sentence: str) -> None:
        severity = Severity.ERROR
        if self._kernel.locked_for_writing(process.mm + self._layout["mm_struct.mmap_lock"]):
            severity = Severity.IN_MOTION
        self._add(Kind.BROKEN_CHAIN, process, vma, vma.at, None, "a whole chain", "a broken one", sentence, severity)

    def _bad_pointer(self, process: Process | None, error: Unreadable, what: str, vma: Vma | None = None) -> None:
        whose = f" of {process}" if process else ""
        sentence = f"following {what.removeprefix('its ')}{whose} leads nowhere: {error}"
        self._add(Kind.BAD_POINTER, process, vma, error.address, None, "memory", "none", sentence)

    def _add(
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
    ) -> None:
        if len(self._findings) >= MOST_FINDINGS:
            self._unlisted += severity is Severity.ERROR
            return
        who, where = str(process) if process else "", str(vma) if vma else ""
        sentence = sentence.replace("{process}", who)
        self._findings.append(Finding(kind, severity, who, where, address, pfn, expected, actual, sentence))


def pages_between(ranges: Iterable[tuple[int, int, int]]) -> Keep:
    """Keeps the pages of some address ranges: (process, start, end)."""
    wanted = tuple(ranges)
    return lambda pid, address: any(who == pid and start <= address < end for who, start, end in wanted)
