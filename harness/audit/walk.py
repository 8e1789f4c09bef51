# SPDX-License-Identifier: GPL-2.0
"""The audit: proves for each present anonymous page-table entry that the kernel's rmap walk from its page finds it."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from harness.audit.anon_vmas import AnonVmaChecks
from harness.audit.context import Context
from harness.audit.entries import EntryChecks
from harness.audit.kernel import Kernel
from harness.audit.layout import Layout
from harness.audit.mapcounts import check_mapcounts
from harness.audit.memory import Image
from harness.audit.pages import Keep, PageChecks
from harness.audit.result import Audit, Counts
from harness.audit.spaces import AddressSpaces
from harness.audit.stable_nodes import StableNodeChecks
from harness.audit.vma_links import VmaLinkChecks


def audit(
    image: Image, layout: Layout, *, pids: Collection[int] = (), keep: Keep = lambda pid, address: False
) -> Audit:
    """Audit a guest's memory.

    :param image: the memory.
    :param layout: the structure layout of the kernel that ran in the guest.
    :param pids: audit only these processes and their descendants; all processes if empty. Checks that need the whole
        guest are then omitted, such as comparing a page's mapcount with the number of its mappings.
    :param keep: decides which pages are listed in the result, by process ID and address.
    :raises DumpError: if the dump is damaged, is of another kernel, or has no such process.
    """
    began = time.monotonic()
    context = Context(Kernel(image, layout))
    spaces = AddressSpaces(context, pids)
    spaces.read()
    links = VmaLinkChecks(context)
    pages = PageChecks(context, keep)
    entries = EntryChecks(context, spaces, links, pages)
    for process in spaces.to_audit():
        entries.check(process)
    _check_reverse_map(context, spaces, links, pages)
    return Audit(
        release=context.kernel.facts.release,
        arch=layout.arch,
        counts=Counts(**context.counts),
        discrepancies=tuple(context.ledger.discrepancies),
        unlisted=context.ledger.unlisted,
        page_size=context.kernel.page_size,
        regions=tuple(entries.regions),
        pages=tuple(pages.kept),
        seconds=time.monotonic() - began,
    )


def _check_reverse_map(context: Context, spaces: AddressSpaces, links: VmaLinkChecks, pages: PageChecks) -> None:
    """The opposite direction: what the reverse map holds must exist, and the kernel's counters must be right.

    These checks come last. They compare the reverse map with everything that was found in the page tables.
    """
    nodes = StableNodeChecks(context, spaces.processes, pages.ksm_mappings if spaces.whole else None)
    nodes.check_nodes()
    nodes.check_lists()
    anon_vmas = AnonVmaChecks(context, spaces.vmas, links.may_list, nodes.references)
    anon_vmas.check_trees()
    if spaces.whole:
        check_mapcounts(context)
        anon_vmas.check_users()
    context.counts["rmap_items"] = nodes.rmap_items
    context.counts["anon_vmas"] = len(context.rmap.anon_vmas)
    context.counts["stable_nodes"] = len(context.rmap.stable_nodes)


def pages_between(ranges: Iterable[tuple[int, int, int]]) -> Keep:
    """A value for ``keep`` that keeps the pages in some address ranges: (process ID, start, end)."""
    wanted = tuple(ranges)
    return lambda pid, address: any(who == pid and start <= address < end for who, start, end in wanted)
