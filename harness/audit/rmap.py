# SPDX-License-Identifier: GPL-2.0
"""The kernel's reverse walks, done again on a dump: which addresses does the kernel come by, starting from a page?

Searches follow the kernel's own steps, pruning by the same fields, so that a tree that is wrong loses here what it
loses there: include/linux/interval_tree_generic.h, ``rmap_walk_anon()`` in mm/rmap.c and ``rmap_walk_ksm()`` in
mm/ksm.c, of Linux 6.12 and 7.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.audit.kernel import Kernel, Vma
from harness.audit.memory import Unreadable

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Link:
    """An anon_vma_chain: that its VMA may hold pages of its anon_vma."""

    at: int
    vma: Vma
    anon_vma: int
    #: indices of the VMA's first and last page
    first: int
    last: int
    #: the largest ``last`` below this node, as the kernel noted it
    subtree_last: int
    #: rb_node addresses, 0 for none
    left: int
    right: int
    #: of its rb_node as that says itself, 0 for the root
    parent: int


@dataclass
class AnonVma:
    """An anon_vma with its interval tree."""

    at: int
    root: int
    parent: int
    refcount: int
    children: int
    active: int
    #: rb_node of the tree's root and leftmost node
    top: int
    leftmost: int
    #: by rb_node
    links: dict[int, Link] = field(default_factory=dict)
    #: what is wrong with the tree itself
    troubles: list[str] = field(default_factory=list)

    def search(self, first: int, last: int) -> list[Link]:
        """The links the kernel's search comes by that overlap ``first`` to ``last``."""
        top, leftmost = self.links.get(self.top), self.links.get(self.leftmost)
        if top is None or top.subtree_last < first or leftmost is None or leftmost.first > last:
            return []
        return list(self._below(self.top, first, last))

    def _below(self, at: int, first: int, last: int) -> Iterator[Link]:
        # In order, entering a left subtree only if its subtree_last allows, a right one only if this node starts
        # early enough: what subtree_search() and iter_next() do between them.
        stack: list[tuple[int, bool]] = [(at, False)]
        # Each node is met at most twice; a tree that loops would have the kernel loop, and is a finding of its own.
        for _ in range(2 * len(self.links)):
            if not stack:
                return
            node, left_done = stack.pop()
            link = self.links.get(node)
            if link is None:
                continue
            if not left_done:
                stack.append((node, True))
                left = self.links.get(link.left)
                if left is not None and left.subtree_last >= first:
                    stack.append((link.left, False))
                continue
            if link.first > last:
                return
            if link.last >= first:
                yield link
            right = self.links.get(link.right)
            if right is not None and right.subtree_last >= first:
                stack.append((link.right, False))


@dataclass(frozen=True, slots=True)
class Item:
    """A ksm_rmap_item in a stable node's list."""

    at: int
    mm: int
    #: page-aligned
    address: int
    anon_vma: int
    #: the stable node it says it belongs to
    head: int
    #: None where the kernel stores none (before 7.3) and searches the full range
    index: int | None


@dataclass
class StableNode:
    """A KSM page's node and the items that say where the page is mapped."""

    at: int
    pfn: int
    #: as the kernel counts
    length: int
    items: list[Item] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


class ReverseMap:
    """The reverse map in a dump; remembers what it has read."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._shift = kernel.page_shift
        #: read so far, by address; None for one that cannot be read
        self.anon_vmas: dict[int, AnonVma | None] = {}
        self.stable_nodes: dict[int, StableNode | None] = {}
        self._found: dict[int, frozenset[tuple[int, int]]] = {}

    def anon_vma(self, at: int) -> AnonVma | None:
        """The anon_vma at an address; None if there is no memory."""
        if at not in self.anon_vmas:
            try:
                self.anon_vmas[at] = self._read_anon_vma(at)
            except Unreadable:
                self.anon_vmas[at] = None
        return self.anon_vmas[at]

    def _read_anon_vma(self, at: int) -> AnonVma:
        memory, layout = self._kernel.memory, self._kernel.layout
        tree = at + layout["anon_vma.rb_root"]
        found = AnonVma(
            at=at,
            root=memory.u64(at + layout["anon_vma.root"]),
            parent=memory.u64(at + layout["anon_vma.parent"]),
            refcount=memory.s32(at + layout["anon_vma.refcount"]),
            children=memory.u64(at + layout["anon_vma.num_children"]),
            active=memory.u64(at + layout["anon_vma.num_active_vmas"]),
            top=memory.u64(tree + layout["rb_root_cached.rb_root"]) & ~1,
            leftmost=memory.u64(tree + layout["rb_root_cached.rb_leftmost"]),
        )
        self._read_tree(found)
        return found

    def _read_tree(self, anon_vma: AnonVma) -> None:
        queue = [(anon_vma.top, 0)] if anon_vma.top else []
        while queue:
            node, parent = queue.pop()
            if node in anon_vma.links:
                anon_vma.troubles.append(f"its tree comes twice by the node at {node:#x}")
                continue
            try:
                link = self._read_link(node)
            except Unreadable as error:
                anon_vma.troubles.append(f"the node of its tree at {node:#x} leads nowhere: {error}")
                continue
            anon_vma.links[node] = link
            if link.parent != parent:  # the search climbs by it: iter_next()
                anon_vma.troubles.append(
                    f"the node of its tree at {node:#x} names {link.parent:#x} as its parent, and is below "
                    f"{parent:#x}: searches go astray behind it"
                )
            queue += [(each, node) for each in (link.left, link.right) if each]

    def _read_link(self, node: int) -> Link:
        memory, layout = self._kernel.memory, self._kernel.layout
        at = node - layout["anon_vma_chain.rb"]
        vma = self._kernel.vma(memory.u64(at + layout["anon_vma_chain.vma"]))
        return Link(
            at=at,
            vma=vma,
            anon_vma=memory.u64(at + layout["anon_vma_chain.anon_vma"]),
            first=vma.anon_pgoff,
            last=vma.last(self._shift),
            subtree_last=memory.u64(at + layout["anon_vma_chain.rb_subtree_last"]),
            left=memory.u64(node + layout["rb_node.rb_left"]),
            right=memory.u64(node + layout["rb_node.rb_right"]),
            parent=memory.u64(node + layout["rb_node.__rb_parent_color"]) & ~3,  # its low bits are the colour
        )

    def reaches(self, at: int, index: int, pages: int, vma: Vma, address: int) -> bool:
        """Whether ``rmap_walk_anon()`` comes by an address.

        :param at: the anon_vma that the folio names.
        :param index: of the folio.
        :param pages: of the folio.
        """
        anon_vma = self.anon_vma(at)
        if anon_vma is None:
            return False
        for link in anon_vma.search(index, index + pages - 1):
            if link.vma.at == vma.at:
                begin = vma.start + (max(index - link.first, 0) << self._shift)
                end = min(vma.end, vma.start + (index + pages - link.first << self._shift))
                if begin <= address < end:
                    return True
        return False

    def locked(self, anon_vma: AnonVma) -> bool:
        """Whether somebody is in the middle of changing its tree."""
        try:
            return self._kernel.locked_for_writing(anon_vma.root + self._kernel.layout["anon_vma.rwsem"])
        except Unreadable:
            return False

    # --- KSM ---------------------------------------------------------------------------------------------------------

    def stable_node(self, at: int) -> StableNode | None:
        """The stable node at an address; None if there is no memory, or no KSM in this kernel."""
        if not self._kernel.layout.has("ksm_stable_node.hlist"):
            return None
        if at not in self.stable_nodes:
            try:
                self.stable_nodes[at] = self._read_stable_node(at)
            except Unreadable:
                self.stable_nodes[at] = None
        return self.stable_nodes[at]

    def _read_stable_node(self, at: int) -> StableNode:
        memory, layout = self._kernel.memory, self._kernel.layout
        found = StableNode(
            at=at,
            pfn=memory.u64(at + layout["ksm_stable_node.kpfn"]),
            length=memory.s32(at + layout["ksm_stable_node.rmap_hlist_len"]),
        )
        hlist = layout["ksm_rmap_item.hlist"]
        place = at + layout["ksm_stable_node.hlist"]
        seen: set[int] = set()
        node = memory.u64(place)
        while node:
            if node in seen:
                found.troubles.append(f"its list of rmap items does not end: it comes twice by {node:#x}")
                break
            seen.add(node)
            try:
                following, back = memory.u64(node), memory.u64(node + 8)
                item = self.item(node - hlist)
            except Unreadable as error:
                found.troubles.append(f"its list of rmap items leads out of memory: {error}")
                break
            if back != place:
                found.troubles.append(f"its rmap item at {node - hlist:#x} points back to {back:#x}, not {place:#x}")
            found.items.append(item)
            place, node = node, following
        return found

    def item(self, at: int) -> Item:
        """Read a ksm_rmap_item.

        :raises Unreadable: if there is no memory at that address.
        """
        memory, layout = self._kernel.memory, self._kernel.layout
        stored = layout.offsets.get("ksm_rmap_item.linear_page_index")
        return Item(
            at=at,
            mm=memory.u64(at + layout["ksm_rmap_item.mm"]),
            # the flags below the page size are the kernel's own: mm/ksm.c masks them as here
            address=memory.u64(at + layout["ksm_rmap_item.address"]) & -self._kernel.page_size & _MASK,
            anon_vma=memory.u64(at + layout["ksm_rmap_item.anon_vma"]),
            head=memory.u64(at + layout["ksm_rmap_item.head"]),
            index=None if stored is None else memory.u64(at + stored),
        )

    def ksm_places(self, node: StableNode) -> frozenset[tuple[int, int]]:
        """Where ``rmap_walk_ksm()`` comes by: (mm, address).

        It looks in the process of each item first and then in all others, so that in the end it has looked wherever
        the item's anon_vma has a VMA over the item's address.
        """
        if node.at not in self._found:
            places: set[tuple[int, int]] = set()
            for item in node.items:
                anon_vma = self.anon_vma(item.anon_vma)
                if anon_vma is None:
                    continue
                span = (0, _MASK) if item.index is None else (item.index, item.index)
                for link in anon_vma.search(*span):
                    if link.vma.start <= item.address < link.vma.end:
                        places.add((link.vma.mm, item.address))
            self._found[node.at] = frozenset(places)
        return self._found[node.at]
