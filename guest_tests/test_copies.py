# SPDX-License-Identifier: GPL-2.0
"""The copy of a mapping that mremap() makes: what it keeps, what it merges with, and what DONTUNMAP leaves behind.

mremap() copies a mapping to its new place, moves the page tables, and then unmaps the source or, with
``MREMAP_DONTUNMAP``, empties it (copy_vma() in mm/vma.c, dontunmap_complete() in mm/mremap.c of 7.3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import maps, numa, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import (
    MADV_DOFORK,
    MADV_DONTFORK,
    MREMAP_DONTUNMAP,
    PROT_READ,
    PROT_RW,
)
from guest_tests.support.checks import expect_layout, same_accounts
from guest_tests.support.folios import THP, is_large, mthp, thp
from guest_tests.support.found import assert_found

pytestmark = pytest.mark.shared_guest

#: what is moved of a mapping of ten pages: the first page, and how many
_PARTS: Final = {"whole": (0, 10), "part": (3, 4)}
_KINDS: Final = pytest.mark.parametrize("flags", [0, MREMAP_DONTUNMAP], ids=["move", "dontunmap"])
_MLOCK_ONFAULT: Final = 1

# --- what the copy keeps -----------------------------------------------------------------------------------------


@_KINDS
@pytest.mark.parametrize("part", _PARTS)
def test_the_name_of_a_mapping(area: CarveOut, part: str, flags: int) -> None:
    """No row: anonymous memory that has a name moves, in whole or in part, also with DONTUNMAP.

    Every kernel: it has its name at the new place, and so has what stays.
    """
    system.require_vma_names()
    source = area.map(0, 10).fill()
    syscalls.name_anonymous(source.address, source.length, "buffer")
    first, pages = _PARTS[part]
    moved = move(source.part(first, pages), area.page(20), flags).check()
    assert maps.vma_at(moved.address).name == "buffer", f"{maps.vma_at(moved.address)} lost the name by the move"
    if flags or part == "part":
        stayed = maps.vma_at(source.address)
        assert stayed.name == "buffer", f"{stayed}, which was not moved, lost the name by the move"
    assert_found(moved)


@_KINDS
@pytest.mark.parametrize("part", _PARTS)
def test_the_policy_of_a_mapping(area: CarveOut, part: str, flags: int) -> None:
    """No row: memory that is bound to a node moves, and its pages are faulted in at the new place only.

    Every kernel: they come from that node, whichever it is.
    """
    system.require_nodes(2)
    first, pages = _PARTS[part]
    for number, node in enumerate(numa.nodes()[:2]):
        source = area.map(0, 10)
        numa.mbind(source.address, source.length, numa.MPOL_BIND, [node])
        moved = move(source.part(first, pages), area.page(20), flags).fill(seed=number)
        policy = _policy(moved.address)
        assert policy == f"bind:{node}", f"memory that was bound to node {node} has policy {policy} at its new place"
        nodes = set(numa.nodes_of(moved.page_addresses))
        assert nodes == {node}, f"pages of memory that is bound to node {node} come from {nodes}"
        moved.check()
        moved.unmap()


def _policy(address: int) -> str:
    """The policy that numa_maps shows for the mapping that begins at ``address``."""
    lines = (line.split() for line in Path("/proc/self/numa_maps").read_text().splitlines())
    return next(words[1] for words in lines if int(words[0], 16) == address)


# --- what the copy merges with -----------------------------------------------------------------------------------


@pytest.mark.parametrize("faulted", [False, True], ids=["untouched", "faulted"])
def test_between_a_neighbour_and_itself(area: CarveOut, faulted: bool) -> None:
    """No row: untouched memory moves to the gap between a neighbour and itself.

    ::

        page   0         5         10        15
               |nnnnnnnnn|         |sssssssss|
               |nnnnnnnnnnnnnnnnnnn|               one; the neighbour may have pages

    The neighbour grows over the gap and over the source, whose VMA is freed. The source is then unmapped from the
    neighbour (copy_vma(), mm/vma.c).

    Every kernel: one mapping of ten pages; the sizes of the process and the committed memory stay the same.
    """

    def once() -> tuple[Mapping, Mapping]:
        area.hole(0, 15)
        neighbour = area.map(0, 5)
        if faulted:
            neighbour.fill()
        moved = move(area.map(10, 5), area.page(5))
        expect_layout(area, [(0, 10)], "untouched memory behind a neighbour that it can merge with")
        return neighbour.check(), moved.check()

    once()
    same_accounts(once, "mapping a neighbour and a source, and moving the source to between them,")
    neighbour, moved = once()
    assert_found(neighbour.fill(), moved.fill(seed=1))


@pytest.mark.finding("dontunmap-merges-with-source", match="a copy that DONTUNMAP makes beside its source")
@pytest.mark.parametrize("lock", [False, True], ids=["plain", "lock-onfault"])
@pytest.mark.parametrize("to", [0, 20], ids=["before", "behind"])
def test_a_copy_beside_its_source(area: CarveOut, to: int, lock: bool) -> None:
    """No row: untouched memory moves with DONTUNMAP to the place right beside it, also when it is locked on fault.

    ::

        page   0         10        20        30
                         |sssssssss|ccccccccc|     two, or in front of it

    Every kernel: the copy is locked if the source was, and the source is not; what is locked is all unlocked in the
    end. Source and copy are two mappings. This fails before 7.3: finding dontunmap-merges-with-source.
    """
    area.hole(0, 40)
    before = vmstat.status()["VmLck"]
    source = area.map(10, 10)
    if lock:
        syscalls.call("mlock2", source.address, source.length, _MLOCK_ONFAULT)
    copy = move(source, area.page(to), MREMAP_DONTUNMAP)
    locked = ["lo" in maps.vma_at(each.address, detailed=True).vm_flags for each in (copy, source)]
    assert locked == [lock, False], (
        f"a copy that DONTUNMAP makes beside its source, and the source, are locked: {locked}, expected {[lock, False]}"
    )
    expect_layout(area, sorted([(10, 10), (to, 10)]), "a copy that DONTUNMAP makes beside its source")
    copy.fill(seed=1).check()
    source.fill(seed=2).check()
    if not lock:
        assert_found(copy, source)
    area.hole(0, 40)
    left = vmstat.status()["VmLck"] - before
    assert not left, f"VmLck is {left} kB too large after unmapping what was locked"


# --- what DONTUNMAP leaves behind --------------------------------------------------------------------------------


def test_an_emptied_source_merges_with_a_faulted_neighbour(area: CarveOut) -> None:
    """No row: two mappings with pages of their own differ only in where these belong. One is emptied by DONTUNMAP.

    ::

        page   0         5         10        20        25
               |nnnnnnnnn|sssssssss|                         two: both faulted, each by itself
               |nnnnnnnnn0000000000|         |sssssssss|     one, after s is read-only and writable again

    Every kernel: the emptied source is as good as memory that was never touched: it merges with its neighbour as soon
    as the kernel tries to.
    """
    whole = area.map(0, 10)
    neighbour, source = whole.part(0, 5), whole.part(5, 5)
    # Mappings that differ in this do not share an anon_vma (anon_vma_compatible(), mm/vma.c).
    source.madvise(MADV_DONTFORK)
    neighbour.fill()
    source.fill(seed=1)
    source.madvise(MADV_DOFORK)
    expect_layout(area, [(0, 5), (5, 5)], "two mappings with an anon_vma each")
    moved = move(source, area.page(20), MREMAP_DONTUNMAP).check()
    source.mprotect(PROT_READ)
    source.mprotect(PROT_RW)
    expect_layout(area, [(0, 10), (20, 5)], "an emptied source beside a faulted mapping of the same kind")
    assert_found(neighbour.check(), source.check().fill(seed=2), moved.check())


@pytest.mark.finding("dontunmap-keeps-offset", match="new memory on both sides of an emptied source")
def test_new_memory_joins_a_source_that_was_emptied(area: CarveOut) -> None:
    """No row: memory that was moved before moves on with DONTUNMAP, and new memory is mapped on both sides of what it
    leaves behind.

    ::

        page   0       10        15        20                30
               |sssss|                                              moved to 15
                                 |sssss|                            moved to 30 with DONTUNMAP
                       |uuuuuuuuu|00000|uuuuuuuuu|           |sssss|

    Every kernel: new memory, emptied source and new memory are one mapping. This fails before 7.3: finding
    dontunmap-keeps-offset.
    """
    moved = move(area.map(0, 5).fill(), area.page(15))
    last = move(moved, area.page(30), MREMAP_DONTUNMAP).check()
    before, behind = area.map(10, 5), area.map(20, 5)
    expect_layout(area, [(10, 15), (30, 5)], "new memory on both sides of an emptied source")
    assert_found(before.fill(seed=1), moved.check().fill(seed=2), behind.fill(seed=3), last.check())


# --- pages that only some processes share ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [1, 0], ids=["second-half", "first-half"])
def test_half_of_a_folio_is_shared(shared: int) -> None:
    """No row: memory of one folio moves, one half of which a child shares and the other half of which it does not
    (MADV_DONTFORK).

    ::

        page   0                  16                 32
               |wwwwwwwwwwwwwwwwww|rrrrrrrrrrrrrrrrrr|     one folio in one mapping; r is copied when it is written

    mremap() moves pages of a folio together where page tables have contiguous entries, as on arm64. 6.17 gave all of
    them the permission of the first one (04d1c9d60c6e).

    Every kernel: the child does not see what is written to the shared half after the move.
    """
    size = 32 * PAGE_SIZE
    if not (THP / f"hugepages-{size >> 10}kB").exists():
        pytest.skip(f"needs Linux 6.8 and CONFIG_TRANSPARENT_HUGEPAGE: no {THP}/hugepages-{size >> 10}kB")
    with thp("madvise"), mthp(size), carve_out(128) as area:
        source = area.map(0, 32).fill()
        frames = pagemap.pfns(source.address, 32)
        assert None not in frames, "not all pages are present"
        if not is_large(source.address) or frames != list(range(frames[0] or 0, (frames[0] or 0) + 32)):
            pytest.skip(f"needs a folio of {size >> 10} kB: is memory too fragmented?")
        own = source.part(0 if shared else 16, 16)
        own.madvise(MADV_DONTFORK)
        with Child() as child:
            own.madvise(MADV_DOFORK)
            expect_layout(area, [(0, 32)], "both halves are equal again")
            moved = move(source, area.page(64)).check()
            half = source.part(16 * shared, 16)
            now = moved.part(16 * shared, 16).fill(seed=1)
            child.call(half.check)
            now.check()
            child.call(half.check)
        assert_found(now, moved.part(16 - 16 * shared, 16).check())
