# SPDX-License-Identifier: GPL-2.0
"""Checks that the mapcount of each anonymous page is the number of page-table entries that map it."""

from __future__ import annotations

from collections.abc import Iterable

from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.folios import ANON, KSM, Folio
from harness.audit.kernel import Kernel
from harness.audit.ledger import Values, Where
from harness.audit.rmap import Link, ReverseMap


def check_mapcounts(context: Context) -> None:
    """Check the mapcounts of all pages that were met; only if the page tables of all processes were checked."""
    for folio in context.folios:
        if not folio.mapping & ANON or not folio.seen or folio.seen == folio.mapcount:
            continue
        links = _links_of(context.rmap, folio)
        severity = context.ksm_severity() if folio.mapping & KSM == KSM else Severity.ERROR
        if folio.locked or _is_being_changed(context.kernel, links):
            severity = Severity.IN_MOTION
        context.ledger.add(
            DiscrepancyKind.COUNT_MISMATCH,
            Where(folio.at, pfn=folio.pfn, mms=frozenset(link.vma.mm for link in links)),
            Values(expected=str(folio.seen), actual=str(folio.mapcount)),
            f"pfn {folio.pfn:#x} is mapped by {folio.seen} page-table entries, but its mapcount is {folio.mapcount}",
            severity,
        )


def _is_being_changed(kernel: Kernel, links: Iterable[Link]) -> bool:
    """Whether an entry may have been changed in one of these VMAs, and the mapcount not yet, or the other way round.

    The kernel changes an entry under the lock of its page table, and the mapcount just before or after (wp_page_copy(),
    zap_present_ptes(), mm/memory.c). The page-table lock does not say who holds it. Whoever does also holds mmap_lock
    or the lock of the VMA.
    """
    return any(kernel.read_locked(link.vma) or kernel.held(link.vma.mm) for link in links)


def _links_of(rmap: ReverseMap, folio: Folio) -> list[Link]:
    """The links of all VMAs in which an rmap walk looks for a page."""
    at = folio.mapping & ~KSM
    if folio.mapping & KSM == KSM:
        node = rmap.stable_nodes.get(at)
        named = {item.anon_vma for item in node.items} if node is not None else set()
    else:
        named = {at}
    known = (rmap.anon_vmas.get(each) for each in named)
    return [link for each in known if each is not None for link in each.links.values()]
