# SPDX-License-Identifier: GPL-2.0
"""KSM pages in swap and in the swap cache: whether each place still has its data, and whether a walk finds it.

Pictures as in :mod:`guest_tests.test_ksm_rmap`; ``s`` is a swap entry.
"""

from __future__ import annotations

import pytest

from guest_tests.mm import kpage, memcg, pagemap, swap, syscalls
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Probe
from guest_tests.mm.probes.migration import SoftOffline
from guest_tests.support.found import assert_found, assert_found_by, destroys, every_probe, places_of
from guest_tests.support.ksm_scenes import SAME, Pair, assert_merged, assert_unmerged, hugh, in_swap_cache
from guest_tests.support.moves import move_or_refused, refused_move, ways
from guest_tests.support.swapping import read_back, reclaim_group

# Reclaim needs memory that was charged to a group of its own.
pytestmark = pytest.mark.usefixtures("own_group")


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
