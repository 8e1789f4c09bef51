# SPDX-License-Identifier: GPL-2.0
"""KSM's reverse map in special cases: swap cache, stale entries, many sharers, one tree for each node.

Pictures as in :mod:`guest_tests.test_ksm_rmap`; ``s`` is a swap entry.
"""

from __future__ import annotations

import pytest

from guest_tests.mm import kpage, maps, memcg, numa, pagemap, sigbus, swap, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Place, Probe
from guest_tests.mm.probes.migration import SoftOffline
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
from guest_tests.support.ksm_scenes import (
    SAME,
    Pair,
    assert_merged,
    assert_unmerged,
    hugh,
    in_swap_cache,
    pair_in_two_children,
)
from guest_tests.support.moves import move_or_refused, refused_move, ways
from guest_tests.support.swapping import read_back, reclaim_group

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


# --- swap --------------------------------------------------------------------------------------------------------


def test_pages_that_return_from_swap_are_found(area: CarveOut, ksm: Ksm) -> None:
    """Row 112 (hugh-reclaim): a merged and moved pair is swapped out and read back, first here and then there.

    The first read brings in an ordinary page for one address, and the swap cache has it. It has the wrong index for the
    other address, so that the second read has to copy it (ksm_might_need_to_copy(), mm/ksm.c).

    Every kernel: both hold their data, and a walk finds each.
    """
    memcg.require_memcg()
    swap.require_swap()
    pair = hugh(area, ksm)
    reclaim_group(pair.places)
    pair.check()
    assert_found(pair.stayed, pair.moved)


def _moved_in_swap_cache(area: CarveOut, ksm: Ksm) -> Pair:
    """A merged pair, of which one swap entry was moved while the page was in the swap cache; both are read back."""
    with in_swap_cache(area, ksm) as pair:
        pair = Pair(pair.stayed, move(pair.moved, area.page(10)))
        read_back(pair.moved, pair.stayed)
    return pair


@pytest.mark.finding(  # the second text is that of an audit, for probes that cannot tell
    "ksm-swapcache-move", match=("does not find the page at", "rmap items of its stable node leads there")
)
@every_probe
def test_a_page_moved_while_in_the_swap_cache_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 125 (swapcache-hole): a merged page is swapped out but in the swap cache; one of its swap entries moves; both
    are read back.

    A move un-merges pages that are present, but break_ksm() passes over swap entries. Reading the entry back maps the
    same KSM page, because ksm_might_need_to_copy() does not copy it. KSM knows the page at pages 0 and 1 only, so that
    no walk finds it at page 10 until ksmd scans again. (mm/ksm.c: break_ksm(), ksm_might_need_to_copy(),
    rmap_walk_ksm(); mm/memory.c: do_swap_page(); 6.12 and 7.3.)

    ::

        page       0   1  ...  10
        merged   | A | A |
        swapped  | s | s |    | . |    A stays in the swap cache
                       `--------.
        moved    | s | . |    | s |    break_ksm() passes over swap entries
        read     | A | . |    | A |    ksm_might_need_to_copy(): "no need to copy it"

    Every kernel: each walk finds both places. This fails: finding ksm-swapcache-move.
    """
    pair = _moved_in_swap_cache(area, ksm)
    pair.check()
    story = "a swap-out that kept the page in the swap cache, a move of one swap entry, and reads of both"
    shared = pagemap.pfn(pair.moved.address) == pagemap.pfn(pair.stayed.address)
    # A kernel without the finding may have copied the page.
    assert_found_by(probe, pair.places if shared else places_of(pair.moved), story)


@every_probe
def test_a_scan_finds_what_was_moved_while_in_the_swap_cache(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 125 (swapcache-hole): one swap entry of a merged page in the swap cache moves, both are read back, and ksmd
    scans.

    ::

        page       0   1  ...  10
        read     | A | . |    | A |
        scanned  | A | . |    | A |    and found in both places

    Every kernel: ksmd notices the page at its new address, and each walk finds both places.
    """
    pair = _moved_in_swap_cache(area, ksm)
    ksm.scan()
    assert_merged(pair.places)
    assert_found_by(probe, pair.places, "a move of a page in the swap cache and a scan")
    if not destroys(probe):
        pair.check()


@pytest.mark.finding(  # the second text is that of an audit, for probes that cannot tell
    "ksm-swapcache-scanned", match=("does not find the page at", "rmap items of its stable node leads there")
)
@every_probe
def test_a_page_scanned_while_in_the_swap_cache_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 125 (swapcache-hole): a merged page is swapped out but in the swap cache; ksmd scans; both places are read
    back.

    ksmd passes over swap entries (ksm_next_page_pmd_entry()), and drops its entries for places without a page
    (get_next_rmap_item(), remove_trailing_rmap_items()). Reading back maps the same KSM page, because
    ksm_might_need_to_copy() does not copy it, and no walk finds it until ksmd scans again. (mm/ksm.c of 7.3.)

    ::

        page       0   1
        merged   | A | A |
        swapped  | s | s |    A stays in the swap cache
        scanned  | s | s |    KSM forgets pages 0 and 1
        read     | A | A |    ksm_might_need_to_copy(): "no need to copy it"

    Every kernel: each walk finds both places. This fails: finding ksm-swapcache-scanned.
    """
    with in_swap_cache(area, ksm) as pair:
        ksm.scan()
        read_back(pair.moved, pair.stayed)
    pair.check()
    shared = pagemap.pfn(pair.moved.address) == pagemap.pfn(pair.stayed.address)
    # A kernel without the finding may have copied the page.
    places = pair.places if shared else places_of(pair.moved)
    assert_found_by(probe, places, "a swap-out that kept the page in the swap cache, a scan, and reads of both")


def _called_off_in_swap_cache(area: CarveOut, ksm: Ksm) -> Pair:
    """A merged pair; one page was made unmergeable while the page was in the swap cache; both are read back."""
    with in_swap_cache(area, ksm) as pair:
        pair.moved.madvise(syscalls.MADV_UNMERGEABLE)
        read_back(pair.moved, pair.stayed)
    return pair


@pytest.mark.finding("ksm-swapcache-unmergeable", match="after MADV_UNMERGEABLE the page at")
def test_no_merged_page_comes_back_where_merging_was_called_off(area: CarveOut, ksm: Ksm) -> None:
    """Row 128 (unmergeable-after): a merged page is swapped out but in the swap cache; one of its two places is made
    unmergeable; both are read back.

    In fact the KSM page comes back (ksm_might_need_to_copy(), mm/ksm.c of 6.12 and 7.3). The mapping is not mergeable
    any more, so that ksmd drops its entry for page 1 and never makes a new one: no walk finds page 1 as long as it is
    mapped.

    ::

        page          0   1
        merged      | A | A |
        swapped     | s | s |    A stays in the swap cache
        called off  | s | s |    MADV_UNMERGEABLE for page 1: break_ksm() passes over swap entries
        read        | A | b |    expected: b is a page of its own

    Every kernel: the unmergeable place has a page of its own. This fails: finding ksm-swapcache-unmergeable.
    """
    pair = _called_off_in_swap_cache(area, ksm)
    ksm.scan()
    pair.check()
    frame = pagemap.pfn(pair.moved.address)
    walked = SoftOffline().walk(pair.places) if frame == pagemap.pfn(pair.stayed.address) else "not probed"
    assert frame != pagemap.pfn(pair.stayed.address), (
        f"after MADV_UNMERGEABLE the page at {pair.moved.address:#x} is KSM's pfn {frame:#x} again, shared with "
        f"{pair.stayed.address:#x}, and three scans do not change that. Its reverse walk: {walked}"
    )
    assert_unmerged(pair.moved, [pair.stayed])


def test_a_merged_page_where_merging_was_called_off_is_refused_early(relocate: bool, area: CarveOut, ksm: Ksm) -> None:
    """Row 128 (unmergeable-after): a page that is merged although its mapping was made unmergeable is to move with flag
    16 onto a place that is in use.

    The page comes back from the swap cache, as in the test before. It cannot be relocated, and no move un-merges it.
    The kernel must notice that before it unmaps the destination.

    ::

        page          0   1        10
        called off  | A | A |    | d |    A at page 1 is mapped as it was, in a mapping that is not mergeable
        refused     | A | A |    | d |

    Unpatched: EINVAL; source and destination are as before.
    Patched: EFAULT; source and destination are as before.
    """
    pair = _called_off_in_swap_cache(area, ksm)
    ksm.stop()
    if pagemap.pfn(pair.moved.address) != pagemap.pfn(pair.stayed.address):
        pytest.skip("this kernel gives the page that comes back a frame of its own: nothing to refuse")
    there = area.map(10, 1).fill(seed=3)
    refused_move(relocate, area, pair.moved, there.address)
    there.check()
    pair.check()


@ways
def test_a_page_in_the_swap_cache_is_left_to_the_place_that_maps_it(
    flags: int, relocate: bool, area: CarveOut, ksm: Ksm
) -> None:
    """Row 133 (relocate-ksm): two places share a swap entry, and only one of them has the page back from swap; the
    mapping of the other one moves.

    Both places have the same page offset and anon_vma, because the first was copied with MREMAP_DONTUNMAP. So index and
    mapping of the page do not tell for which place it was read. It is mapped at one of them, and must not be rewritten
    for a move of the other. UFFDIO_MOVE leaves such pages alone too, by pte_swp_exclusive() (mm/userfaultfd.c).

    ::

        page            0   1   2        10          20
        copied        | . | b | c |    | A |                      page 10 has the page offset of page 0
        merged        | A | b | c |    | A |                      one KSM page
        swapped out   | s | s | s |    | s |                      one swap entry at 0 and 10; the KSM page is freed
        read          | s | s | s |    | A |                      not KSM's; in the swap cache because of page 0
        moved                          | A |       | s | s | s |

    Unpatched: EINVAL with a flag, and nothing changes; page 10 is found.
    Patched: the move succeeds with each flag. Page 10 is found, also when what moved is gone.
    """
    memcg.require_memcg()
    swap.require_swap()
    whole = area.map(0, 3).fill().madvise(syscalls.MADV_MERGEABLE)
    copied = move(whole.part(0).fill_same(SAME), area.page(10), syscalls.MREMAP_DONTUNMAP)
    again = whole.part(0).fill_same(SAME)
    whole = Mapping(whole.address, whole.pages, [*again.contents, *whole.part(1, 2).contents])
    ksm.scan()
    assert_merged(places_of(again, copied))
    reclaim_group(places_of(whole, copied))
    copied.touch_read()
    state = kpage.flags(pagemap.pfn(copied.address))
    assert kpage.Flag.SWAPCACHE in state, f"the page that was read back is not in the swap cache: {state!r}"
    moved = move_or_refused(relocate, area, whole, area.page(20), flags)
    # Whoever checked the data has read page 0 or 20. It may be the same page again, which is not paged out then.
    assert_found(copied, pageout=False)
    if moved is not None:
        assert_found(moved, pageout=False)
        moved.unmap()
        assert_found(copied)


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
