# SPDX-License-Identifier: GPL-2.0
"""Repeats the kernel's rmap walks on a guest's memory: starting from a page, which addresses does a walk find?

A search takes the same steps as the kernel's, and skips subtrees by the same fields. In a damaged tree it therefore
misses exactly what the kernel misses. See include/linux/interval_tree_generic.h, ``rmap_walk_anon()`` in mm/rmap.c and
``rmap_walk_ksm()`` in mm/ksm.c, of Linux 6.12 and 7.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from harness.audit.kernel import Kernel, Vma
from harness.audit.memory import Unreadable

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Link:
    """An anon_vma_chain: links a VMA to an anon_vma, because the VMA may map pages of that anon_vma."""

    #: the address of the anon_vma_chain
    at: int
    vma: Vma
    anon_vma: int
    #: the indexes of the VMA's first and last page
    first: int
    last: int
    #: rb_subtree_last: the largest ``last`` of this node and the nodes below it, as the kernel stored it
    subtree_last: int
    #: the addresses of the rb_nodes of its children; 0 for none
    left: int
    right: int
    #: the address of the parent's rb_node, as stored in its own rb_node; 0 for the root
    parent: int


@dataclass
class AnonVma:
    """An anon_vma with its interval tree."""

    #: the address of the anon_vma
    at: int
    root: int
    parent: int
    refcount: int
    children: int
    active: int
    #: the addresses of the rb_nodes of the tree's root and of its leftmost node
    top: int
    leftmost: int
    #: by address of the rb_node
    links: dict[int, Link] = field(default_factory=dict)
    #: sentences that say what is wrong with the tree itself
    problems: list[str] = field(default_factory=list)

    def search(self, first: int, last: int) -> list[Link]:
        """The links that the kernel's search for the indexes ``first`` to ``last`` finds."""
        top, leftmost = self.links.get(self.top), self.links.get(self.leftmost)
        if top is None or top.subtree_last < first or leftmost is None or leftmost.first > last:
            return []
        return list(self._below(self.top, first, last))

    def _below(self, at: int, first: int, last: int) -> Iterator[Link]:
        # Visits the nodes in order. A left subtree is entered only if its subtree_last is large enough, and a right one
        # only if this node does not start too late. subtree_search() and iter_next() together do the same.
        stack: list[tuple[int, bool]] = [(at, False)]
        # Each node is visited twice at most. A tree with a loop is noted in ``problems``.
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
    """A ksm_rmap_item: says that a process maps a KSM page at an address."""

    #: the address of the ksm_rmap_item
    at: int
    mm: int
    #: the user address, without the flags in its low bits
    address: int
    anon_vma: int
    #: the stable node that the item points to
    head: int
    #: None if the kernel stores no index (before 7.3) and searches all indexes
    index: int | None


@dataclass
class StableNode:
    """The stable node of a KSM page, with the rmap items that say where the page is mapped."""

    #: the address of the ksm_stable_node
    at: int
    pfn: int
    #: the number of its items, by the kernel's own counter (rmap_hlist_len)
    length: int
    items: list[Item] = field(default_factory=list)
    #: sentences that say what is wrong with the list of items
    problems: list[str] = field(default_factory=list)


class ReverseMap:
    """The reverse map of a guest. Each anon_vma and each stable node is read once."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._shift = kernel.page_shift
        #: anon_vmas and stable nodes read so far, by address; None if one cannot be read
        self.anon_vmas: dict[int, AnonVma | None] = {}
        self.stable_nodes: dict[int, StableNode | None] = {}
        self._found: dict[int, frozenset[tuple[int, int]]] = {}

    def anon_vma(self, at: int) -> AnonVma | None:
        """The anon_vma at an address; None if it cannot be read."""
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
                anon_vma.problems.append(f"its interval tree reaches the node at {node:#x} twice")
                continue
            try:
                link = self._read_link(node)
            except Unreadable as error:
                anon_vma.problems.append(f"the node at {node:#x} in its interval tree cannot be read: {error}")
                continue
            anon_vma.links[node] = link
            if link.parent != parent:  # iter_next() climbs up by this pointer
                anon_vma.problems.append(
                    f"the node at {node:#x} in its interval tree has the parent pointer {link.parent:#x}, but is a "
                    f"child of {parent:#x}: searches continue in the wrong place after this node"
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
            parent=memory.u64(node + layout["rb_node.__rb_parent_color"]) & ~3,  # the low bits hold the colour
        )

    def reaches(self, at: int, index: int, pages: int, vma: Vma, address: int) -> bool:
        """Whether ``rmap_walk_anon()`` finds a folio at an address.

        :param at: the anon_vma that the folio points to.
        :param index: the folio's index.
        :param pages: the folio's size in pages.
        :param vma: the VMA that contains the address.
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
        """Whether the lock of an anon_vma is held for writing, so that its tree may be changing."""
        try:
            return self._kernel.locked_for_writing(anon_vma.root + self._kernel.layout["anon_vma.rwsem"])
        except Unreadable:
            return False

    # --- KSM ---------------------------------------------------------------------------------------------------------

    def stable_node(self, at: int) -> StableNode | None:
        """The stable node at an address; None if it cannot be read, or if the kernel has no KSM."""
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
                found.problems.append(f"its list of rmap items does not end: it reaches {node:#x} twice")
                break
            seen.add(node)
            try:
                following, back = memory.u64(node), memory.u64(node + 8)
                item = self.item(node - hlist)
            except Unreadable as error:
                found.problems.append(f"the rest of its list of rmap items cannot be read: {error}")
                break
            if back != place:
                found.problems.append(
                    f"the pprev pointer of its rmap item at {node - hlist:#x} is {back:#x} instead of {place:#x}"
                )
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
            # the bits below the page size are flags, and mm/ksm.c masks them out in the same way
            address=memory.u64(at + layout["ksm_rmap_item.address"]) & -self._kernel.page_size & _MASK,
            anon_vma=memory.u64(at + layout["ksm_rmap_item.anon_vma"]),
            head=memory.u64(at + layout["ksm_rmap_item.head"]),
            index=None if stored is None else memory.u64(at + stored),
        )

    def ksm_places(self, node: StableNode) -> frozenset[tuple[int, int]]:
        """Where ``rmap_walk_ksm()`` finds the page of a stable node: (mm_struct, address).

        The walk searches the process of each item first and all other processes afterwards. In the end it has searched
        every VMA of the item's anon_vma that contains the item's address.
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
