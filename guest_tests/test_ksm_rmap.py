# SPDX-License-Identifier: GPL-2.0
"""KSM's reverse map after a move: does every kind of walk find every place where a merged page is mapped?

Every probe walks in every scene, and pages that survive the walk must hold the same data. In the pictures ``A`` is a
page that KSM merged, any other letter a page of its own, ``.`` is nothing.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from guest_tests.mm import maps, pagemap, syscalls
from guest_tests.mm.ksm import Ksm, merging_pages, stat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, map_anonymous, move
from guest_tests.mm.probes import Place, Probe
from guest_tests.mm.probes.migration import MovePages, SoftOffline
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.proctree import Child
from guest_tests.support.found import assert_found_by, destroys, every_probe, places_of, usable
from guest_tests.support.ksm_scenes import (
    SAME,
    assert_merged,
    assert_unmerged,
    equal_pair,
    hugh,
    move_and_merge,
    pair_in_two_children,
)

# Reclaim needs memory that was charged to a group of its own.
pytestmark = pytest.mark.usefixtures("own_group")


@every_probe
def test_both_places_are_found_after_a_move_and_a_merge(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Rows 112 (hugh-reclaim), 114 (rmap-soft-offline), 116 (rmap-idle), 117 (rmap-damon) and 118 (rmap-compaction):
    one of two equal pages moves, KSM merges both afterwards, and each kind of walk is forced.

    ::

        before   | A | A | . |    one mapping
                       `---.
        after    | A | . | A |    merged at the new place

    Every kernel: each walk finds both places.
    """
    pair = hugh(area, ksm)
    assert_found_by(probe, pair.places, "a move and a merge at the new place")
    if not destroys(probe):
        pair.check()


@every_probe
def test_every_process_of_a_tree_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 113 (rmap-migrate): a parent, its child and a grandchild each move a page by different distances, and KSM
    merges all pages afterwards.

    ::

        page         0   1  ...  10  11  12
        parent     | A | . |   | A | . | . |
        child      | A | . |   | . | A | . |
        grandchild | A | . |   | . | . | A |

    Every kernel: each walk finds all six places.
    """
    pair = equal_pair(area, dontfork=False)
    with Child() as child, child.fork() as grandchild:
        places = [Place(pair.stayed.address, each) for each in (None, child, grandchild)]
        for index, each in enumerate((None, child, grandchild)):
            target = area.page(10 + index)
            moved = move(pair.moved, target) if each is None else each.call(move, pair.moved, target)
            places.append(Place(moved.address, each))
        ksm.scan()
        assert_merged(places)
        assert_found_by(probe, places, "moves in three processes and a merge")
        if not destroys(probe):
            for place in places:
                place.run(_check_same, place.address)


def _check_same(address: int) -> None:
    Mapping(address, 1, map_anonymous(1).fill_same(SAME).contents).check()


def test_poison_is_told_to_a_process_that_only_has_the_moved_place(area: CarveOut, ksm: Ksm) -> None:
    """Row 115 (rmap-hwpoison): two processes map a merged page once each, one of them at an address that the page was
    moved to; the page is poisoned.

    ::

        stays    | A | . | . |    process 1
        moves    | . | . | A |    process 2, from the second page

    Every kernel: both get SIGBUS with the address where they map the page.
    """
    probe = usable(HwPoison())
    with pair_in_two_children(area) as (pair, stays, moves):
        moved = moves.call(move, pair.moved, area.page(2))
        ksm.scan()
        places = [Place(pair.stayed.address, stays), Place(moved.address, moves)]
        assert_merged(places)
        answer = assert_found_by(probe, places, "a move in one of two processes and a merge")
    assert f"process {moves.pid} got SIGBUS AO for {moved.address:#x}" in answer.evidence, answer


def test_many_moved_pages_survive_compaction(area: CarveOut, ksm: Ksm) -> None:
    """Row 118 (rmap-compaction): 13 moved pages are merged with 13 that stayed, and all memory is compacted.

    ::

        before   | a b c ... | a b c ... | . . . ... |
                                   `-----------.
        after    | A B C ... | . . . ... | A B C ... |    merged

    Every kernel: each two still share a KSM page and hold their data.
    """
    compact = Path("/proc/sys/vm/compact_memory")
    if not compact.exists():
        pytest.skip("needs CONFIG_COMPACTION")
    pages = 13
    stayed = area.map(0, pages).fill().madvise(syscalls.MADV_MERGEABLE)
    moved = move(area.map(pages, pages).fill().madvise(syscalls.MADV_MERGEABLE), area.page(2 * pages))
    ksm.merge(stayed, moved)
    compact.write_text("1")
    for index in range(pages):
        assert_merged([Place(stayed.page(index)), Place(moved.page(index))])
    stayed.check()
    moved.check()


@every_probe
def test_found_after_the_head_of_the_mapping_is_cut_off(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 119 (split-after-merge): a page in a moved mapping is merged; then the head of the mapping is unmapped, or
    made read-only.

    A kernel that remembers the page offset of the mapping instead of the page's would lose the page here, because the
    rest of the mapping begins behind that offset.

    ::

        page      0      10             20
        moved   | A |  | b c A |      | d e A |
        split   | A |  | . c A |      | d'|e A |    d' is read-only, a mapping of its own

    Every kernel: each walk finds all three places.
    """
    stayed = area.map(0, 1).fill_same(SAME)
    cut, protected = (_moved_with_last(area, source, target) for source, target in ((30, 10), (35, 20)))
    ksm.merge(stayed, cut.part(2), protected.part(2))
    places = places_of(stayed, cut.part(2), protected.part(2))
    assert_merged(places)
    cut.part(0).unmap()
    protected.part(0).mprotect(syscalls.PROT_READ)
    assert_found_by(probe, places, "a move, a merge, and cutting off the head of the mapping")
    if not destroys(probe):
        for mapping in (stayed, cut.part(1, 2), protected):
            mapping.check()


def _moved_with_last(area: CarveOut, source: int, target: int) -> Mapping:
    """Three pages moved from page ``source`` to ``target``, the last of which KSM can merge with others."""
    mapping = area.map(source, 3).fill(seed=source)
    mapping.write(2, bytes([SAME]))
    mapping.madvise(syscalls.MADV_MERGEABLE)
    return move(mapping, area.page(target))


@every_probe
def test_found_after_the_mapping_grew_at_its_head(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 120 (merge-after-merge): a page in a moved mapping is merged; then the kernel merges another mapping with the
    moved one.

    ::

        page      0      17      20              30
        first   | A |          | d A f |       | a b c . . . |    d A f came from behind c
        then    | A |  | a b c   d A f |                          a b c follows: one mapping again

    Every kernel: each walk finds both places.
    """
    stayed = area.map(0, 1).fill_same(SAME).madvise(syscalls.MADV_MERGEABLE)
    whole = area.map(30, 6).fill()
    whole.write(4, bytes([SAME]))
    whole.madvise(syscalls.MADV_MERGEABLE)
    tail = move(whole.part(3, 3), area.page(20))
    ksm.scan()
    places = places_of(stayed, tail.part(1))
    assert_merged(places)
    head = move(whole.part(0, 3), area.page(17))
    vma = maps.vma_at(head.address)
    assert (vma.start, vma.end) == (head.address, tail.end), f"the two did not become one mapping: {vma}"
    assert_found_by(probe, places, "a move, a merge, and joining another mapping to the moved one")
    if not destroys(probe):
        for mapping in (stayed, head, tail):
            mapping.check()


@every_probe
def test_a_child_forked_after_the_merge_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 121 (fork-after-remerge): the process forks after its moved page was merged, and ksmd does not scan the
    child.

    ksmd knows nothing of the child; a walk finds it by the parent's entries.

    ::

        parent   | A | . | A |
        child    | A | . | A |    forked after the merge, never scanned

    Every kernel: each walk finds both places in both processes.
    """
    pair = hugh(area, ksm, dontfork=False)
    with Child() as child:
        places = [*pair.places, *(Place(place.address, child) for place in pair.places)]
        assert_merged(places)
        assert_found_by(probe, places, "a move, a merge at the new place, and a fork")
        if not destroys(probe):
            pair.check()
            child.call(pair.check)


@pytest.mark.finding(  # the second text is that of an audit, for probes that cannot tell
    "ksm-forked-forgotten", match=("does not find the page at", "rmap items of its stable node leads there")
)
@every_probe
def test_a_child_is_found_after_its_parent_moved_away(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """No row: a process forks after a merge and moves its page away, and ksmd scans the parent but not yet the child.

    The walk finds the child's pages by the entries that KSM has for the parent's. ksmd drops the entry for page 1 when
    it scans the parent. It makes one for the child only when it scans the child, which comes last (__ksm_enter()).
    (mm/ksm.c: scan_get_next_rmap_item(), get_next_rmap_item(), rmap_walk_ksm(); 6.12 and 7.3.)

    ::

        parent   | A | A |          merged, then forked: ksmd knows nothing of the child
        child    | A | A |

        parent   | A | . |  | b |   moved, which un-merges, and written to; the entry for page 1 stays, and still leads
        child    | A | A |          to the child

        parent   | A | . |  | b |   ksmd comes by the parent and drops the entry for page 1; it has yet to make one
        child    | A |(A)|          for the child, which it visits last (__ksm_enter())

    The moved page is filled anew. Before d58a361b0350 (6.11) cmp_and_merge_page() searches the stable tree first, and
    would merge an unchanged page again at once, before the parent's count could be seen to fall.

    Every kernel: each walk finds the parent's page and both of the child's. This fails: finding ksm-forked-forgotten.
    """
    pair = equal_pair(area, dontfork=False)
    ksm.scan()
    assert_merged(pair.places)
    with Child() as child:
        unseen = merging_pages(child.pid)  # not 0 where test_counters_of_a_process_follow_forks_moves_and_exits fails
        move(pair.moved, area.page(10)).fill()
        entries = stat().rmap_items
        # A kernel without the finding may keep the old entry for a while. It has one more for the new place then.
        ksm.scan_until(
            lambda: merging_pages() == 1 or stat().rmap_items > entries,
            "ksmd to drop the parent's entry for the page that moved away",
        )
        assert merging_pages(child.pid) == unseen, "ksmd has come by the child already: there is nothing to see"
        places = [pair.places[0], *(Place(place.address, child) for place in pair.places)]
        assert_merged(places)
        assert_found_by(probe, places, "a merge, a fork, a move in the parent, and a visit of ksmd to the parent")


def _assert_shared_pages_found(probe: Probe, mine: Mapping, its: Mapping, child: Child, story: str) -> None:
    """Assert that a page that the child had merged is found wherever it is mapped, also in this process.

    :param mine: two pages of this process.
    :param its: the same pages as the child has them.
    """
    frame = pagemap.pfn(its.page(1), child.pid)
    places = [*places_of(mine), *(Place(address, child) for address in its.page_addresses)]
    shared = [each for each in places if pagemap.pfn(each.address, each.pid) == frame]
    assert len(shared) > 1, f"the child's second page is mapped nowhere else: {shared}"
    assert_found_by(probe, shared, story)


@pytest.mark.finding("ksm-shared-by-fork", match="does not find the page at")
@every_probe
def test_a_page_that_only_a_child_has_merged_is_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """No row: a process forks. Its child calls MADV_MERGEABLE, and KSM merges two pages that both share.

    KSM makes a KSM page of one of them where it is. What it keeps leads to the child alone.

    ::

        parent   | a | a |    not mergeable
        child    | a | a |    shared with the parent, mergeable

        parent   | a | A |    the second is a KSM page now, and still the parent's
        child    | A | A |

    Every kernel: the walk finds the page in both. This fails: finding ksm-shared-by-fork.
    """
    pages = area.map(0, 2).fill_same(SAME)
    with Child() as child:
        child.call(pages.madvise, syscalls.MADV_MERGEABLE)
        ksm.scan()
        _assert_shared_pages_found(probe, pages, pages, child, "a fork, and a merge in the child alone")


@pytest.mark.finding("ksm-shared-by-fork", match="does not find the page at")
def test_a_page_that_only_a_child_has_moved_and_merged_is_found(area: CarveOut, ksm: Ksm) -> None:
    """No row: the same, and the child moves its pages before they are merged, so that parent and child have them at
    different addresses.

    Every kernel: the walk finds the page in both. This fails: finding ksm-shared-by-fork.
    """
    pages = area.map(0, 2).fill_same(SAME)
    with Child() as child:
        moved = child.call(move, pages, area.page(10))
        child.call(moved.madvise, syscalls.MADV_MERGEABLE)
        ksm.scan()
        story = "a fork, a move in the child, and a merge in the child alone"
        _assert_shared_pages_found(usable(MovePages(), SoftOffline()), pages, moved, child, story)


@every_probe
def test_found_after_two_moves(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 122 (two-moves): a page moves, is merged, moves again and is merged again.

    ::

        first    | A | . | A | . . . | . |
                           `-----------.
        second   | A | . | . | . . . | A |

    Every kernel: each walk finds both places.
    """
    pair = hugh(area, ksm)
    pair = move_and_merge(pair, area.page(30), ksm)
    assert_found_by(probe, pair.places, "two moves, with a merge after each")
    if not destroys(probe):
        pair.check()


@every_probe
def test_private_pages_of_a_file_are_found(probe: Probe, area: CarveOut, ksm: Ksm) -> None:
    """Row 129 (private-file): two copied pages of a private file mapping are merged; one moves and is merged again.

    Their page offset is that of the file, before and after the move.

    ::

        page      0       10       20
        before  | A |   | A |              written copies of a private mapping of a file
        moved   | A |            | a |     a copy of its own
        later   | A |            | A |     merged again

    Every kernel: the move un-merges the page; after the next merge each walk finds both places.
    """
    fd = syscalls.memfd_create("private")
    try:
        os.ftruncate(fd, 8 * PAGE_SIZE)
        stayed = area.map_file(0, 1, fd, offset=5 * PAGE_SIZE).fill_same(SAME)
        source = area.map_file(10, 1, fd, offset=2 * PAGE_SIZE).fill_same(SAME)
    finally:
        os.close(fd)
    ksm.merge(stayed, source)
    moved = move(source, area.page(20))
    assert_unmerged(moved, [stayed])
    ksm.scan()
    places = places_of(stayed, moved)
    assert_merged(places)
    assert_found_by(probe, places, "a move of a private mapping of a file, and a merge")
    if not destroys(probe):
        stayed.check()
        moved.check()


@every_probe
def test_relocation_of_merged_pages(probe: Probe, area: CarveOut, ksm: Ksm, relocate: bool) -> None:
    """Row 133 (relocate-ksm): one of two merged pages moves with flag 16.

    ::

        before     | A | A | . |
                         `---.
        patched    | A | . | a |    and merged again later
        unpatched  | A | A | . |    EINVAL

    Unpatched: EINVAL; the pages are still merged, and each walk finds both places.
    Patched: the page is un-merged and relocated; after the next merge each walk finds both places.
    """
    pair = equal_pair(area)
    ksm.scan()
    frame = assert_merged(pair.places)
    flag = syscalls.MREMAP_MUST_RELOCATE_ANON
    if not relocate:
        with pytest.raises(OSError, match="EINVAL") as refused:
            move(pair.moved, area.page(2), flag)
        assert refused.value.errno == errno.EINVAL
        assert assert_merged(pair.places) == frame, "a refused move touched the pages"
        assert_found_by(probe, pair.places, "a refused relocation")
    else:
        pair = move_and_merge(pair, area.page(2), ksm, flag)
        assert_found_by(probe, pair.places, "a relocation and a merge at the new place")
    if not destroys(probe):
        pair.check()
