# SPDX-License-Identifier: GPL-2.0
"""KSM's stable nodes and rmap items: many sharers, a tree for each NUMA node, and places that are gone.

Pictures as in :mod:`guest_tests.test_ksm_rmap`.
"""

from __future__ import annotations

import pytest

from guest_tests.mm import maps, numa, pagemap, sigbus, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, move
from guest_tests.mm.probes import Place, Probe
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.support.found import (
    assert_found,
    assert_found_at,
    assert_found_by,
    destroys,
    every_probe,
    places_of,
    usable,
)
from guest_tests.support.ksm_scenes import SAME, Pair, assert_merged, assert_unmerged, hugh, pair_in_two_children

# Reclaim needs memory that was charged to a group of its own.
pytestmark = pytest.mark.usefixtures("own_group")


# --- many sharers, many nodes ------------------------------------------------------------------------------------


@every_probe
def test_every_copy_of_a_page_with_many_sharers_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 123 (max-sharing): four moved pages merge while KSM allows two mappings per merged page (max_page_sharing=2).

    KSM makes two copies of the page ("dups") and chains them.

    ::

        page      0         10
        before  | a a a a |             equal pages
        after   | . . . . | A A B B |    one frame for every two

    Every kernel: the walk of each copy finds both of its places.
    """
    ksm.set(max_page_sharing=2)
    moved = move(area.map(0, 4).fill_same(SAME).madvise(syscalls.MADV_MERGEABLE), area.page(10))
    ksm.merge(moved)
    counters = ksm.counters()
    assert counters.stable_node_chains == 1, counters
    assert counters.stable_node_dups == 2, counters
    copies: dict[int | None, list[Place]] = {}
    for place in places_of(moved):
        copies.setdefault(pagemap.pfn(place.address), []).append(place)
    assert [len(copy) for copy in copies.values()] == [2, 2], copies
    for frame, copy in copies.items():
        now = [pagemap.entry(place.address) for place in copy]
        if now[0].pfn == frame:
            assert_found_by(probe, copy, "a move, and a merge of more mappings than max_page_sharing")
        else:
            # The walk for an earlier copy also moved this one: reclaim and compaction choose pages themselves.
            assert len(set(now)) == 1, f"only some mappings of {frame:#x} at {copy} followed: {now}"
    if not destroys(probe):
        moved.check()


def _on_the_other_node(area: CarveOut, ksm: Ksm) -> tuple[Pair, int, int]:
    """A pair that was merged with merge_across_nodes=0 and then migrated; its node before that, and its node now."""
    system.require_nodes(2)
    ksm.set(merge_across_nodes=0)
    pair = hugh(area, ksm)
    here = numa.node_of(pair.stayed.address)
    there = next(node for node in numa.nodes() if node != here)
    assert numa.move_pages(0, [pair.stayed.address], [there], numa.MPOL_MF_MOVE_ALL) == [there]
    return pair, here, there


@every_probe
def test_found_after_a_move_to_a_node_that_is_not_merged_across(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 124 (across-nodes-0): a merged and moved page is migrated to the other node with merge_across_nodes=0, and
    scanned there.

    KSM keeps one tree for each node then.

    ::

        node 0   | A | . | A |    merged
        node 1   | A | . | A |    moved there by move_pages(), then scanned: kept, in the tree of node 1

    Every kernel: the page stays merged on the new node, and each walk finds both places.
    """
    pair, _, there = _on_the_other_node(area, ksm)
    assert_merged(pair.places)
    ksm.scan()
    assert_merged(pair.places)
    assert numa.nodes_of([place.address for place in pair.places]) == [there, there]
    assert_found_by(probe, pair.places, "a merge on one node, a migration to another and a scan")
    if not destroys(probe):
        pair.check()


def test_equal_pages_of_two_nodes_are_not_merged(area: CarveOut, ksm: Ksm) -> None:
    """Row 124 (across-nodes-0): a merged page is migrated to the other node with merge_across_nodes=0, and an equal
    page is on the first one.

    ::

        node 0                   | A |     equal, not merged
        node 1   | A | . | A |             merged on node 0, then moved here by move_pages()

    Every kernel: the page on the first node keeps a frame of its own there, and the other two stay merged.
    """
    pair, here, there = _on_the_other_node(area, ksm)
    third = area.map(10, 1)
    numa.mbind(third.address, third.length, numa.MPOL_BIND, [here])
    third.fill_same(SAME).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan()
    assert_unmerged(third, [pair.stayed, pair.moved])
    assert_merged(pair.places)
    nodes = numa.nodes_of([third.address, pair.stayed.address, pair.moved.address])
    assert nodes == [here, there, there], f"the three pages are on nodes {nodes}"
    assert_found_at(*pair.places)
    assert_found(third.check())
    pair.check()


def test_a_page_that_was_merged_is_not_old(area: CarveOut, ksm: Ksm) -> None:
    """No row: with smart_scan one of three merged pages is written, is different for a scan, and is equal again (7.3).

    KSM keeps the page offset of a merged page where any other page has its age, which is the part above its lowest 32
    bits, and the number of scans that skip it (struct ksm_rmap_item, 7.3). A carve-out has such page offsets.

    In a guest of its own: KSM may know a page at the same address from an earlier test, and its age.

    Every kernel: from 7.3 on the page is merged by the next two scans. The first notes its checksum. A page that is
    older than three scans would be skipped (should_skip_rmap_item(), mm/ksm.c), and older kernels let it grow older.
    """
    system.require_kernel(7, 3, "a page that was merged starts with a new age")
    ksm.set(smart_scan=1)
    trio = area.map(0, 3).fill_same(SAME).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan_exactly(3)
    assert_merged(places_of(trio))
    last = trio.part(2).fill(seed=1)
    ksm.scan_exactly(1)
    assert_unmerged(last, [trio.part(0)])
    last.fill_same(SAME)
    ksm.scan_exactly(2)
    assert_merged(places_of(trio))
    assert_found_at(*places_of(trio))


# --- what KSM remembers of places that are gone ------------------------------------------------------------------


@every_probe
def test_new_memory_at_an_old_place_is_left_alone(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 126 (stale-item): a merged page is unmapped, and other data is mapped at its address, which KSM still has an
    entry for.

    ::

        merged   | A | A | A |
        new      | A | b | A |    b joins the mapping around it, and so the very anon_vma of the stale entry

    Every kernel: each walk of the merged page finds the other two places, and the new data stays untouched.
    """
    trio = area.map(0, 3).fill_same(SAME)
    ksm.merge(trio)
    trio.part(1).unmap()
    new = area.map(1, 1).madvise(syscalls.MADV_MERGEABLE).fill(seed=3)
    vma = maps.vma_at(new.address)
    assert (vma.start, vma.end) == (trio.address, trio.end), f"the new page got a mapping of its own: {vma}"
    assert_unmerged(new, [trio.part(0), trio.part(2)])
    assert_found_by(probe, places_of(trio.part(0), trio.part(2)), "a merge and the replacement of a third mapping")
    new.check()
    ksm.scan()
    new.check()
    if not destroys(probe):
        trio.part(0).check()
        trio.part(2).check()


@pytest.mark.finding("ksm-poison-bystander", match="was told that it lost a page")
def test_poison_is_not_told_to_a_process_that_moved_its_page_away(area: CarveOut, ksm: Ksm) -> None:
    """Row 115 (rmap-hwpoison): of two processes with one merged page, one moves its page away and so gets a copy of its
    own; then the merged page is poisoned.

    collect_procs_ksm() (mm/ksm.c of 6.12 and 7.3) signals every process with a mapping in the entry's anon_vma (7.3:
    with the entry's page offset in it). It does not check that the mapping contains the address, as rmap_walk_ksm()
    does.

    ::

        page         0   1  ...  10
        first      | A | . |
        second     | . | A |    | . |    merged
        second     | . | . |    | a |    moved: a copy of its own. KSM still has an entry for page 1

    Every kernel: only the process that maps the page gets SIGBUS. This fails: finding ksm-poison-bystander.
    """
    probe = usable(HwPoison())
    with pair_in_two_children(area) as (pair, first, second):
        ksm.scan()
        stayed = Place(pair.stayed.address, first)
        frame = assert_merged([stayed, Place(pair.moved.address, second)])
        moved = second.call(move, pair.moved, area.page(10))
        second.call(assert_unmerged, moved)
        assert pagemap.pfn(moved.address, second.pid) != frame
        second.call(_watch)
        assert_found_by(probe, [stayed], "a move in another process")
        signal = second.call(_told)
        second.call(moved.check)
    assert signal is None, (
        f"process {second.pid} moved its page to {moved.address:#x} and has a copy of its own there, but was told that "
        f"it lost a page at {signal.address:#x} when pfn {frame:#x} of process {first.pid} was poisoned: {signal}"
    )


def _watch() -> None:
    sigbus.Watch().__enter__()


def _told() -> sigbus.Sigbus | None:
    return sigbus.take(0)
