# SPDX-License-Identifier: GPL-2.0
"""Small folios in every state, moved with and without relocation: rows 65 to 73, 85 to 87 and 91.

A moved page shows the right data even if its folio has the wrong index or anon_vma. So each test makes the kernel look
for the pages afterwards: it migrates them, swaps them out, or takes their frames out of use. What holds for a plain
move on any kernel holds for relocated memory too, so most tests expect the same for all three ways to ask.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest

from guest_tests.mm import kpage, numa, pagemap, swap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, ZERO, CarveOut, Mapping, move
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.ageing import drain
from guest_tests.mm.probes.migration import SoftOffline
from guest_tests.mm.proctree import Child, ChildDied
from guest_tests.mm.syscalls import MADV_PAGEOUT, MREMAP_MUST_RELOCATE_ANON
from guest_tests.mm.userfault import FEATURE_EVENT_REMAP, MODE_WP, Userfault
from guest_tests.support.checks import counted, expect_layout, same_accounts
from guest_tests.support.found import assert_found, places_of, require_migration, usable
from guest_tests.support.holds import Spliced, pinned
from guest_tests.support.moves import move_or_refused, must_or_refused, refused_move, unknown_flags, ways
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest

#: page of the carve-out that memory moves to
_TO = 20


@pytest.fixture
def source(area: CarveOut) -> Mapping:
    """Eight faulted pages at the beginning of the carve-out."""
    return area.map(0, 8).fill()


# --- each reason to walk the reverse map -------------------------------------------------------------------------


@ways
def test_pageout(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 65 (pageout): memory moves and is swapped out afterwards.

    Unpatched: after a plain move every page goes to swap and comes back with its data.
    Patched: the same after a relocation.
    """
    swap.require_swap(source.length >> 10)
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is not None:
        assert_pages_out(result)
        assert_found(result.check())


@ways
def test_migration(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 66 (migrate): memory moves and is migrated to the other node and back.

    Unpatched: after a plain move every page changes its node and its frame, and keeps its data.
    Patched: the same after a relocation.
    """
    require_migration()
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is None:
        return
    for node in (*numa.nodes()[:2], numa.nodes()[0]):
        before = pagemap.pfns(result.address, result.pages)
        here = numa.nodes_of(result.page_addresses)
        numa.move_pages(0, result.page_addresses, [node] * result.pages, numa.MPOL_MF_MOVE_ALL)
        assert numa.nodes_of(result.page_addresses) == [node] * result.pages, f"not all pages went to node {node}"
        after = pagemap.pfns(result.address, result.pages)
        same = [i for i in range(result.pages) if here[i] != node and before[i] == after[i]]
        assert not same, f"pages {same} changed their node without changing their frame"
        result.check()


@ways
def test_soft_offline(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 67 (soft-offline): memory moves, and each page is soft-offlined.

    Unpatched: after a plain move every page gets another frame and keeps its data.
    Patched: the same after a relocation.
    """
    probe = usable(SoftOffline())
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is not None:
        for place in places_of(result):
            answer = probe.walk([place])
            assert answer.complete, f"soft offline does not find the page at {place}: {answer}"
        result.check()


# --- what is in the page table -----------------------------------------------------------------------------------


@ways
def test_zero_pages(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 68 (zero-page): memory moves of which one page was written and the others were only read.

    The zero page belongs to no mapping, so there is nothing to relocate. Pages that are written later are found.

    Unpatched: after a plain move the zero page is mapped where it was before.
    Patched: the same after a relocation.
    """
    source = area.map(0, 8).touch_read()
    source.write(3, b"the only page")
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is not None:
        zero = [kpage.Flag.ZERO_PAGE in kpage.flags_at(address) for address in result.page_addresses]
        assert zero == [True] * 3 + [False] + [True] * 4, f"the zero page is mapped, page by page: {zero}"
        assert_found(result.fill(seed=1))


@ways
def test_mixed_with_holes(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 69 (mixed-holes): memory moves of which every third page was touched.

    ::

        page   0  1  2  3  4  5  6  7  8  9  10 11
               |f  .  .  f  .  .  f  .  .  f  .  .|

    Unpatched: after a plain move every page is found, also those that are written later.
    Patched: the same after a relocation.
    """
    source = area.map(0, 12)
    for index in range(0, 12, 3):
        source.write(index, b"page %d" % index)
    before = pagemap.pfns(source.address, 12)
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is not None:
        # Before the data is compared, because reading maps the zero page into the holes.
        assert_found(*(result.part(index) for index in range(0, 12, 3)))
        assert [pfn is None for pfn in before] == [index % 3 > 0 for index in range(12)]
        assert_found(result.fill(seed=1))


@ways
def test_swapped_out(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 70 (swapped): memory moves while it is swapped out.

    Unpatched: a plain move keeps the swap entries; every page is found after it was read back.
    Patched: the same with either flag.
    """
    swap.require_swap(source.length >> 10)
    assert_pages_out(source)
    offsets = [entry.swap_offset for entry in pagemap.entries(source.address, source.pages)]
    if flags and not relocate:
        unknown_flags(source, area.page(_TO), flags, area)
        return
    result = move(source, area.page(_TO), flags)
    there = [entry.swap_offset for entry in pagemap.entries(result.address, result.pages)]
    assert there == offsets, f"the swap entries {offsets} became {there}"
    assert_found(result.check())


@ways
def test_in_swap_cache(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 71 (swapcache): memory moves while it is swapped out, but its folios are still in the swap cache.

    The page table has swap entries, but the folios still name the old place, and the next fault maps them at the new
    one. If the move does not rewrite them, the fault has to copy them; ``ksm_swpin_copy`` counts these copies. A kernel
    without CONFIG_KSM never copies. References from a pipe keep the folios in the swap cache, because a folio is freed
    as soon as it is written otherwise.

    Unpatched: after a plain move the data is right, and a page with another frame was counted as a copy.
    Patched: with either flag the data is right, no page was copied, and all were counted as relocated.
    """
    swap.require_swap(source.length >> 10)
    before = pagemap.pfns(source.address, source.pages)
    with Spliced(source.address, source.length):
        drain()
        source.madvise(MADV_PAGEOUT)
        swapped = [entry.swap for entry in pagemap.entries(source.address, source.pages)]
        cached = [pfn is not None and kpage.Flag.SWAPCACHE in kpage.flags(pfn) for pfn in before]
        assert all(swapped), f"of the pages in a pipe these were unmapped: {swapped}"
        assert all(cached), f"of the pages in a pipe these are in swap cache: {cached}"
        if flags and not relocate:
            unknown_flags(source, area.page(_TO), flags)
            source.check()
            return
        events = vmstat.vmstat()
        with counted(relocate, relocated_pages=source.pages if flags else 0):
            result = move(source, area.page(_TO), flags)
        result.check()
        copies = vmstat.delta(events, "ksm_swpin_copy") if "ksm_swpin_copy" in events else 0
        moved_frames = sum(old != new for old, new in zip(before, pagemap.pfns(result.address, 8), strict=True))
        assert moved_frames <= copies, f"{moved_frames} pages came back elsewhere, but ksm_swpin_copy rose by {copies}"
        assert not (flags and moved_frames), f"{moved_frames} of {result.pages} relocated pages were copied when read"
    assert_found(result.touch())


@ways
def test_in_swap_cache_for_somebody_else(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 71 (swapcache): memory moves whose folios a child has read into the swap cache for its own mapping; the child
    has ended.

    Unpatched: after a plain move the data is right, and every page is found.
    Patched: the same with either flag.
    """
    swap.require_swap(source.length >> 10)
    assert_pages_out(source)
    with Child() as child:
        child.call(source.check)
        frames = pagemap.pfns(source.address, source.pages, child.pid)
    cached = [pfn is not None and kpage.Flag.SWAPCACHE in kpage.flags(pfn) for pfn in frames]
    assert all(cached), f"of what the child read in, these pages are still in swap cache: {cached}"
    if flags and not relocate:
        unknown_flags(source, area.page(_TO), flags)
        assert_found(source.check())
        return
    assert_found(move(source, area.page(_TO), flags).check())


@ways
def test_pinned(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 73 (pinned-4k): memory moves while one of its pages is pinned.

    To skip the page and return success would leave a page that the kernel does not find. So each page is probed after
    the pin is gone.

    Unpatched: a plain move; every page is found.
    Patched: flag 8 succeeds, flag 16 relocates everything or is refused without a trace; every page is found.
    """
    with pinned(source.page(3)):
        if flags == MREMAP_MUST_RELOCATE_ANON:
            with counted(relocate, refused_pinned=1, undone=0):
                result = must_or_refused(relocate, area, source, area.page(_TO))
        else:
            result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    assert_found(source if result is None else result)


@ways
def test_referenced(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 73 (pinned-4k): memory moves while a pipe holds a reference to one of its pages, without a pin.

    Unpatched: a plain move; the pipe still holds the page's data, and every page is found.
    Patched: the same with either flag.
    """
    with Spliced(source.page(3)) as pipe:
        result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        assert pipe.read(PAGE_SIZE) == source.contents[3].data if source.contents[3] else False, (
            "the pipe holds another page"
        )
    assert_found(source if result is None else result)


@ways
def test_lazily_freed(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 85 (lazyfree): memory that the kernel may drop (MADV_FREE) moves and is reclaimed.

    Unpatched: after a plain move each page holds its data or zeros, and one that was written again holds its data.
    Patched: the same with either flag.
    """
    source.madvise(syscalls.MADV_FREE)
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    here = source if result is None else result
    contents, here.contents = here.contents, [None] * here.pages
    here.write(0, b"not to be dropped any more")
    here.madvise(MADV_PAGEOUT)
    here.part(0).check()
    for index in range(1, here.pages):
        expected = contents[index]
        assert expected is not None
        data = here.read(index)
        assert data in (expected.data, ZERO.data), f"page {index} holds neither its data nor zeros"
    assert_found(here.fill(seed=1))


@ways
def test_poisoned(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 86 (hwpoison-entry): a child moves memory of which one page was poisoned.

    Unpatched: a plain move keeps the poison entry; a touch at the new place is killed by SIGBUS; the other pages are
    found.
    Patched: the same with either flag.
    """
    reason = offline.missing("hard") or offline.over_budget()
    if reason is not None:
        pytest.skip(reason)
    with Child() as child:
        source = child.call(_mapped, area)
        pfn = pagemap.pfn(source.page(3), child.pid)
        try:
            remark = offline.offline("hard", pfn)
            assert offline.poisoned(pfn), f"frame {pfn:#x} was not poisoned: {remark}"
            source.contents[3] = None
            address = child.call(_move_poisoned, relocate, area, source, flags, pfn)
            if address is not None:
                with pytest.raises(ChildDied) as died:
                    child.call(ctypes.string_at, address, 1)
                assert died.value.signal == signal.SIGBUS, f"a touch of a poisoned page: {died.value}"
        finally:
            child.close()
            offline.restore(pfn)


def _mapped(area: CarveOut) -> Mapping:
    return area.map(0, 8).fill()


def _move_poisoned(relocate: bool, area: CarveOut, source: Mapping, flags: int, pfn: int) -> int | None:
    """Move memory with one poisoned page. Returns that page's address, or None if nothing moved."""
    left, right = (0, 3), (4, 4)
    if flags and not relocate:
        unknown_flags(source, area.page(_TO), flags)
        assert_found(source.part(*left), source.part(*right))
        return None
    result = move(source, area.page(_TO), flags)
    entry = pagemap.entry(result.page(3))
    assert entry.swap, f"the poison entry became {entry}"
    assert entry.swap_offset == pfn, f"the poison entry became {entry}"
    assert_found(result.part(*left), result.part(*right))
    return result.page(3)


# --- marks in the page table -------------------------------------------------------------------------------------


@ways
def test_soft_dirty(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): memory moves after its soft-dirty marks were cleared.

    Unpatched: a plain move marks every moved page, so that a program that looks for changes does not miss it.
    Patched: the same with either flag.
    """
    pagemap.clear_soft_dirty(source.address, source.pages)
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    if result is not None:
        marks = pagemap.soft_dirty(result.address, result.pages)
        assert all(marks), f"moved pages must be marked soft-dirty, but are: {marks}"
        assert_found(result)


@ways
@pytest.mark.parametrize("event", [False, True], ids=["no-event", "event"])
def test_write_protection(relocate: bool, area: CarveOut, source: Mapping, flags: int, event: bool) -> None:
    """Row 87 (soft-dirty-and-uffd-wp): memory moves of which some pages are write-protected by userfaultfd (6.13).

    The marks stay where the registration stays, which needs the event of a move. Without it the marks are removed,
    because nobody could remove them later (0cef0bb836e3, Linux 6.13).

    Unpatched: a plain move keeps the marks with the event, and removes them without.
    Patched: the same with either flag. Without the event flag 16 may be refused, because a move that removes marks
    cannot be undone.
    """
    system.require_config("USERFAULTFD", "HAVE_ARCH_USERFAULTFD_WP")
    system.require_kernel(6, 13, "a move removes marks that could not be removed later")
    with Userfault(FEATURE_EVENT_REMAP if event else 0) as uffd:
        uffd.register(source, MODE_WP)
        uffd.write_protect(source.part(2, 3))
        marked = [entry.uffd_wp for entry in pagemap.entries(source.address, 8)]
        assert marked == [2 <= index < 5 for index in range(8)], f"write-protected are {marked}"
        with _events_read(uffd) if event and (relocate or not flags) else nullcontext():
            if flags == MREMAP_MUST_RELOCATE_ANON and not event:
                result = must_or_refused(relocate, area, source, area.page(_TO))
            else:
                result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        here = source if result is None else result
        after = [entry.uffd_wp for entry in pagemap.entries(here.address, 8)]
        wanted = marked if event or result is None else [False] * 8
        assert after == wanted, f"of the pages these are write-protected after the move: {after}, expected {wanted}"
    assert_found(here.fill(seed=1))


@contextmanager
def _events_read(uffd: Userfault) -> Iterator[None]:
    """Read the event of one move in a thread, because the move waits until it is read."""
    thread = threading.Thread(target=uffd.read)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# --- books -------------------------------------------------------------------------------------------------------


@ways
def test_accounting(own_group: Memcg | None, relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 91 (accounting): a thousand moves there and back.

    The kernel keeps its counters in batches for each CPU, so that a drift of up to one page for every ten moves is
    allowed.

    Unpatched: after plain moves the sizes, the committed memory and the charge of the control group are as before.
    Patched: the same with either flag.
    """
    if flags and not relocate:
        refused_move(relocate, area, source, area.page(_TO), flags)
        assert_found(source)
        return
    moves = 1000
    slack = moves // 10 * PAGE_SIZE >> 10
    here = move(move(area.map(0, 8).fill(), area.page(_TO), flags), area.page(0), flags)

    def there_and_back() -> None:
        nonlocal here
        for _ in range(moves // 2):
            here = move(move(here, area.page(_TO), flags), area.page(0), flags)

    same_accounts(there_and_back, f"a move there and back, {moves // 2} times,", slack, own_group)
    assert_found(here)
    expect_layout(area, [(0, 8)], "the memory went there and back")
