# SPDX-License-Identifier: GPL-2.0
"""The reverse map without mremap(): pages that come to another mapping by other ways, and what walks do and count."""

from __future__ import annotations

import mmap
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from guest_tests.mm import kpage, maps, numa, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, carve_out, move
from guest_tests.mm.probes import Place
from guest_tests.mm.probes.ageing import IdleBitmap, drain
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import PROT_READ
from guest_tests.mm.userfault import FEATURE_MOVE, MODE_MISSING, Userfault
from guest_tests.support.folios import huge_page, is_large, pmd_size, stamp, thp
from guest_tests.support.found import assert_found, assert_found_by, require_migration, usable
from guest_tests.support.holds import Spliced, pinned
from guest_tests.support.swapping import page_out

pytestmark = pytest.mark.shared_guest


# --- other ways than mremap() to another mapping -----------------------------------------------------------------


@pytest.mark.parametrize("size", ["small", "huge"])
def test_pages_that_userfaultfd_moved(size: str) -> None:
    """No row: UFFDIO_MOVE moves pages to a mapping that has nothing in common with theirs (6.8).

    Every kernel: the data is there, each page is found there, and nothing is left at the old place.
    """
    system.require_config("USERFAULTFD")
    system.require_kernel(6, 8, "UFFDIO_MOVE")
    pages = 8 if size == "small" else pmd_size() // PAGE_SIZE
    with carve_out(3 * pages) as area:
        source, there = area.map(0, pages), area.map(2 * pages, pages)
        if size == "huge":
            with thp():
                huge_page(source, source.address)
        stamp(source)
        with Userfault(FEATURE_MOVE) as uffd:
            uffd.register(there, MODE_MISSING)
            moved = uffd.move(source, there.address)
        left = [pfn for pfn in pagemap.pfns(source.address, pages) if pfn is not None]
        assert not left, f"UFFDIO_MOVE left pages at the old place: {left}"
        assert_found(moved.check(), pageout=size == "small")


def test_a_large_folio_beside_a_huge_page_is_found() -> None:
    """No row: a huge page moves by half of its size, and MADV_COLLAPSE makes another huge page of its first half and
    what is in front of it (6.1).

    ::

        in huge pages   4         5         6
        moved           |    hhhhh|hhhhh    |    one large folio, mapped by two page tables
        collapsed       |HHHHHHHHH|hhhhh    |    its second half is mapped by the second table alone

    Every kernel: each page of the second half is found, although the walk meets the other huge page first. On 6.1.192
    and 6.18.15 the walk ends there, and migration misses them.
    """
    system.require_kernel(7, 3, "some before lose a large folio behind a huge page that took the place of its front")
    half = pmd_size() // PAGE_SIZE // 2
    with carve_out(12 * half) as area:
        source = area.map(half, 4 * half)
        with thp():
            folio = stamp(huge_page(source, area.page(2 * half)))
        source.contents[half : 3 * half] = folio.contents
        moved = move(source, area.page(8 * half))
        moved.part(0, 2 * half).madvise(syscalls.MADV_COLLAPSE)
        huge = maps.vma_at(moved.address, detailed=True).size("AnonHugePages") << 10
        assert huge == pmd_size(), f"MADV_COLLAPSE left {huge} bytes of huge pages, expected one"
        rest = moved.part(2 * half, half)
        assert is_large(rest.address), "the large folio was split"
        assert_found(rest)
        moved.check()


# --- what is counted and marked ----------------------------------------------------------------------------------


def test_locked_pages_stay_unevictable(area: CarveOut) -> None:
    """Row 60 (mlocked): locked memory migrates.

    Every kernel: each page is still marked as locked and unevictable, and Mlocked in meminfo counts it.
    """
    require_migration()
    before = _mlocked()
    mapping = area.map(0, 8).fill()
    syscalls.mlock(mapping.address, mapping.length)
    frames = pagemap.pfns(mapping.address, 8)
    there = [next(node for node in numa.nodes() if node != here) for here in numa.nodes_of(mapping.page_addresses)]
    numa.move_pages(0, mapping.page_addresses, there, numa.MPOL_MF_MOVE_ALL)
    stayed = [index for index, frame in enumerate(pagemap.pfns(mapping.address, 8)) if frame == frames[index]]
    assert not stayed, f"pages {stayed} of locked memory did not migrate"
    drain()
    wanted = kpage.Flag.MLOCKED | kpage.Flag.UNEVICTABLE
    for index, address in enumerate(mapping.page_addresses):
        flags = kpage.flags_at(address)
        assert flags & wanted == wanted, f"page {index} of locked memory is {flags.name} after it migrated"
    locked = _mlocked() - before
    assert locked == mapping.length >> 10, f"Mlocked rose by {locked} kB for {mapping.length >> 10} kB of locked memory"
    assert_found(mapping.check(), pageout=False)


def _mlocked() -> int:
    drain()
    return _exact_meminfo("Mlocked")


def _exact_meminfo(name: str) -> int:
    # meminfo leaves out what CPUs have counted on their own, until this adds it up (vmstat_refresh(), mm/vmstat.c).
    Path("/proc/sys/vm/stat_refresh").write_text("1")
    return vmstat.meminfo()[name]


def test_a_huge_page_that_is_used_in_part_is_queued_for_splitting() -> None:
    """No row: a half of a huge page is unmapped.

    Every kernel: thp_deferred_split_page rises, so that the half is given back when memory is needed. The other half is
    found.
    """
    pages = pmd_size() // PAGE_SIZE
    with carve_out(pages) as area:
        mapping = area.map(0, pages)
        with thp():
            stamp(huge_page(mapping, mapping.address))
        before = vmstat.vmstat()
        area.hole(pages // 2, pages // 2)
        rose = vmstat.delta(before, "thp_deferred_split_page")
        assert rose >= 1, "a half of a huge page was unmapped, but it was not queued for splitting"
        assert_found(stamp(mapping.part(0, pages // 2), seed=1))


def test_a_split_mapping_does_not_count_as_huge() -> None:
    """No row: one page of a huge page becomes read-only, which splits its mapping.

    Every kernel: AnonHugePages rises by the huge page when it is mapped, and falls by it when the mapping is split.
    """
    pages = pmd_size() // PAGE_SIZE
    with carve_out(pages) as area:
        mapping = area.map(0, pages).madvise(mmap.MADV_HUGEPAGE)
        before = _exact_meminfo("AnonHugePages")
        with thp("madvise"):  # or the interpreter's memory may get a huge page as well
            mapping = stamp(huge_page(mapping, mapping.address))
        assert _exact_meminfo("AnonHugePages") - before == mapping.length >> 10, (
            "AnonHugePages does not count a huge page"
        )
        mapping.part(1).mprotect(PROT_READ)
        left = _exact_meminfo("AnonHugePages") - before
        assert left == 0, f"AnonHugePages counts {left} kB of a huge page that small entries map"
        assert_found(mapping.check())


# --- accesses ----------------------------------------------------------------------------------------------------


def test_an_access_through_a_huge_mapping_is_noticed() -> None:
    """No row: idle page tracking watches a huge page.

    Every kernel: an access clears the idle bit of the huge page.
    """
    probe = usable(IdleBitmap())
    pages = pmd_size() // PAGE_SIZE
    with carve_out(pages) as area:
        mapping = area.map(0, pages)
        with thp():
            huge_page(mapping, mapping.address)
        assert_found_by(probe, [Place(mapping.address)], "a fault that mapped a huge page")


def test_an_access_through_any_mapping_is_noticed(area: CarveOut) -> None:
    """No row: idle page tracking watches a page that a process and two children share.

    Every kernel: an access of each of them clears the idle bit.
    """
    probe = usable(IdleBitmap())
    mapping = area.map(0, 1).fill()
    with Child() as first, Child() as second:
        places = [Place(mapping.address, process) for process in (None, first, second)]
        assert_found_by(probe, places, "two forks")


# --- reclaim and memory failure ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hold", ["reference", "pin"])
def test_a_page_in_use_is_not_dropped(area: CarveOut, hold: str) -> None:
    """Row 85 (lazyfree): memory that the kernel may drop (MADV_FREE) is reclaimed while one of its pages is referenced
    or pinned, as for I/O.

    Every kernel: that page stays, with its data, because what a device writes there would be lost otherwise. A page
    that nobody holds is dropped.
    """
    mapping = area.map(0, 2).fill()
    drain()  # pages on their way to an LRU list are left alone
    held, other = mapping.part(0), mapping.part(1)
    holding: AbstractContextManager[object] = Spliced(held.address) if hold == "reference" else pinned(held.address)
    with holding:
        frame = pagemap.pfn(held.address)
        mapping.madvise(syscalls.MADV_FREE)
        drain()
        page_out(mapping)
        left = pagemap.entry(other.address)
        assert not left.present, f"a page that nobody holds was not dropped: {left}"
        now = pagemap.entry(held.address)
        # Reclaim may have tried again, and swapped the page out.
        assert now.present or now.swap, f"a page with a {hold} was dropped: pfn {frame:#x} became {now}"
        held.check()
    assert_found(held.touch())


def test_each_process_is_told_of_a_memory_error(area: CarveOut) -> None:
    """No row: two processes share a page and asked for early kill, and the page is poisoned.

    Every kernel: both get SIGBUS with the page's address, and the page is unmapped in both.
    """
    probe = usable(HwPoison())
    mapping = area.map(0, 1).fill()
    with Child() as first, Child() as second:
        mapping.unmap()
        assert_found_by(probe, [Place(mapping.address, first), Place(mapping.address, second)], "fork()")
