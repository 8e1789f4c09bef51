# SPDX-License-Identifier: GPL-2.0
"""Moves of memory that is registered with a userfaultfd: who is told of faults, and which marks stay.

Moved memory stays registered only if the owner asked for the event of a move. If not, the marks of write protection are
removed, because nobody could remove them later (mremap_userfaultfd_prep() in fs/userfaultfd.c, move_ptes() in
mm/mremap.c, and 0cef0bb836e3, Linux 6.13).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, swap, syscalls, system
from guest_tests.mm.ksm import Ksm, merged
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes.place import touch
from guest_tests.mm.syscalls import MADV_MERGEABLE, MREMAP_DONTUNMAP
from guest_tests.mm.userfault import (
    EVENT_PAGEFAULT,
    EVENT_REMAP,
    FEATURE_EVENT_REMAP,
    MODE_MISSING,
    MODE_WP,
    Event,
    Userfault,
)
from guest_tests.support.checks import expect_layout
from guest_tests.support.folios import huge_page, pmd_size, thp
from guest_tests.support.found import assert_found
from guest_tests.support.ksm_scenes import SAME
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest

#: seconds for an event that must come, on an ordinary machine
_SOON: Final = 5.0


@contextmanager
def _reading(address: int) -> Iterator[None]:
    """Read a byte in a thread, which waits until the fault is served. Leave the block when it can be."""
    buffer = ctypes.create_string_buffer(1)
    # memmove() runs without the interpreter's lock, so that others run while it waits for the fault.
    thread = threading.Thread(target=ctypes.memmove, args=(buffer, address, 1))
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _assert_told(uffd: Userfault, others: Sequence[Userfault], mapping: Mapping, what: str) -> None:
    """Assert that a fault in ``mapping`` is reported to one userfaultfd and to no other, and have it served."""
    with _reading(mapping.address):
        try:
            event = uffd.read(_SOON)
            told = [each.read(0) for each in others]
        finally:
            # Whose it is by now: EINVAL for the others, since 6.15.
            for each in (uffd, *others):
                with suppress(OSError):
                    each.unregister(mapping)
    assert event is not None, f"a read of {what} did not reach the owner of the userfaultfd; others: {told}"
    address = event.arguments[1] // PAGE_SIZE * PAGE_SIZE
    assert (event.event, address) == (EVENT_PAGEFAULT, mapping.address), (
        f"a read of {what} reached the owner as {event}"
    )
    assert not any(told), f"a read of {what} was reported to others too: {told}"


def _registered(mapping: Mapping) -> bool:
    """Whether faults of a mapping go to a userfaultfd, as smaps says."""
    return bool(maps.vma_at(mapping.address, detailed=True).vm_flags & {"um", "uw"})


# --- who is told -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [False, True], ids=["no-event", "event"])
def test_dontunmap(area: CarveOut, event: bool) -> None:
    """Row 62 (uffd): registered memory moves with DONTUNMAP, with and without an event for its owner.

    Every kernel: the owner is sent the event that it asked for, and the copy is registered only then. The source stays
    registered: a read of it waits for the owner.
    """
    system.require_config("USERFAULTFD")
    source = area.map(0, 8).fill()
    with Userfault(FEATURE_EVENT_REMAP if event else 0) as uffd:
        uffd.register(source, MODE_MISSING)
        events: list[Event | None] = []
        # A move that sends an event waits until the event is read.
        thread = threading.Thread(target=lambda: events.append(uffd.read(_SOON)))
        if event:
            thread.start()
        try:
            copy = move(source, area.page(20), MREMAP_DONTUNMAP)
        finally:
            if event:
                thread.join()
        copy.check()
        told = [Event(EVENT_REMAP, (source.address, copy.address, copy.length))] if event else []
        assert events == told, f"of a move with DONTUNMAP the owner was told {events}, expected {told}"
        there = _registered(copy)
        assert there == event, f"the copy is {'' if there else 'not '}registered, though the event was {event}"
        assert _registered(source), "the source, which DONTUNMAP left mapped, is not registered any more"
        _assert_told(uffd, [], source, "what DONTUNMAP left behind")
    assert_found(copy, source.check().fill(seed=1))


def test_two_owners(area: CarveOut) -> None:
    """No row: the halves of a mapping are registered with a userfaultfd each.

    Every kernel: they are two mappings, and a fault is reported to the owner of its half.
    """
    system.require_config("USERFAULTFD")
    whole = area.map(0, 10)
    halves = [whole.part(0, 5), whole.part(5, 5)]
    with ExitStack() as stack:
        owners = [stack.enter_context(Userfault()) for _ in halves]
        for owner, half in zip(owners, halves, strict=True):
            owner.register(half, MODE_MISSING)
        expect_layout(area, [(0, 5), (5, 5)], "two halves with an owner each")
        for number, (owner, half) in enumerate(zip(owners, halves, strict=True)):
            others = [each for each in owners if each is not owner]
            _assert_told(owner, others, half, f"half {number}")
    expect_layout(area, [(0, 10)], "two halves without owners")
    assert_found(whole.check().fill())


# --- marks that nobody could remove ------------------------------------------------------------------------------


@contextmanager
def _write_protected(mapping: Mapping, *parts: Mapping) -> Iterator[None]:
    """Register ``mapping`` without the event of a move, and write-protect some pages."""
    system.require_config("USERFAULTFD", "HAVE_ARCH_USERFAULTFD_WP")
    with Userfault() as uffd:
        uffd.register(mapping, MODE_WP)
        for part in parts:
            uffd.write_protect(part)
        yield


def _require_removed_marks() -> None:
    system.require_kernel(6, 13, "a move removes marks that could not be removed later")


def _marked(mapping: Mapping) -> list[int]:
    """The numbers of the pages that a userfaultfd write-protects, as pagemap shows them."""
    entries = pagemap.entries(mapping.address, mapping.pages)
    return [index for index, entry in enumerate(entries) if entry.uffd_wp]


def _assert_unmarked(mapping: Mapping, what: str) -> None:
    assert not _registered(mapping), f"{what} is still registered"
    marked = _marked(mapping)
    assert not marked, f"pages {marked[:8]} of {what} are still write-protected by a userfaultfd that it left"


@pytest.mark.finding("ksm-uffd-unprotected", match="are not write-protected any more")
def test_ksm_keeps_write_protection(area: CarveOut, ksm: Ksm) -> None:
    """No row: two equal pages are mergeable and write-protected (5.7), and so are two others without the protection.
    ksmd scans.

    Every kernel: it merges the others. The two are still protected, whether merged or not. So the owner is told of the
    next write to them.
    """
    protected, control = area.map(0, 2), area.map(10, 2)
    protected.fill_same(SAME).madvise(MADV_MERGEABLE)
    control.fill_same(SAME + 1).madvise(MADV_MERGEABLE)
    with _write_protected(protected, protected):
        assert _marked(protected) == [0, 1], f"of two pages {_marked(protected)} are write-protected"
        ksm.scan()
        assert all(merged(control.address, control.pages)), "ksmd has not merged equal pages without protection"
        lost = [index for index in range(protected.pages) if index not in _marked(protected)]
        state = merged(protected.address, protected.pages)
        assert not lost, f"pages {lost} are not write-protected any more after a scan; KSM has merged them: {state}"
    protected.check()
    assert_found(protected.fill(seed=2), pageout=False)


def test_a_huge_page_leaves_a_userfaultfd() -> None:
    """Row 87 (soft-dirty-and-uffd-wp): a write-protected huge page moves to an aligned place, without the event (6.13).

    Every kernel: it is still a huge page, is not write-protected any more, and can be written.
    """
    _require_removed_marks()
    size = pmd_size()
    pages = size // PAGE_SIZE
    with thp(), carve_out(4 * pages) as area:
        area.hole(0, 4 * pages)
        source = huge_page(area.map(0, pages), area.page(0))
        source.write(0, b"data")
        with _write_protected(source, source):
            assert len(_marked(source)) == pages, "not all of the huge page is write-protected"
            moved = move(source, area.page(2 * pages)).check()
            huge = maps.vma_at(moved.address, detailed=True).size("AnonHugePages")
            assert huge == size >> 10, f"of a huge page {huge} kB are mapped as one after the move"
            _assert_unmarked(moved, "a huge page that moved")
        moved.write(1, b"more")
        assert_found(moved.check())


@pytest.mark.finding("uffd-merged-neighbour", match="memory left its userfaultfd because other memory moved beside it")
def test_a_neighbour_stays_with_its_userfaultfd(area: CarveOut) -> None:
    """No row: untouched memory that is registered with a userfaultfd, without the event, moves beside other memory of
    the same userfaultfd (6.1).

    ::

        before   |nnnn|    |    |ssss|     both registered
        after    |nnnn|ssss|               n is registered, s has left

    Every kernel: the neighbour is still registered. Some kernels have the finding uffd-merged-neighbour.
    """
    neighbour, source = area.map(0, 4), area.map(20, 4)
    with Userfault() as uffd:
        for mapping in (neighbour, source):
            uffd.register(mapping, MODE_MISSING)
        moved = move(source, area.page(4))
        assert not _registered(moved), "memory is still registered after a move without the event"
        assert _registered(neighbour), "memory left its userfaultfd because other memory moved beside it"
    assert_found(neighbour.fill(), moved.fill(seed=1))


def test_swapped_out_memory_leaves_a_userfaultfd(area: CarveOut) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): write-protected memory moves while it is swapped out, without the event (6.13).

    Every kernel: no page is write-protected any more, neither in swap nor when it was read back.
    """
    _require_removed_marks()
    swap.require_swap(1024)
    source = area.map(0, 8).fill()
    with _write_protected(source, source.part(2, 3)):
        assert_pages_out(source)
        assert _marked(source) == [2, 3, 4], f"of the pages in swap {_marked(source)} are write-protected"
        moved = move(source, area.page(20))
        _assert_unmarked(moved, "swapped-out memory that moved")
        moved.check()
        _assert_unmarked(moved, "memory that moved in swap and was read back")
    assert_found(moved.fill(seed=1))


def test_whole_page_tables_leave_a_userfaultfd() -> None:
    """Row 87 (soft-dirty-and-uffd-wp): write-protected small pages move whose range covers whole page tables, without
    the event (6.13).

    ::

        page table    0        1        2        3        4
                      |s......s|s......s|        |--> here         the first and the last page of each

    Page tables are moved by themselves where the range covers them (move_normal_pmd(), mm/mremap.c), but not here: the
    marks are in them.

    Every kernel: no page is write-protected any more, and all are found.
    """
    _require_removed_marks()
    table = PAGE_SIZE // 8
    if table * PAGE_SIZE > 32 << 20:
        pytest.skip(f"needs page tables that map 32 MB at most, these map {table * PAGE_SIZE >> 20} MB")
    used = [0, table - 1, table, 2 * table - 1]
    with thp("madvise"), carve_out(6 * table) as area:
        area.hole(0, 6 * table)
        source = area.map(0, 2 * table)
        for index in used:
            source.write(index, index.to_bytes(8, "little") + b"data")
        with _write_protected(source, source):
            assert set(used) <= set(_marked(source)), f"write-protected are {_marked(source)[:8]}"
            moved = move(source, area.page(3 * table))
            _assert_unmarked(moved, "memory of whole page tables that moved")
        for index in used:
            moved.part(index).check()
            moved.write(index, b"more")
            assert_found(moved.part(index))


def test_guard_pages_outlive_a_userfaultfd(area: CarveOut) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): registered memory with write-protected pages, guard pages, and a page that is
    write-protected and was never touched moves without the event (6.13).

    ::

        page   0       2       4       6     8
               |sssssss|guard  |wwwwwww|www0w|

    What marks a page that is not there is a marker in the page table, for guards and for write protection alike
    (pte_is_uffd_wp_marker(), include/linux/userfaultfd_k.h).

    Every kernel: the write protection is gone, and the guard pages still cannot be read.
    """
    _require_removed_marks()
    source = area.map(0, 8)
    for index in (0, 1, 4, 5):
        source.part(index).fill(first_number=index)
        source.contents[index] = source.part(index).contents[0]
    guards = source.part(2, 2)
    with _write_protected(source, source.part(4, 4)):
        guards.madvise(syscalls.MADV_GUARD_INSTALL)
        moved = move(source, area.page(20))
        readable = [touch(address) for address in moved.page_addresses]
        assert readable == [True] * 2 + [False] * 2 + [True] * 4, f"of the moved pages these can be read: {readable}"
        _assert_unmarked(moved, "memory with guard pages that moved")
    assert_found(moved.part(0, 2).fill(), moved.part(4, 4).fill(seed=1))
