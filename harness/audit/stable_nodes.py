# SPDX-License-Identifier: GPL-2.0
"""Checks KSM's structures: every stable node and rmap item must lead to something that exists."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from harness.audit.chain import Endless, chain
from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.folios import KSM
from harness.audit.kernel import Process
from harness.audit.ledger import Values, Where
from harness.audit.memory import Unreadable
from harness.audit.rmap import Item, StableNode

#: STABLE_FLAG in ksm_rmap_item.address: the item is in the list of a stable node (mm/ksm.c)
_STABLE_FLAG = 0x200


class StableNodeChecks:
    """Checks stable nodes and rmap items; to be used after all page tables have been checked.

    :param processes: by address of the mm_struct.
    :param mappings: where KSM pages are mapped: (mm_struct, address) to frame number. None if only some processes
        were audited.
    """

    def __init__(
        self,
        context: Context,
        processes: Mapping[int, Process],
        mappings: Mapping[tuple[int, int], int] | None,
    ) -> None:
        self._context = context
        self._processes = processes
        self._mappings = mappings
        #: number of items in KSM's lists
        self.rmap_items = 0
        #: by anon_vma: number of items that hold a reference to it; those in the stable tree do
        self.references: Counter[int] = Counter()

    def check_nodes(self) -> None:
        """Check the stable nodes that pages point to."""
        for node in self._context.rmap.stable_nodes.values():
            if node is not None:
                self._check_node(node)

    def _check_node(self, node: StableNode) -> None:
        try:
            folio = self._context.folios.of(node.pfn)
            owned = folio.mapping == node.at | KSM
            severity = Severity.IN_MOTION if folio.locked else Severity.ERROR
        except Unreadable:
            owned, severity = False, Severity.ERROR
        if not owned:
            # A node does not keep its page alive. When the page was freed, KSM frees the node at its next visit
            # (ksm_get_folio(), mm/ksm.c). PageChecks reports a page that is still mapped and points to this node.
            self._note(
                DiscrepancyKind.STALE_RMAP_ITEM,
                node,
                Values(expected="its own page", actual=f"pfn {node.pfn:#x}"),
                "no longer owns that page: KSM will free the node",
                Severity.NOTE,
            )
        for problem in node.problems:
            self._note(
                DiscrepancyKind.BROKEN_CHAIN,
                node,
                Values(expected="a consistent list", actual=problem),
                f"is damaged: {problem}",
            )
        if node.length != len(node.items):
            self._note(
                DiscrepancyKind.COUNT_MISMATCH,
                node,
                Values(expected=str(len(node.items)), actual=str(node.length)),
                f"has {len(node.items)} rmap items, but its rmap_hlist_len is {node.length}",
                severity,
            )
        for item in node.items:
            self._check_item(node, item, severity)

    def _check_item(self, node: StableNode, item: Item, severity: Severity) -> None:
        place = f"an rmap item for {item.address:#x} of mm {item.mm:#x}"
        if item.head != node.at:
            self._note(
                DiscrepancyKind.STALE_RMAP_ITEM,
                node,
                Values(expected=f"{node.at:#x}", actual=f"{item.head:#x}"),
                f"lists {place} that points to another stable node",
                severity,
            )
        anon_vma = self._context.rmap.anon_vma(item.anon_vma)
        if anon_vma is None or anon_vma.refcount <= 0:
            self._note(
                DiscrepancyKind.STALE_RMAP_ITEM,
                node,
                Values(expected="an anon_vma in use", actual=f"{item.anon_vma:#x}"),
                f"lists {place} whose anon_vma has been freed",
                severity,
            )
        elif self._mappings is not None and self._mappings.get((item.mm, item.address)) != node.pfn:
            # Writing to a KSM page, moving it or unmapping it leaves its item in the list until ksmd visits it again.
            self._note(
                DiscrepancyKind.STALE_RMAP_ITEM,
                node,
                Values(expected=f"pfn {node.pfn:#x} at {item.address:#x}", actual="another page, or none"),
                f"lists {place}, where the page is no longer mapped: ksmd will remove the item",
                Severity.NOTE,
            )

    def _note(
        self,
        kind: DiscrepancyKind,
        node: StableNode,
        values: Values,
        predicate: str,
        severity: Severity = Severity.ERROR,
    ) -> None:
        """Note a discrepancy of a stable node.

        :param predicate: the rest of a sentence that begins with the node.
        """
        self._context.ledger.add(
            kind,
            Where(node.at, pfn=node.pfn, mms=frozenset(item.mm for item in node.items)),
            values,
            f"the stable node at {node.at:#x}, for pfn {node.pfn:#x}, {predicate}",
            self._context.ksm_severity(severity),
        )

    def check_lists(self) -> None:
        """Check KSM's list of rmap items of each process, including those whose page is not mapped any more."""
        context = self._context
        layout, memory = context.layout, context.memory
        try:
            for slot in context.kernel.ksm_slots():
                first = memory.u64(slot + layout["ksm_mm_slot.rmap_list"])
                for item in chain(first, lambda item: memory.u64(item + layout["ksm_rmap_item.rmap_list"])):
                    self.rmap_items += 1
                    if memory.u64(item + layout["ksm_rmap_item.address"]) & _STABLE_FLAG:
                        self._check_stable_item(item)
        except Endless as error:
            context.ledger.add(
                DiscrepancyKind.BROKEN_CHAIN,
                Where(error.address),
                Values(expected="a list with an end", actual="a list without an end"),
                f"one of KSM's lists does not end: {error}",
                context.ksm_severity(),
            )
        except Unreadable as error:
            context.ledger.unreadable("one of KSM's lists", error, severity=context.ksm_severity())

    def _check_stable_item(self, at: int) -> None:
        """Check that an item which is marked as listed by a stable node is in the list of that node."""
        context = self._context
        item = context.rmap.item(at)
        self.references[item.anon_vma] += 1
        known = item.head in context.rmap.stable_nodes
        node = context.rmap.stable_node(item.head)
        if node is not None and not known:
            self._check_node(node)
        if node is None or all(each.at != at for each in node.items):
            context.ledger.add(
                DiscrepancyKind.BROKEN_CHAIN,
                Where(at, self._processes.get(item.mm), pfn=node.pfn if node else None, mms=frozenset({item.mm})),
                Values(expected=f"a place in the list of the stable node at {item.head:#x}", actual="none"),
                f"the rmap item at {at:#x}, for {item.address:#x} of mm {item.mm:#x}, points to the stable node at "
                f"{item.head:#x}, but the list of that node does not hold it: rmap walks cannot find this mapping",
                context.ksm_severity(),
            )
