# SPDX-License-Identifier: GPL-2.0
"""What KSM's scan looks at, what it merges, and what it must leave alone; merging for a whole process by prctl()."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Final

import pytest

from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import maps, pagemap, swap, syscalls, system, vmstat
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.support.found import assert_found, assert_found_at, places_of
from guest_tests.support.holds import pinned
from guest_tests.support.ksm_scenes import SAME, assert_merged, assert_unmerged, equal_pair
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest


def _require(knob: str, version: str) -> None:
    if not (mm_ksm.DIRECTORY / knob).exists():
        pytest.skip(f"needs Linux {version}: this kernel has no {mm_ksm.DIRECTORY / knob}")


# --- which pages are merged --------------------------------------------------------------------------------------


@pytest.mark.parametrize("hole", ["untouched", "swapped-out"])
def test_pages_behind_a_hole_are_merged(area: CarveOut, ksm: Ksm, hole: str) -> None:
    """No row: between equal pages of a mergeable mapping there are pages that were never touched, or are swapped out.

    ::

        page   0   1   2   3   4   5   6   7
              | A |   |   | A | A |   |   | A |

    Every kernel: all equal pages are merged, and found.
    """
    mapping = area.map(0, 8).madvise(syscalls.MADV_MERGEABLE)
    equal = [mapping.part(0), mapping.part(3, 2), mapping.part(7)]
    for part in equal:
        part.fill_same(SAME)
    if hole == "swapped-out":
        swap.require_swap(4 * PAGE_SIZE >> 10)
        for first in (1, 5):
            assert_pages_out(mapping.part(first, 2).fill(seed=first))
    ksm.scan()
    assert_merged(places_of(*equal))
    assert_found_at(*places_of(*equal))
    for part in equal:
        part.check()


@pytest.mark.parametrize("which", [0, 1], ids=["first", "second"])
def test_a_pinned_page_is_not_merged(area: CarveOut, ksm: Ksm, which: int) -> None:
    """No row: of two equal pages one is pinned while KSM scans them.

    KSM tries to merge both, and has to take back what it did to one of them when the other cannot be merged.

    Every kernel: both pages stay ordinary pages, and the pinned one keeps its frame. Without the pin they are merged.
    """
    pair = equal_pair(area)
    held = (pair.stayed, pair.moved)[which]
    with pinned(held.address):
        frame = pagemap.pfn(held.address)
        ksm.scan()
        assert_unmerged(pair.stayed, [pair.moved])
        assert_unmerged(pair.moved, [pair.stayed])
        assert pagemap.pfn(held.address) == frame, "a page that is pinned was replaced by KSM"
    assert_found(pair.stayed, pair.moved)
    pair.stayed.touch()
    pair.moved.touch()
    ksm.scan()
    assert_merged(pair.places)
    pair.check()


def test_a_copy_with_room_takes_further_pages(area: CarveOut, ksm: Ksm) -> None:
    """Row 123 (max-sharing): KSM may share a page three times (max_page_sharing=3). It merges three equal pages, and
    then three more, which get a copy of their own. One of the first three is written, and another equal page comes.

    ::

        page  0         10        20
             | A A A | | B B B |
             | A A x | | B B B | | A |

    Every kernel: the new page shares the copy that has room, although KSM meets the full one first. All places of both
    copies are found.
    """
    ksm.set(max_page_sharing=3)
    first, second = area.map(0, 3).fill_same(SAME), area.map(10, 3).fill_same(SAME)
    ksm.merge(first)
    ksm.merge(second)
    assert_merged(places_of(first))
    assert_merged(places_of(second))
    first.part(2).fill(seed=1)
    ksm.scan()
    last = area.map(20, 1).fill_same(SAME).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan()
    assert_merged(places_of(first.part(0, 2), last))
    assert_found_at(*places_of(first.part(0, 2), last))
    assert_found_at(*places_of(second))


# --- what KSM knows about pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["unmapped", "moved"])
def test_memory_that_is_gone_is_forgotten(area: CarveOut, ksm: Ksm, how: str) -> None:
    """Row 131 (counters): of two mergeable mappings the one at the higher address is unmapped, or moves below the
    other; then KSM scans.

    Every kernel: ksm_rmap_items counts the pages that are there, and none that were.
    """
    with Child() as child:  # KSM knows nothing about it yet
        child.call(_forgotten, area, ksm, how)


def _forgotten(area: CarveOut, ksm: Ksm, how: str) -> None:
    # Before 6.18 a child starts with the number of its parent: finding ksm-fork-counters.
    start = mm_ksm.stat().rmap_items
    stays = area.map(10, 4).fill().madvise(syscalls.MADV_MERGEABLE)
    goes = area.map(20, 4).fill(seed=1).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan()
    items = mm_ksm.stat().rmap_items - start
    assert items == 8, f"KSM has {items} entries for eight mergeable pages"
    kept = [stays]
    if how == "moved":
        kept.append(move(goes, area.page(0)))
    else:
        goes.unmap()
    ksm.scan()
    wanted, items = 4 * len(kept), mm_ksm.stat().rmap_items - start
    assert items == wanted, f"KSM has {items} entries for this process after memory was {how}, expected {wanted}"
    assert_found(*kept)


@pytest.mark.finding("ksm-fork-counters", match="ksm_zero_pages had risen by")
def test_zero_pages_count_for_each_process(area: CarveOut, ksm: Ksm) -> None:
    """Row 131 (counters): KSM replaces four empty pages by the zero page (use_zero_pages), and the process forks (6.6).

    Every kernel: ksm_zero_pages counts them for both processes, and falls when each has lost them. Before 4d6fc29f3634
    (6.18) nothing counts those of a new child: finding ksm-fork-counters.
    """
    _require("ksm_zero_pages", "6.6")
    ksm.set(use_zero_pages=1)
    start = mm_ksm.read("ksm_zero_pages")
    mapping = area.map(0, 4).fill_same(0).madvise(syscalls.MADV_MERGEABLE)
    ksm.scan()
    seen = [mm_ksm.read("ksm_zero_pages")]
    with Child() as child:
        seen.append(mm_ksm.read("ksm_zero_pages"))
        child.call(mapping.part(0).fill, seed=1)
        seen.append(mm_ksm.read("ksm_zero_pages"))
    seen.append(mm_ksm.read("ksm_zero_pages"))
    mapping.unmap()
    seen.append(mm_ksm.read("ksm_zero_pages"))
    rose = [number - start for number in seen]
    assert rose == [4, 8, 7, 4, 0], (
        "after merging, fork(), a write of the child, its end, and unmapping, ksm_zero_pages had risen by "
        f"{rose}, expected [4, 8, 7, 4, 0]"
    )


def test_zero_pages_are_not_resident(ksm: Ksm) -> None:
    """Row 131 (counters): KSM replaces a child's 256 empty pages by the zero page (use_zero_pages), and the child ends.

    Every kernel: RssAnon of the child falls by these pages, and the kernel has nothing to say of it when it ends.
    """
    ksm.set(use_zero_pages=1)
    with carve_out(256) as area, Child() as child:
        mapping = child.call(area.map, 0, 256)
        child.call(mapping.fill_same, 0)
        child.call(mapping.madvise, syscalls.MADV_MERGEABLE)
        before = vmstat.status(child.pid)["RssAnon"]
        ksm.scan()
        less = before - vmstat.status(child.pid)["RssAnon"]
        zeros = len(set(pagemap.pfns(mapping.address, mapping.pages, child.pid)))
        assert zeros == 1, f"256 empty pages map {zeros} frames, not the zero page alone"
        # Each thread counts up to 32 pages, or so many for each CPU, before they show.
        assert less > mapping.length // 2 >> 10, f"RssAnon fell by {less} kB when 256 pages became the zero page"


# --- knobs -------------------------------------------------------------------------------------------------------


def test_smart_scan_skips_only_if_it_is_on(area: CarveOut, ksm: Ksm) -> None:
    """No row: KSM scans pages that never become equal, first without smart_scan and then with it (6.7).

    Every kernel: pages_skipped stays as it is without smart_scan, and rises with it.
    """
    _require("smart_scan", "6.7")
    mapping = area.map(0, 8).fill().madvise(syscalls.MADV_MERGEABLE)
    before = mm_ksm.read("pages_skipped")
    ksm.scan(12)
    without = mm_ksm.read("pages_skipped")
    assert without == before, f"KSM skipped {without - before} pages, though smart_scan is 0"
    ksm.set(smart_scan=1)
    ksm.scan(12)
    assert mm_ksm.read("pages_skipped") > without, "KSM skipped no page in twelve scans with smart_scan"
    assert_found(mapping.check())


def test_the_advisor_keeps_to_its_maximum(area: CarveOut, ksm: Ksm) -> None:
    """Row 136 (knob-errors): the advisor scans with ten million pages at a time, and advisor_max_pages_to_scan is set
    to 1,000 (6.8).

    Every kernel: after the next scan pages_to_scan is not above the maximum.
    """
    _require("advisor_mode", "6.8")
    mapping = area.map(0, 8).fill().madvise(syscalls.MADV_MERGEABLE)
    # So many that the advisor's own limits, which follow from ksmd's time (scan_time_advisor(), mm/ksm.c), are larger.
    many = 10_000_000
    ksm.set(advisor_min_pages_to_scan=many, advisor_mode="scan-time")
    assert mm_ksm.read("pages_to_scan") == many
    ksm.set(advisor_max_pages_to_scan=1000)
    ksm.scan_exactly(1)
    pages = mm_ksm.read("pages_to_scan")
    assert pages <= 1000, f"the advisor set pages_to_scan to {pages}, and its maximum is 1000"
    mapping.check()


def test_run_2_unmerges_private_file_mappings(area: CarveOut, ksm: Ksm) -> None:
    """Row 127 (run-2): merged pages of a private file mapping and of anonymous memory, when 2 is written to ``run``.

    Every kernel: all of them are un-merged, and found.
    """
    fd = syscalls.memfd_create("private")
    try:
        os.ftruncate(fd, 2 * PAGE_SIZE)
        mapping = area.map_file(0, 2, fd).fill_same(SAME)
    finally:
        os.close(fd)
    other = area.map(10, 2).fill_same(SAME)
    ksm.merge(mapping, other)
    ksm.unmerge_all()
    assert_unmerged(mapping, [other])
    assert_unmerged(other, [mapping])
    assert_found(mapping.check(), other.check())


# --- merging for a whole process ---------------------------------------------------------------------------------


def test_merging_for_a_process_is_turned_on_and_off(area: CarveOut, ksm: Ksm) -> None:
    """No row: PR_SET_MEMORY_MERGE is turned on before memory is mapped, and off after it was merged (6.4).

    Every kernel: the new memory is mergeable and merged. Off, no page of it is merged, none is mergeable, and a move
    finds nothing to un-merge: every page is found at the new place.
    """
    system.require_kernel(6, 4, "PR_SET_MEMORY_MERGE")
    with Child() as child:
        child.call(_on_and_off, area, ksm)


def _on_and_off(area: CarveOut, ksm: Ksm) -> None:
    syscalls.set_memory_merge()
    _nothing_mergeable()  # the scans need not look at the interpreter
    mapping = area.map(0, 4).fill_same(SAME)
    _expect_mergeable(mapping, True)
    ksm.scan()
    assert_merged(places_of(mapping))
    syscalls.set_memory_merge(False)
    assert_unmerged(mapping)
    _expect_mergeable(mapping, False)
    assert_found(move(mapping, area.page(20)).check())


def _expect_mergeable(mapping: Mapping, wanted: bool) -> None:
    vma = maps.vma_at(mapping.address, detailed=True)
    assert ("mg" in vma.vm_flags) is wanted, f"{vma} is {'not ' if wanted else ''}mergeable: {sorted(vma.vm_flags)}"


@pytest.mark.finding("ksm-process-forgotten", match="after a scan found nothing mergeable")
def test_merging_for_a_process_outlasts_a_scan_that_finds_nothing(area: CarveOut, ksm: Ksm) -> None:
    """No row: in a process with PR_SET_MEMORY_MERGE each mapping is made unmergeable, KSM scans, and new memory is
    mapped (6.4).

    A scan that finds no mergeable mapping forgets the process. This may also happen during exec.

    Every kernel: PR_GET_MEMORY_MERGE still says 1, and the new memory is merged. Before 590c03ca6a3f (6.19) it says 0:
    finding ksm-process-forgotten.
    """
    system.require_kernel(6, 4, "PR_SET_MEMORY_MERGE")
    other = area.map(30, 1).fill().madvise(syscalls.MADV_MERGEABLE)  # ksmd sleeps if no memory is mergeable
    with Child() as child:
        child.call(syscalls.set_memory_merge)
        for _ in range(5):
            child.call(_nothing_mergeable)
            ksm.scan()
            if not child.call(_mergeable):  # or the interpreter has mapped memory before the scan
                break
        merges = child.call(syscalls.prctl, syscalls.PR_GET_MEMORY_MERGE)
        assert merges == 1, f"PR_GET_MEMORY_MERGE says {merges} after a scan found nothing mergeable"
        child.call(_new_memory_is_merged, area, ksm)
    other.check()


def _mergeable() -> list[maps.Vma]:
    return [vma for vma in maps.vmas(detailed=True) if "mg" in vma.vm_flags]


def _nothing_mergeable() -> None:
    for _ in range(5):  # the interpreter may map memory meanwhile
        if not (mergeable := _mergeable()):
            return
        for vma in mergeable:
            syscalls.madvise(vma.start, vma.length, syscalls.MADV_UNMERGEABLE)
    raise AssertionError(f"mappings are still mergeable: {', '.join(map(str, mergeable))}")


def _new_memory_is_merged(area: CarveOut, ksm: Ksm) -> None:
    mapping = area.map(0, 4).fill_same(SAME)
    _expect_mergeable(mapping, True)
    ksm.scan()
    assert_merged(places_of(mapping))


#: a program whose buffer of one MiB is full of zeros when it writes; nobody reads all of that, so that it waits
_PROGRAM: Final = ("dd", "if=/dev/zero", "bs=1048576")


def test_merging_for_a_process_outlasts_exec(area: CarveOut, ksm: Ksm) -> None:
    """No row: a process with PR_SET_MEMORY_MERGE starts a program with a buffer of equal pages (6.9).

    Every kernel: the pages of the program are merged.
    """
    system.require_kernel(6, 9, "PR_SET_MEMORY_MERGE after exec")
    other = area.map(0, 1).fill().madvise(syscalls.MADV_MERGEABLE)  # ksmd sleeps if no memory is mergeable
    with Child() as child:
        merged = child.call(_merged_in_a_program, ksm)
    wanted = (1 << 20) // PAGE_SIZE
    assert merged >= wanted, (
        f"{merged} pages are merged of a program that was started with PR_SET_MEMORY_MERGE, expected {wanted} or more"
    )
    other.check()


def _merged_in_a_program(ksm: Ksm) -> int:
    busybox = shutil.which("busybox")  # guests of the harness have the tools of busybox alone
    command = [busybox, *_PROGRAM] if busybox else _PROGRAM
    syscalls.set_memory_merge()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        program.stdout.read(1)
        syscalls.set_memory_merge(False)  # the scans need not look at the interpreter
        ksm.scan()
        merged = mm_ksm.merging_pages(program.pid)
        program.kill()
    return merged
