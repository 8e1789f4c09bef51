# SPDX-License-Identifier: GPL-2.0
"""The other way round: what the reverse map holds must exist, and what the kernel counts must be what is there."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping

from harness.audit.chain import Endless, chain
from harness.audit.findings import Kind, Severity
from harness.audit.folios import ANON, KSM, Folio, Folios
from harness.audit.kernel import Kernel, Process, Vma
from harness.audit.ledger import Ledger
from harness.audit.memory import Unreadable
from harness.audit.rmap import AnonVma, Link, ReverseMap, StableNode

#: struct ksm_rmap_item.address: "is listed from the stable tree" (mm/ksm.c)
_STABLE_FLAG = 0x200


class Backwards:
    """Checks the reverse map after its every user was looked at.

    :param processes: by address space.
    :param vmas: every VMA, by where the kernel keeps it.
    :param ksm_places: where KSM pages are mapped: (mm, address) to frame; None if not everything was looked at.
    :param listed: whether the VMA of a link has the link in its own list, as far as is known.
    """

    def __init__(
        self,
        kernel: Kernel,
        rmap: ReverseMap,
        folios: Folios,
        ledger: Ledger,
        processes: Mapping[int, Process],
        vmas: Mapping[int, Vma],
        ksm_places: Mapping[tuple[int, int], int] | None,
        listed: Callable[[Link], bool],
    ) -> None:
        self._kernel = kernel
        self._memory = kernel.memory
        self._layout = kernel.layout
        self._rmap = rmap
        self._folios = folios
        self._ledger = ledger
        self._processes = processes
        self._vmas = vmas
        self._ksm_places = ksm_places
        self._listed = listed
        #: items in KSM's lists
        self.rmap_items = 0
        #: those in the stable tree hold a reference to their anon_vma
        self._held: Counter[int] = Counter()

    def check_stable_nodes(self) -> None:
        """Check those that pages led to."""
        for node in self._rmap.stable_nodes.values():
            if node is not None:
                self._check_stable_node(node)

    def _check_stable_node(self, node: StableNode) -> None:
        try:
            folio = self._folios.of(node.pfn)
            right = folio.mapping == node.at | KSM
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
            elif self._ksm_places is not None and self._ksm_places.get((item.mm, item.address)) != node.pfn:
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
        mms = {item.mm for item in node.items}
        self._ledger.add(kind, None, None, node.at, node.pfn, expected, actual, sentence, self._of_ksm(severity), mms)

    def _of_ksm(self, severity: Severity = Severity.ERROR) -> Severity:
        """What a finding about KSM weighs: less while KSM is at work.

        A page is called KSM's before it has a stable node, and an item is cut from its list before it is counted down
        (try_to_merge_one_page(), remove_rmap_item_from_tree()), under ksm_thread_mutex alone.
        """
        return Severity.IN_MOTION if self._kernel.ksm_at_work and severity is Severity.ERROR else severity

    def check_ksm_lists(self) -> None:
        """Follow KSM's list of every process it knows: items that are nowhere mapped, but in the stable tree."""
        layout, memory = self._layout, self._memory
        try:
            for slot in self._kernel.ksm_slots():
                listed = memory.u64(slot + layout["ksm_mm_slot.rmap_list"])
                for item in chain(listed, lambda item: memory.u64(item + layout["ksm_rmap_item.rmap_list"])):
                    self.rmap_items += 1
                    if memory.u64(item + layout["ksm_rmap_item.address"]) & _STABLE_FLAG:
                        self._check_listed(item)
        except Endless as error:
            sentence = f"KSM's lists do not end: {error}"
            self._ledger.add(
                Kind.BROKEN_CHAIN, None, None, error.address, None, "an end", "none", sentence, self._of_ksm()
            )
        except Unreadable as error:
            self._ledger.bad_pointer(None, error, "KSM's list of rmap items", severity=self._of_ksm())

    def _check_listed(self, at: int) -> None:
        item = self._rmap.item(at)
        self._held[item.anon_vma] += 1
        known = item.head in self._rmap.stable_nodes
        node = self._rmap.stable_node(item.head)
        if node is not None and not known:
            self._check_stable_node(node)
        if node is None or all(each.at != at for each in node.items):
            self._ledger.add(
                Kind.BROKEN_CHAIN,
                self._processes.get(item.mm),
                None,
                at,
                node.pfn if node else None,
                f"a place in the list of the stable node at {item.head:#x}",
                "none",
                f"the rmap item at {at:#x}, for {item.address:#x} of mm {item.mm:#x}, says it belongs to the stable "
                f"node at {item.head:#x}, which does not list it: the kernel cannot find this mapping",
                self._of_ksm(),
                {item.mm},
            )

    def check_mapcounts(self) -> None:
        """Check how often the kernel thinks each page is mapped; only of a whole guest."""
        for folio in self._folios:
            if not folio.mapping & ANON or not folio.seen or folio.seen == folio.mapcount:
                continue
            links = self._links_of(folio)
            ksm = folio.mapping & KSM == KSM
            severity = self._of_ksm() if ksm else Severity.ERROR
            if folio.locked or self._is_touched(links):
                severity = Severity.IN_MOTION
            self._ledger.add(
                Kind.COUNT_MISMATCH,
                None,
                None,
                folio.at,
                folio.pfn,
                str(folio.seen),
                str(folio.mapcount),
                f"pfn {folio.pfn:#x} is mapped by {folio.seen} page-table entries, and the kernel counts "
                f"{folio.mapcount}",
                severity,
                {link.vma.mm for link in links},
            )

    def _is_touched(self, links: Iterable[Link]) -> bool:
        """Whether somebody may be between an entry and its count, in one of the VMAs in which a page is looked for.

        Entries are changed under the lock of their page table, counts a moment before or after (wp_page_copy(),
        zap_present_ptes()). Nobody says who holds that lock; but they hold mmap_lock or that of the VMA as well.
        """
        return any(self._kernel.read_locked(link.vma) or self._kernel.held(link.vma.mm) for link in links)

    def _links_of(self, folio: Folio) -> list[Link]:
        """The links of all VMAs in which the kernel looks for a page."""
        at = folio.mapping & ~KSM
        if folio.mapping & KSM == KSM:
            node = self._rmap.stable_nodes.get(at)
            names = {item.anon_vma for item in node.items} if node is not None else set()
        else:
            names = {at}
        known = (self._rmap.anon_vmas.get(each) for each in names)
        return [link for each in known if each is not None for link in each.links.values()]

    def check_trees(self) -> None:
        """Check the trees of the anon_vmas that were met."""
        for anon_vma in (each for each in self._rmap.anon_vmas.values() if each is not None):
            for trouble in anon_vma.troubles:
                self._anon_finding(Kind.BROKEN_CHAIN, anon_vma, "a whole tree", trouble, trouble)
            for link in anon_vma.links.values():
                if link.vma.at in self._vmas:  # or it is stale, and so is what it says
                    self._check_link(anon_vma, link)

    def _check_link(self, anon_vma: AnonVma, link: Link) -> None:
        if link.anon_vma != anon_vma.at:
            self._anon_finding(
                Kind.BROKEN_CHAIN,
                anon_vma,
                f"{anon_vma.at:#x}",
                f"{link.anon_vma:#x}",
                f"its tree holds a link at {link.at:#x} that belongs to anon_vma {link.anon_vma:#x}",
            )
            return
        if not self._listed(link):
            self._anon_finding(
                Kind.BROKEN_CHAIN,
                anon_vma,
                f"the link at {link.at:#x} in the list of {link.vma}",
                "not there",
                f"its tree holds a link at {link.at:#x} of {link.vma} that the list of this VMA lacks: it will stay "
                "when the VMA goes",
            )
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
            )

    def check_anon_vmas(self) -> None:
        """Check what uses anon_vmas, and their counters; only of a whole guest, and after KSM's lists."""
        users: dict[int, list[int]] = defaultdict(list)
        for vma in self._vmas.values():
            users[vma.anon_vma].append(vma.mm)
        alive = [each for each in self._rmap.anon_vmas.values() if each is not None and each.links]
        children = Counter(each.parent for each in alive)
        below = Counter(each.root for each in alive if each.root != each.at)
        for anon_vma in (each for each in self._rmap.anon_vmas.values() if each is not None):
            for link in anon_vma.links.values():
                if link.vma.at not in self._vmas:
                    self._anon_finding(
                        Kind.STALE_RMAP_ITEM,
                        anon_vma,
                        "a VMA of a process",
                        f"{link.vma.at:#x}",
                        f"its tree leads to a VMA at {link.vma.at:#x} that no process has",
                    )
            mms = users.get(anon_vma.at, [])
            counted = (
                ("VMAs", "num_active_vmas", len(mms), anon_vma.active),
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
                        mms=mms,
                    )
            held = self._held[anon_vma.at]
            least = bool(anon_vma.links) + below[anon_vma.at] + held
            if anon_vma.refcount < least:
                self._anon_finding(
                    Kind.COUNT_MISMATCH,
                    anon_vma,
                    f"at least {least}",
                    str(anon_vma.refcount),
                    f"it is referred to {least} times and counts {anon_vma.refcount}: it will be freed too early",
                    self._of_ksm() if held else Severity.ERROR,
                    mms,
                )

    def _anon_finding(
        self,
        kind: Kind,
        anon_vma: AnonVma,
        expected: str,
        actual: str,
        what: str,
        severity: Severity = Severity.ERROR,
        mms: Iterable[int] = (),
    ) -> None:
        sentence = f"anon_vma {anon_vma.at:#x}: {what}"
        if self._rmap.locked(anon_vma):
            severity = Severity.IN_MOTION
        concerned = {link.vma.mm for link in anon_vma.links.values()}.union(mms)
        self._ledger.add(kind, None, None, anon_vma.at, None, expected, actual, sentence, severity, concerned)
