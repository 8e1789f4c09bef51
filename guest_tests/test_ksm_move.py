# SPDX-License-Identifier: GPL-2.0
"""Moves of pages that KSM has merged, and merges of pages that were moved.

In the pictures ``A`` is a page that KSM merged, a small letter a page of its own, ``.`` is nothing, ``0`` is zero.
"""

from __future__ import annotations

import contextlib
import errno
import select
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import maps, memcg, pagemap, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child
from guest_tests.mm.waiting import patience, slowness, wait_until
from guest_tests.support.found import places_of
from guest_tests.support.ksm_scenes import SAME, assert_merged, assert_unmerged


def merged_mapping(area: CarveOut, at: int, pages: int, ksm: Ksm) -> Mapping:
    """Equal pages that KSM has merged into one."""
    mapping = area.map(at, pages).fill_same(SAME)
    ksm.merge(mapping)
    assert_merged(places_of(mapping))
    return mapping


def expect_in_smaps(mapping: Mapping, pages: int) -> None:
    """Assert how many merged pages smaps counts in the mappings that overlap this one. It counts none before 6.7."""
    if system.release() >= (6, 7, 0):
        kb = maps.kilobytes(mapping.address, mapping.end, "KSM")
        assert kb == pages * PAGE_SIZE // 1024, f"smaps counts {kb} kB of merged pages, expected {pages} pages"


# --- un-merged by a move, merged again later ---------------------------------------------------------------------


def test_a_move_unmerges_and_a_scan_merges_again(area: CarveOut, ksm: Ksm) -> None:
    """Rows 101 (move-unmerges) and 102 (move-remerges): ten merged pages move plainly, and KSM scans them again.

    ::

        page      0                    20
        before  | A A A A A A A A A A |
        moved   |                     | a b c d e f g h i j |    all equal, all with their own frame
        scanned |                     | A A A A A A A A A A |

    Every kernel: after the move each page has a frame of its own and the mapping is still mergeable; after the scans
    all share one frame.
    """
    source = merged_mapping(area, 0, 10, ksm)
    expect_in_smaps(source, 10)
    moved = move(source, area.page(20))
    assert_unmerged(moved)
    expect_in_smaps(moved, 0)
    vma = maps.vma_at(moved.address, detailed=True)
    assert "mg" in vma.vm_flags, f"the moved mapping {vma} is not mergeable any more: {sorted(vma.vm_flags)}"
    moved.check()
    ksm.scan()
    assert_merged(places_of(moved))
    expect_in_smaps(moved, 10)
    moved.check()


def test_a_partial_move_unmerges_only_what_moves(area: CarveOut, ksm: Ksm) -> None:
    """Row 103 (partial-unmerge): three of ten merged pages move.

    ::

        page      0                    20
        before  | A A A A A A A A A A |
        after   | A A A . . . A A A A | a b c |

    Every kernel: these three have frames of their own; the others still share the old frame.
    """
    source = merged_mapping(area, 0, 10, ksm)
    frame = pagemap.pfn(source.address)
    moved = move(source.part(3, 3), area.page(20))
    assert_unmerged(moved, [source.part(0)])
    kept = [source.part(0, 3), source.part(6, 4)]
    assert assert_merged(places_of(*kept)) == frame, "the pages that stayed have another frame now"
    for mapping in (moved, *kept):
        mapping.check()


def test_resizing_in_place_unmerges_nothing(area: CarveOut, ksm: Ksm) -> None:
    """Row 104 (inplace): merged pages grow and shrink in place.

    ::

        page      0           5
        before  | A A A A A | . . . . . |
        grown   | A A A A A   0 0 0 0 0 |    free space behind it
        shrunk  | A A A |

    Every kernel: they still share the same frame.
    """
    source = merged_mapping(area, 0, 5, ksm)
    frame = pagemap.pfn(source.address)
    area.hole(5, 10)
    grown = move(source, None, pages=10)
    assert grown.address == source.address, f"it moved to {grown.address:#x} although there was room"
    assert assert_merged(places_of(grown.part(0, 5))) == frame, "growing in place un-merged pages"
    grown.check()
    shrunk = move(grown, None, pages=3)
    assert shrunk.address == source.address
    assert assert_merged(places_of(shrunk)) == frame, "shrinking in place un-merged pages"
    shrunk.check()


def test_dontunmap_unmerges_too(area: CarveOut, ksm: Ksm) -> None:
    """Row 105 (dontunmap): merged pages move with DONTUNMAP.

    ::

        page      0           10
        before  | A A A A A |
        after   | . . . . . | a b c d e |    page 0 is still mapped and mergeable, but empty

    Every kernel: the moved pages have frames of their own; the source is empty and still mergeable; a scan merges the
    moved pages.
    """
    source = merged_mapping(area, 0, 5, ksm)
    moved = move(source, area.page(10), syscalls.MREMAP_DONTUNMAP)
    assert_unmerged(moved)
    assert pagemap.pfns(source.address, 5) == [None] * 5, "the old range still has pages"
    assert "mg" in maps.vma_at(source.address, detailed=True).vm_flags
    moved.check()
    source.check()
    ksm.scan()
    assert_merged(places_of(moved))


def test_a_child_that_moves_unmerges_only_its_own(area: CarveOut, ksm: Ksm) -> None:
    """Row 106 (child-moves): a child moves merged pages that it inherited.

    ::

        page       0           10
        parent   | A A A A A |                   before and after
        child    | A A A A A |                   inherited
        child    |           | a b c d e |       moved

    Every kernel: the child's pages have frames of their own; the parent's pages still share the same frame.
    """
    source = merged_mapping(area, 0, 5, ksm)
    frame = pagemap.pfn(source.address)
    with Child() as child:
        assert_merged([*places_of(source), Place(source.address, child)])
        moved = child.call(move, source, area.page(10))
        child.call(assert_unmerged, moved)
        frames = pagemap.pfns(moved.address, moved.pages, child.pid)
        assert frame not in frames, f"the child still maps the parent's pfn {frame:#x}: {frames}"
        child.call(moved.check)
        assert assert_merged(places_of(source)) == frame, "the child's move changed the parent's pages"
        expect_in_smaps(source, 5)
    source.check()


def test_memory_offered_by_prctl_is_treated_the_same(area: CarveOut, ksm: Ksm) -> None:
    """Row 107 (prctl-mode): rows 101 and 102 in a process that offers all of its memory to KSM (PR_SET_MEMORY_MERGE,
    6.4).

    ::

        page      0           10
        before  | A A A A A |
        moved   |           | a b c d e |
        scanned |           | A A A A A |

    Every kernel: the move un-merges the pages, and the next scans merge them again.
    """
    with Child() as child:  # the setting lasts until the process ends
        try:
            child.call(syscalls.set_memory_merge)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            pytest.skip("needs Linux 6.4 (PR_SET_MEMORY_MERGE)")
        child.call(_call_off)
        source = child.call(_map_same, area, 0, 5)
        ksm.scan()
        assert_merged([Place(address, child) for address in source.page_addresses])
        moved = child.call(move, source, area.page(10))
        child.call(assert_unmerged, moved)
        assert "mg" in maps.vma_at(moved.address, child.pid, detailed=True).vm_flags
        ksm.scan()
        assert_merged([Place(address, child) for address in moved.page_addresses])
        child.call(moved.check)


def _call_off() -> None:
    """Make the interpreter's memory unmergeable, so that ksmd need not scan it. Later mappings are mergeable."""
    for vma in maps.vmas():
        if vma.perms == "rw-p":
            with contextlib.suppress(OSError):
                syscalls.madvise(vma.start, vma.length, syscalls.MADV_UNMERGEABLE)


def _map_same(area: CarveOut, at: int, pages: int) -> Mapping:
    return area.map(at, pages).fill_same(SAME)


def test_memory_that_is_no_longer_mergeable_just_moves(area: CarveOut, ksm: Ksm) -> None:
    """Row 108 (no-mergeable): merged pages are made unmergeable and move.

    ::

        page      0           10
        merged  | A A A A A |
        called  | a b c d e |                    MADV_UNMERGEABLE
        moved   |           | a b c d e |        the same frames

    Every kernel: the move keeps their frames, because there is nothing to un-merge.
    """
    source = merged_mapping(area, 0, 5, ksm)
    source.madvise(syscalls.MADV_UNMERGEABLE)
    assert_unmerged(source)
    frames = pagemap.pfns(source.address, 5)
    moved = move(source, area.page(10))
    assert pagemap.pfns(moved.address, 5) == frames, "the move copied pages although none was merged"
    assert "mg" not in maps.vma_at(moved.address, detailed=True).vm_flags
    assert not any(mm_ksm.merged(moved.address, 5))
    moved.check()


def test_a_move_takes_pages_out_of_the_zero_page(area: CarveOut, ksm: Ksm) -> None:
    """Row 109 (zero-pages): pages of zeros that KSM has mapped to the zero page (use_zero_pages, 6.6) move.

    ::

        page      0           10
        before  | 0 0 0 0 0 |                    all map the zero page
        after   |           | a b c d e |        zeros, in frames of their own

    Every kernel: each gets a frame of its own, and ``ksm_zero_pages`` falls to 0.
    """
    if ksm.counters().ksm_zero_pages is None:
        pytest.skip("needs Linux 6.6 (ksm_zero_pages)")
    ksm.set(use_zero_pages=1)
    source = area.map(0, 5).fill_same(0).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan()
    before = ksm.counters().ksm_zero_pages
    assert before == 5, f"KSM placed {before} zero pages instead of 5"
    assert len(set(pagemap.pfns(source.address, 5))) == 1
    moved = move(source, area.page(10))
    after = ksm.counters().ksm_zero_pages
    assert after == 0, f"the move left {after} of KSM's 5 zero pages"
    assert_unmerged(moved)
    moved.check()
    moved.fill(seed=9).check()


def test_a_huge_page_is_split_merged_and_unmerged(ksm: Ksm) -> None:
    """Row 130 (thp-source): a huge page whose small pages are equal is merged, which splits it, and moves.

    ::

        before  | one huge page       |    written with one byte everywhere
        merged  | A A A A ... A A A A |    split by KSM; max_page_sharing makes several frames of it
        moved   | a b c d ... w x y z |

    Every kernel: each small page has a frame of its own.
    """
    size_file = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if not size_file.exists():
        pytest.skip("needs CONFIG_TRANSPARENT_HUGEPAGE")
    size = int(size_file.read_text())
    pages = size // PAGE_SIZE
    if size > 4 << 20:
        pytest.skip(f"a huge page of {size >> 20} MB is too much for a guest")
    with carve_out(4 * pages) as area:
        source = area.map(pages, pages).madvise(syscalls.MADV_HUGEPAGE).fill_same(SAME)
        vma = maps.vma_at(source.address, detailed=True)
        if vma.size("AnonHugePages") * 1024 != size:
            pytest.skip(f"the kernel gave no huge page: AnonHugePages is {vma.size('AnonHugePages')} kB")
        ksm.merge(source)
        moved = move(source, area.page(2 * pages))
        assert_unmerged(moved)
        moved.check()


def test_only_the_mergeable_one_of_several_mappings_is_unmerged(area: CarveOut, ksm: Ksm) -> None:
    """Row 135 (multi-vma-ksm): one call moves three mappings, of which the middle one has merged pages (6.17).

    ::

        page      0    2    4         10   12   14
        before  | a b| A A| c d| ... |    |    |    |    only the middle one is mergeable
        after   |    |    |    | ... | a b| e f| c d|

    Every kernel: only the pages of the middle mapping get other frames; before 6.17, EFAULT and nothing changes.
    """
    whole = area.map(0, 6).fill()
    for index in (2, 3):
        whole.write(index, bytes([SAME]))
    ksm.merge(whole.part(2, 2))
    frames = pagemap.pfns(whole.address, 6)
    if system.release() < (6, 17, 0):
        with pytest.raises(OSError, match="EFAULT"):
            move(whole, area.page(10))
        assert pagemap.pfns(whole.address, 6) == frames, "a refused move changed pages"
        whole.check()
        return
    moved = move(whole, area.page(10))
    after = pagemap.pfns(moved.address, 6)
    assert after[:2] + after[4:] == frames[:2] + frames[4:], "pages that were not merged were copied"
    assert_unmerged(moved.part(2, 2))
    moved.check()


# --- a move that cannot finish its un-merging --------------------------------------------------------------------


@contextmanager
def _alarm_storm(interval: float) -> Iterator[None]:
    """Send SIGALRM every ``interval`` seconds, to a handler that does not restart interrupted calls."""
    old = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_a_move_interrupted_by_a_signal_moves_nothing(ksm: Ksm) -> None:
    """Row 110 (signal-abort): signals arrive while a move un-merges 1024 pages; the move is repeated until it succeeds.

    ::

        before  | A A A ... A A A |
        EINTR   | a b c ... A A A |                            some un-merged already, all still there
        later   |                   | a b c ... x y z |        moved at last

    Every kernel: an interrupted move fails with EINTR and leaves the mapping at its place; in the end all pages have
    moved and are un-merged.
    """
    pages = 1024
    ksm.set(max_page_sharing=2 * pages)
    with carve_out(2 * pages) as area:
        source = area.map(0, pages).fill_same(SAME)
        source.madvise(syscalls.MADV_MERGEABLE)
        ksm.scan()
        interrupted = 0
        moved: Mapping | None = None
        end = time.monotonic() + patience(20)
        with _alarm_storm(0.0003 * slowness()):
            while moved is None:
                assert time.monotonic() < end, f"not moved in time: {interrupted} times interrupted"
                try:
                    moved = move(source, area.page(pages))
                except InterruptedError:
                    interrupted += 1
                    vma = maps.vma_at(source.address)
                    assert (vma.start, vma.end) == (source.address, source.end), f"after EINTR there is {vma}"
        if not interrupted:
            pytest.skip("no move was interrupted: this machine moves the memory before the first signal")
        assert not any(mm_ksm.merged(moved.address, pages))
        moved.check()


def test_a_move_without_memory_for_the_copies_moves_nothing(area: CarveOut, ksm: Ksm) -> None:
    """Row 111 (memcg-abort): merged pages of a child are to move while its control group has no memory for half of the
    copies.

    ::

        before  | A A A ... A A A |
        ENOMEM  | a b c ... A A A |                       some un-merged already, all still there
        later   |                  | a b c ... x y z |    moved when there is room

    Every kernel: ENOMEM, with some pages un-merged and all at the old place; the move succeeds when there is memory.
    """
    memcg.require_memcg()
    pages = 512
    with memcg.Memcg("tight") as group, Child() as child, carve_out(2 * pages) as wide:
        group.enter(child.pid)
        # It must not be killed: the kernel lets a process that it kills exceed the limit.
        Path(f"/proc/{child.pid}/oom_score_adj").write_text("-1000")
        source = child.call(_map_same, wide, 0, pages)
        child.call(source.madvise, syscalls.MADV_MERGEABLE)
        ksm.scan()
        group.set_swap_max(0)
        # Half of what the copies take; the interpreter needs some memory of its own.
        group.set_max(group.current + source.length // 2)
        child.start(move, source, wide.page(pages))
        try:
            # The first event is that of the move, which then fails. The second one is the interpreter's, unless it
            # needs no memory. To raise the limit earlier would let the move succeed.
            wait_until(lambda: group.events()["oom"] > 1 or _answered(child), "the control group to run out of memory")
        finally:
            group.set_max(None)
        with pytest.raises(OSError, match="ENOMEM"):
            child.result()
        vma = maps.vma_at(source.address, child.pid)
        assert (vma.start, vma.end) == (source.address, source.end), f"after ENOMEM there is {vma}"
        left = mm_ksm.merged(source.address, pages, child.pid).count(True)
        assert 0 < left < pages, f"un-merging did not stop half way: {left} of {pages} pages are still merged"
        child.call(source.check)
        moved = child.call(move, source, wide.page(pages))
        child.call(moved.check)
        assert not any(mm_ksm.merged(moved.address, pages, child.pid))


def _answered(child: Child) -> bool:
    return bool(select.select([child.socket], [], [], 0)[0])


def test_moves_that_race_ksmd_lose_nothing(area: CarveOut, ksm: Ksm, relocate: bool) -> None:
    """Row 134 (relocate-ksm-race): pages move there and back while ksmd scans at full speed.

    ::

        page     0         10
               | A A A A |         |
                     `---------.
               |         | A A A A |    and back

    Unpatched: after plain moves the data is right, and KSM merges the pages in the end.
    Patched: the same with flag 8.
    """
    flag = syscalls.MREMAP_RELOCATE_ANON if relocate else 0
    mapping = area.map(0, 4).fill_same(SAME).madvise(syscalls.MADV_MERGEABLE)
    goal = mm_ksm.read("full_scans") + 20
    least = 20
    mm_ksm.write("run", 1)
    rounds = 0
    end = time.monotonic() + 30
    while rounds < least or mm_ksm.read("full_scans") < goal:
        assert time.monotonic() < end, f"after {rounds} rounds ksmd has {goal - mm_ksm.read('full_scans')} scans to go"
        for place in (10, 0):
            mapping = move(mapping, area.page(place), flag)
        mapping.check()
        rounds += 1
    ksm.stop()
    ksm.scan()
    assert_merged(places_of(mapping))
    mapping.check()
