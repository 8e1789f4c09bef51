# SPDX-License-Identifier: GPL-2.0
"""What a move keeps of page-table entries, and what it leaves at the old place.

The bits of an entry say whether its page was accessed and written. A move carries them over, and marks the page as
soft-dirty. No processor may use an old address any more, also not through a translation that it has cached.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from guest_tests.mm import pagemap, swap, syscalls, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, Mapping, carve_out, move
from guest_tests.mm.probes.ageing import IdleBitmap, drain
from guest_tests.mm.probes.place import Page, Place, observe, touch
from guest_tests.support.folios import huge_page, pmd_size, stamp, thp
from guest_tests.support.found import assert_found, usable
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest

#: Ways to move entries: one by one, with their page table, and of a huge page.
_WAYS = ("entries", "table", "huge")


@contextmanager
def _memory(way: str) -> Iterator[tuple[Mapping, int]]:
    """Faulted memory that moves in one way, and where it can move to."""
    if way == "entries":
        with carve_out(40) as area:
            yield area.map(0, 8).fill(), area.page(20)
        return
    pages = pmd_size() // PAGE_SIZE
    with thp("always" if way == "huge" else "madvise"), carve_out(4 * pages) as area:
        area.hole(0, 4 * pages)
        source = area.map(0, pages)
        yield stamp(huge_page(source, source.address) if way == "huge" else source), area.page(2 * pages)


# --- dirty and accessed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", _WAYS)
def test_a_page_that_was_written_again_is_kept(way: str) -> None:
    """Row 85 (lazyfree): memory that the kernel may drop (MADV_FREE) is written again, moves, and is reclaimed.

    Every kernel: all data is there, because the entries say that the pages were written.
    """
    swap.require_swap()
    with _memory(way) as (source, to):
        source.madvise(syscalls.MADV_FREE)
        stamp(source, seed=1)
        moved = move(source, to)
        assert_pages_out(moved)
        assert_found(moved.check())


@pytest.mark.parametrize("way", _WAYS)
def test_an_access_before_a_move_counts_after_it(way: str) -> None:
    """Row 116 (rmap-idle): a page is marked idle, accessed, and moves.

    Every kernel: idle page tracking does not report it as idle.
    """
    probe = usable(IdleBitmap())
    assert isinstance(probe, IdleBitmap)
    with _memory(way) as (source, to):
        drain()
        places = (Place(source.address),)
        page = Page(pagemap.pfn(source.address), places, observe(places))
        probe.force(page)
        assert probe.idle(page), "a page that nobody uses does not stay idle"
        assert touch(source.address)
        moved = move(source, to)
        assert not probe.idle(page), "a page that was accessed and then moved is still idle"
        assert_found(moved.check())


# --- soft-dirty --------------------------------------------------------------------------------------------------


_SWAPPED = pytest.mark.parametrize("swapped", [False, True], ids=["present", "swapped"])


@_SWAPPED
def test_a_move_marks_memory_as_changed(swapped: bool) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): memory is present or in swap, its soft-dirty marks are cleared, and it moves.

    Every kernel: each page is marked at its new place, so that a program that looks for changes does not miss it.
    """
    _assert_marked("entries", swapped)


def test_a_move_marks_a_huge_page_as_changed() -> None:
    """Row 87 (soft-dirty-and-uffd-wp): the soft-dirty mark of a huge page is cleared, and it moves.

    Every kernel: it is marked at its new place.
    """
    _assert_marked("huge", swapped=False)


@pytest.mark.finding("move-table-not-soft-dirty", match="are not marked soft-dirty")
@_SWAPPED
def test_a_page_table_that_moves_is_marked_as_changed(swapped: bool) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): memory that fills a page table is present or in swap, its soft-dirty marks are
    cleared, and it moves to a place that is aligned as well.

    Every kernel: each page is marked at its new place. This fails: finding move-table-not-soft-dirty.
    """
    _assert_marked("table", swapped)


def _assert_marked(way: str, swapped: bool) -> None:
    with _memory(way) as (source, to):
        if swapped:
            swap.require_swap(source.length >> 10)
            assert_pages_out(source)
        pagemap.clear_soft_dirty(source.address, source.pages)
        moved = move(source, to)
        marks = pagemap.soft_dirty(moved.address, moved.pages)
        assert_found(moved.check())
        assert all(marks), f"{marks.count(False)} of {moved.pages} pages are not marked soft-dirty after a move"


# --- the old place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", _WAYS)
def test_an_old_address_leads_nowhere(way: str) -> None:
    """No row: all pages are read and written, move with MREMAP_DONTUNMAP, and are accessed at the old place at once.

    Every kernel: the old place reads as zeros, and what is written there does not appear at the new one.
    """
    with _memory(way) as (source, to):
        stamp(source, seed=1)
        moved = move(source, to, syscalls.MREMAP_DONTUNMAP)
        first = ctypes.string_at(source.address, 8)
        ctypes.memset(source.page(source.pages - 1), 0xFF, 8)
        assert first == bytes(8), f"the old address of a moved page reads as {first.hex()}"
        source.part(0, source.pages - 1).check()
        assert_found(moved.check())


def test_page_tables_move_as_a_whole() -> None:
    """No row: memory that fills four page tables moves with MREMAP_DONTUNMAP to a place that has none.

    Every kernel: the tables move with it, so that VmPTE is as before. Both places would have tables if each entry moved
    by itself, and the move would cost as much per page as any other.
    """
    pages = 4 * pmd_size() // PAGE_SIZE
    with thp("madvise"), carve_out(3 * pages) as area:
        area.hole(0, 3 * pages)
        start = pmd_size() // PAGE_SIZE
        source, to = stamp(area.map(start, pages)), area.page(start + pages)
        before = vmstat.status()["VmPTE"]
        moved = move(source, to, syscalls.MREMAP_DONTUNMAP)
        more = vmstat.status()["VmPTE"] - before
        assert more < 4 * PAGE_SIZE >> 10, f"a move of four page tables took {more} kB for tables"
        assert_found(moved.part(0, 8).check(), moved.part(pages - 8, 8).check())


@pytest.mark.parametrize("front", ["head", "neighbour"])
def test_what_is_in_front_of_moved_memory_stays(front: str) -> None:
    """No row: memory moves to a place with the same offset in a page table, and reaches into the next table. mremap()
    could move whole page tables then (try_realign_addr(), mm/mremap.c, 6.7), if nothing were in front. In front is the
    head of the same mapping, or another mapping.

    ::

        page table    0               1               2               3
        before              |hhhhssss ssssssss|
        after               |hhhh                     |    |ssss ssssssss|

    Every kernel: what is in front is as before.
    """
    table = pmd_size() // PAGE_SIZE
    with thp("madvise"), carve_out(6 * table) as area:
        area.hole(2 * table, 4 * table)
        whole = stamp(area.map(table - 8, table + 8))
        head, tail = whole.part(0, 4), whole.part(4, table + 4)
        if front == "neighbour":
            head.mprotect(syscalls.PROT_READ)
        moved = move(tail, area.page(3 * table - 4))
        assert_found(head.check(), moved.check())
