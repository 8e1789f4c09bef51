# SPDX-License-Identifier: GPL-2.0
"""What a relocation must leave behind, keep and wait for: rows 71, 72, 93, 97 and 133.

Each test is about one promise in which a relocation differs from a plain move: a refusal half way leaves nothing at the
destination and nothing in the accounting, the copied mapping keeps its advice, a page of KSM is refused while only the
swap cache has it, and a page that somebody else has locked is waited for.
"""

from __future__ import annotations

import errno
import time
from functools import partial
from typing import Final

import pytest

from guest_tests.mm import kpage, maps, numa, pagemap, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes import offline
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_DONTUNMAP, MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.mm.waiting import patience, wait_until
from guest_tests.support.checks import State, counted, expect_layout, fails
from guest_tests.support.failing import failing_relocation
from guest_tests.support.folios import large_folio, mthp_size
from guest_tests.support.found import assert_found, require_migration
from guest_tests.support.ksm_scenes import in_swap_cache
from guest_tests.support.moves import move_or_refused, refused_move, unknown_flags, ways
from guest_tests.support.stalled import stalled_swaps
from guest_tests.support.swapping import assert_pages_out, read_back
from harness.agent.processes import state_of

# --- refused half way --------------------------------------------------------------------------------------------

#: pages of a range that is to move
_PAGES: Final = 12
#: further flags of a relocation, and the new length in pages
_CALLS: Final = {
    "keeping-the-source": (MREMAP_DONTUNMAP, _PAGES),
    "growing": (0, _PAGES + 6),
    "both-flags": (MREMAP_RELOCATE_ANON, _PAGES),
}


@pytest.mark.shared_guest
@pytest.mark.parametrize("number", [1, 7], ids=["first", "middle"])
@pytest.mark.parametrize("kind", _CALLS)
def test_a_refusal_half_way_leaves_nothing(relocate: bool, area: CarveOut, kind: str, number: int) -> None:
    """Rows 93 (undo-must) and 97 (fail-accounting): a range is to move with flag 16, and the relocation of a chosen
    page is made to fail. The source is to stay (DONTUNMAP), or the range is to grow, or flag 8 is given, too.

    ::

        page     0           12      20          32    38
                 |ssssssXssss|       |           .     |     nothing is left here, and nothing is charged for it

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, nothing changes, nothing stays mapped at the destination, and Committed_AS is as before; the same
    move succeeds afterwards, and every page is found.
    """
    further, pages = _CALLS[kind]
    flags = MREMAP_MUST_RELOCATE_ANON | further
    source, to = area.map(0, _PAGES).fill(), area.page(20)
    area.hole(20, 20)
    if not relocate:
        refused_move(relocate, area, source, to, flags, pages=pages)
        assert_found(source)
        return
    with failing_relocation() as arm, counted(relocate, relocated=0, refused_injected=1):
        refused_move(relocate, area, source, to, flags, pages=pages, arm=partial(arm, number))
    assert_found(source)
    assert_found(move(source, to, flags, pages=pages).check())


@pytest.mark.shared_guest
def test_a_refusal_before_anything_has_moved(relocate: bool, area: CarveOut) -> None:
    """Row 93 (undo-must): a range of which one page was touched is to move with flag 16, and the relocation of this
    page is made to fail.

    ::

        page     0           12
                 |.....X......|      nothing is mapped at the dots

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes; no undo is counted, because nothing had been moved.
    """
    touched = area.map(0, _PAGES).touch([5]).part(5)
    source = Mapping(area.page(0), _PAGES)  # what it holds is not known, because a read would map the zero page
    area.hole(20, 20)
    if not relocate:
        refused_move(relocate, area, source, area.page(20))
        assert_found(touched)
        return
    with failing_relocation() as arm, counted(relocate, relocated=0, undone=0, refused_injected=1):
        refused_move(relocate, area, source, area.page(20), arm=partial(arm, 1))
    assert_found(touched)


# --- what the new mapping keeps ----------------------------------------------------------------------------------

#: advice, its letters in VmFlags, and the option without which it is refused
_ADVICE: Final = {
    "hugepage": (syscalls.MADV_HUGEPAGE, "hg", ("TRANSPARENT_HUGEPAGE",)),
    "nohugepage": (syscalls.MADV_NOHUGEPAGE, "nh", ("TRANSPARENT_HUGEPAGE",)),
    "mergeable": (syscalls.MADV_MERGEABLE, "mg", ("KSM",)),
    "dontfork": (syscalls.MADV_DONTFORK, "dc", ()),
    "wipeonfork": (syscalls.MADV_WIPEONFORK, "wf", ()),
}


@ways
@pytest.mark.shared_guest
@pytest.mark.parametrize("advice", _ADVICE)
def test_advice_is_kept(relocate: bool, area: CarveOut, flags: int, advice: str) -> None:
    """Row 25 (after-unfaulted): faulted memory moves to the place right behind unfaulted memory, and both were given
    the same advice by madvise().

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|          two; relocated: one

    Unpatched: after a plain move the advice still holds.
    Patched: it holds after a relocation, too, so that the memory merges with its neighbour.
    """
    number, letters, needed = _ADVICE[advice]
    system.require_config(*needed)
    area.map(15, 5).madvise(number)
    source = area.map(0, 5).madvise(number).fill()
    result = move_or_refused(relocate, area, source, area.page(20), flags)
    if result is not None:
        vma = maps.vma_at(result.address, detailed=True)
        assert letters in vma.vm_flags, f"the move lost the advice: {letters} is not in {sorted(vma.vm_flags)} of {vma}"
        expect_layout(area, [(15, 10)] if flags else [(15, 5), (20, 5)], "neighbours of equal advice")
    assert_found(source if result is None else result)


# --- in the swap cache -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_group")
def test_a_merged_page_in_the_swap_cache_is_refused(relocate: bool, area: CarveOut, ksm: Ksm) -> None:
    """Rows 71 (swapcache) and 133 (relocate-ksm): one of the two places of a merged page is to move with flag 16 while
    the page is swapped out but still in the swap cache. The destination is in use.

    A move un-merges pages that are present only. The page would be read back at the new place as it is, and KSM would
    know it at the old one only.

    ::

        page       0   1       10
        merged   | A | A |    | d |
        swapped  | s | s |    | d |    A stays in the swap cache
        refused  | s | s |    | d |

    Unpatched: EINVAL; source and destination are as before.
    Patched: EFAULT; source and destination are as before. Both places are read back, and the page is found there.
    """
    there = area.map(10, 1).fill(seed=3)
    with in_swap_cache(area, ksm) as pair:
        before = State.of(area)
        what = "a relocation of a merged page in the swap cache"
        with counted(relocate, relocated=0, refused_swap=1, undone=0):
            code = errno.EFAULT if relocate else errno.EINVAL
            fails(code, lambda: move(pair.moved, there.address, MREMAP_MUST_RELOCATE_ANON), what)
        before.expect(area, what)
        read_back(pair.moved, pair.stayed)
    there.check()
    assert_found(pair.stayed, pair.moved, pageout=False)


@ways
@pytest.mark.shared_guest
def test_a_large_folio_in_the_swap_cache(relocate: bool, flags: int) -> None:
    """Row 71 (swapcache): a large folio moves that is swapped out and still in the swap cache, because it is not
    written yet.

    Unpatched: after a plain move the data is right, and every page is found.
    Patched: the same with either flag; each page of the folio is counted as relocated.
    """
    pages = mthp_size() // PAGE_SIZE
    with carve_out(8 * pages) as area, stalled_swaps(1024) as (write,):
        source = large_folio(area.map(pages, pages))
        frames = pagemap.pfns(source.address, pages)
        assert_pages_out(source)
        state = [kpage.flags(pfn) for pfn in frames if pfn is not None]
        assert all(kpage.Flag.SWAPCACHE in of_page for of_page in state), f"not in the swap cache: {state}"
        if not all(of_page & kpage.LARGE for of_page in state):
            pytest.skip("this kernel splits a large folio when it swaps it out")
        if flags and not relocate:
            unknown_flags(source, area.page(4 * pages), flags)
            result = source
        else:
            with counted(relocate, relocated_pages=pages if flags else 0):
                result = move(source, area.page(4 * pages), flags)
        result.check()
        write()
        assert_found(result, pageout=False)


# --- locked by somebody else -------------------------------------------------------------------------------------


def test_a_locked_page_is_waited_for(relocate: bool, area: CarveOut) -> None:
    """Row 72 (migration-race): two pages move with flag 16. Somebody locks the second before the move, and somebody
    else locks the first when the move has looked at it and waits for the second.

    Both pages are under writeback, and whoever migrates or offlines them waits for its end with the page locked.

    ::

        page 0      under writeback ............. locked by soft offline ........... written, offlined
        page 1      under writeback, locked by migration .......... written, migrated
        the move                                 waits for page 1   waits for page 0   done

    Unpatched: EINVAL, and nothing changes.
    Patched: the move waits for the first page, too, so that both are found at the new place.
    """
    if not relocate:
        refused_move(relocate, area, source := area.map(0, 2).fill(), area.page(20))
        assert_found(source)
        return
    require_migration()
    if (reason := offline.missing("soft") or offline.over_budget()) is not None:
        pytest.skip(reason)
    with (
        Child() as mover,
        Child() as migrater,
        Child() as offliner,
        # The first device is full with the first page, so that the second page goes to the second one.
        stalled_swaps(1, 64) as (first_is_written, second_is_written),
    ):
        source = mover.call(_under_writeback, area)
        first, second = (pagemap.pfn(address, mover.pid) for address in source.page_addresses)
        (here,) = numa.nodes_of([source.page(1)], mover.pid)
        there = next(node for node in numa.nodes() if node != here)
        migrater.start(numa.move_pages, mover.pid, [source.page(1)], [there], numa.MPOL_MF_MOVE_ALL)
        wait_until(lambda: kpage.Flag.LOCKED in kpage.flags(second), "migration to lock the second page")
        mover.start(move, source, area.page(20), MREMAP_MUST_RELOCATE_ANON)
        wait_until(lambda: state_of(mover.pid) == "D", "the move to wait for the second page")
        offliner.start(offline.offline, "soft", first)
        wait_until(lambda: kpage.Flag.LOCKED in kpage.flags(first), "soft offline to lock the first page")
        second_is_written()
        migrater.result()
        time.sleep(patience(0.02))  # a move that does not wait for the first page is over then
        first_is_written()
        offliner.result()
        moved = mover.result()
        mover.call(assert_found, moved)
        offline.restore(first)


def _under_writeback(area: CarveOut) -> Mapping:
    """Two pages that are being written to two swap devices, and are mapped again meanwhile."""
    source = area.map(0, 2).fill()
    for page in (source.part(0), source.part(1)):
        assert_pages_out(page)
        page.check()
    state = [kpage.flags_at(address) for address in source.page_addresses]
    assert all(kpage.Flag.WRITEBACK in flags for flags in state), f"not under writeback: {state}"
    return source
