# SPDX-License-Identifier: GPL-2.0
"""Checks each page-table entry inside a VMA: the kernel's rmap walk from its page must find the entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.folios import ANON, KSM, Folio
from harness.audit.kernel import VM_MIXEDMAP, VM_SHARED, Process, Vma
from harness.audit.ledger import Values, Where
from harness.audit.memory import Unreadable
from harness.audit.pagetable import Entry, EntryKind
from harness.audit.result import Page
from harness.audit.rmap import StableNode

_MASK = (1 << 64) - 1

#: ends every sentence about an entry that is lost
_LOST = "rmap walks cannot find this entry"

#: decides whether a page is kept for the result: process ID, address
Keep = Callable[[int, int], bool]


@dataclass(frozen=True, slots=True)
class MappedVma:
    """A VMA of a process, with the anon_vmas that it is linked to."""

    process: Process
    vma: Vma
    anon_vmas: frozenset[int]

    def where(self, address: int, pfn: int) -> Where:
        """The entry at an address in this VMA."""
        return Where(address, self.process, self.vma, pfn)

    def mapping(self, address: int) -> str:
        """Says in a sentence where a page is mapped."""
        return f"mapped by {self.process} at {address:#x} in VMA {self.vma}"

    @property
    def named_anon_vmas(self) -> str:
        """The anon_vmas in words."""
        return " ".join(f"{each:#x}" for each in sorted(self.anon_vmas)) or "none"


class PageChecks:
    """Checks entries, and remembers which KSM pages are mapped where.

    :param keep: decides which pages are kept for the result.
    """

    def __init__(self, context: Context, keep: Keep) -> None:
        self._context = context
        self._keep = keep
        #: pages for the result
        self.kept: list[Page] = []
        #: where KSM pages are mapped: (mm_struct, address) to frame number
        self.ksm_mappings: dict[tuple[int, int], int] = {}
        #: frame number of the huge zero page; 0 if it was not met yet
        self._huge_zero = 0

    def check(self, area: MappedVma, address: int, entry: Entry) -> None:
        """Check one entry that is not empty."""
        context = self._context
        if entry.kind is EntryKind.ABSENT:
            context.counts[self._absent(entry.swap_type)] += 1
            return
        if entry.special:
            context.counts["other"] += 1
            return
        try:
            folio = context.folios.of(entry.pfn)
        except Unreadable:
            context.ledger.add(
                DiscrepancyKind.BAD_POINTER,
                area.where(address, entry.pfn),
                Values(expected="a page of memory", actual=f"pfn {entry.pfn:#x}"),
                f"{area.process} maps pfn {entry.pfn:#x} at {address:#x}, but there is no such page",
            )
            return
        pages = entry.size >> context.kernel.page_shift
        unmarked = not folio.mapping & ANON
        if unmarked and (not _must_be_anonymous(area.vma, entry) or self._is_huge_zero(folio, pages)):
            context.counts["other"] += 1
            return
        folio.seen += 1
        ksm = folio.mapping & KSM == KSM
        context.counts["anonymous"] += 1
        context.counts["ksm"] += ksm
        context.counts["huge"] += pages > 1
        if unmarked:
            reached, index = self._note_unmarked(area, address, entry.pfn, folio)
        elif ksm:
            reached, index = self._check_ksm(area, address, folio)
        else:
            reached, index = self._check_anon(area, address, entry.pfn, folio)
        if self._keep(area.process.pid, address):
            self.kept.append(Page(area.process.pid, address, entry.pfn, pages, ksm, reached, index))

    def _absent(self, swap_type: int) -> str:
        """What an entry that is not present stands for, by its swap type.

        Swap files have the first types, and other non-present entries the types after them (include/linux/swap.h).
        """
        first = self._context.layout.swap_files
        if swap_type < first:
            return "swap"
        migration = first + bool(self._context.layout.symbols.get("memory_failure"))
        return "migration" if migration <= swap_type < migration + 3 else "special"

    def _is_huge_zero(self, folio: Folio, pages: int) -> bool:
        """Whether an entry maps the huge zero page. There is only one, and the kernel does not count its mappings.

        Its entries are marked as special in 7.3. In 6.12 they look like any other entry (set_huge_zero_folio(),
        mm/huge_memory.c).
        """
        if pages == 1 or folio.pages == 1 or folio.mapping or folio.mapcount:
            return False
        self._huge_zero = self._huge_zero or folio.pfn
        return folio.pfn == self._huge_zero

    def _note_unmarked(self, area: MappedVma, address: int, pfn: int, folio: Folio) -> tuple[bool, int]:
        """Note a page that must be anonymous and is not marked so."""
        reason = "a private file mapping, and the entry is writable" if area.vma.ops else "anonymous memory"
        self._context.ledger.add(
            DiscrepancyKind.UNREACHABLE,
            area.where(address, pfn),
            Values(expected="an anon_vma or a stable node", actual=f"{folio.mapping:#x}"),
            f"pfn {pfn:#x}, {area.mapping(address)}, is not marked as an anonymous page: its folio->mapping is "
            f"{folio.mapping:#x}. It must be anonymous because the VMA is {reason}: {_LOST}",
            self._severity(folio, area.process, 0),
        )
        return False, folio.index + pfn - folio.pfn

    def _check_anon(self, area: MappedVma, address: int, pfn: int, folio: Folio) -> tuple[bool, int]:
        """Check the entry of an anonymous page; returns whether rmap walks find it, and the page's index."""
        at = folio.mapping & ~KSM & _MASK
        index = folio.index + pfn - folio.pfn
        wanted = area.vma.index(address, self._context.kernel.page_shift)
        reached = self._context.rmap.reaches(at, folio.index, folio.pages, area.vma, address)
        if reached and index == wanted:
            return True, index
        page = f"pfn {pfn:#x}, {area.mapping(address)}"
        if at not in area.anon_vmas:
            kind = DiscrepancyKind.FOREIGN_ANON_VMA
            values = Values(expected=area.named_anon_vmas, actual=f"{at:#x}")
            sentence = f"{page}, points to anon_vma {at:#x}, which the VMA is not linked to: " + (
                "rmap walks still find this entry" if reached else _LOST
            )
        elif index != wanted:
            kind = DiscrepancyKind.WRONG_INDEX
            values = Values(expected=f"{wanted:#x}", actual=f"{index:#x}")
            sentence = f"{page}, has index {index:#x}, but the index of that address is {wanted:#x}: " + (
                "rmap walks still find this entry, because it is within the range of the folio" if reached else _LOST
            )
        else:
            kind = DiscrepancyKind.UNREACHABLE
            values = Values(expected=f"the link of VMA {area.vma} at index {index:#x}", actual="not found")
            sentence = (
                f"{page}: a search of the interval tree of anon_vma {at:#x} for index {index:#x} does not find this "
                f"VMA: {_LOST}"
            )
        severity = self._severity(folio, area.process, at)
        self._context.ledger.add(kind, area.where(address, pfn), values, sentence, severity)
        return reached, index

    def _check_ksm(self, area: MappedVma, address: int, folio: Folio) -> tuple[bool, int]:
        """Check the entry of a KSM page; returns whether rmap walks find it, and the index in its rmap item."""
        context = self._context
        mm = area.process.mm
        self.ksm_mappings[mm, address] = folio.pfn
        page = f"KSM page pfn {folio.pfn:#x}, {area.mapping(address)}"
        at = folio.mapping & ~KSM & _MASK
        node = context.rmap.stable_node(at)
        severity = Severity.IN_MOTION if context.kernel.ksm_at_work else self._severity(folio, area.process, 0)
        if node is None:
            context.ledger.add(
                DiscrepancyKind.UNREACHABLE,
                area.where(address, folio.pfn),
                Values(expected="a stable node", actual=f"{at:#x}"),
                f"{page}, has no stable node: {_LOST}",
                severity,
            )
            return False, -1
        if node.pfn != folio.pfn:
            context.ledger.add(
                DiscrepancyKind.STALE_RMAP_ITEM,
                area.where(address, folio.pfn),
                Values(expected=f"{folio.pfn:#x}", actual=f"{node.pfn:#x}"),
                f"{page}, points to the stable node at {at:#x}, which is for pfn {node.pfn:#x}: KSM treats this page "
                "as freed",
                severity,
            )
        stored = next((each.index for each in node.items if (each.mm, each.address) == (mm, address)), None)
        index = -1 if stored is None else stored
        if (mm, address) in context.rmap.ksm_places(node):
            return True, index
        self._note_lost_ksm(area, address, folio, node, severity)
        return False, index

    def _note_lost_ksm(self, area: MappedVma, address: int, folio: Folio, node: StableNode, severity: Severity) -> None:
        """Say why rmap walks do not find the entry of a KSM page: its rmap item is wrong, or there is none."""
        page = f"KSM page pfn {folio.pfn:#x}, {area.mapping(address)}"
        mm = area.process.mm
        wanted = area.vma.index(address, self._context.kernel.page_shift)
        own = [each for each in node.items if each.address == address and each.mm == mm]
        foreign = [each for each in own if each.anon_vma not in area.anon_vmas]
        if foreign:
            kind = DiscrepancyKind.FOREIGN_ANON_VMA
            values = Values(expected=area.named_anon_vmas, actual=f"{foreign[0].anon_vma:#x}")
            sentence = (
                f"{page}: its rmap item points to anon_vma {foreign[0].anon_vma:#x}, which the VMA is not linked to: "
                f"{_LOST}"
            )
        elif own and own[0].index is not None and own[0].index != wanted:
            kind = DiscrepancyKind.WRONG_INDEX
            values = Values(expected=f"{wanted:#x}", actual=f"{own[0].index:#x}")
            sentence = (
                f"{page}: its rmap item has index {own[0].index:#x}, but the index of that address is {wanted:#x}: "
                f"{_LOST}"
            )
        else:
            known = ", ".join(f"{each.address:#x} of mm {each.mm:#x}" for each in node.items[:8]) or "nothing"
            kind = DiscrepancyKind.UNREACHABLE
            values = Values(expected=f"an rmap item for {address:#x} of mm {mm:#x}", actual=known)
            sentence = (
                f"{page}: none of the {len(node.items)} rmap items of its stable node leads there (they are for "
                f"{known}): {_LOST}"
            )
        self._context.ledger.add(kind, area.where(address, folio.pfn), values, sentence, severity)

    def _severity(self, folio: Folio, process: Process, anon_vma: int) -> Severity:
        """The severity of a discrepancy of a page: "in motion" if a lock is held that a change of it needs.

        :param anon_vma: the address of the anon_vma that the page points to, or 0.
        """
        if folio.locked or self._context.kernel.mmap_write_locked(process.mm):
            return Severity.IN_MOTION
        known = self._context.rmap.anon_vma(anon_vma) if anon_vma else None
        return Severity.IN_MOTION if known is not None and self._context.rmap.locked(known) else Severity.ERROR


def _must_be_anonymous(vma: Vma, entry: Entry) -> bool:
    """Whether an entry must map an anonymous page. The page's own mark does not decide this, because it may be wrong.

    A private file mapping holds pages of the file, whose entries are never writable, and anonymous pages where the
    process has written (do_cow_fault(), can_change_private_pte_writable(), mfill_atomic_install_pte()).
    """
    if vma.flags & VM_MIXEDMAP:
        return False
    return not vma.ops or (entry.writable and not vma.flags & VM_SHARED)
