# SPDX-License-Identifier: GPL-2.0
"""Large folios, moved as a whole and in part, to aligned and other places: rows 74, 76 to 84 and 90.

A large folio has one anon_vma and one index for all its pages, so that it can only be relocated as a whole. A folio
that reaches beyond the range must be split first. If it cannot be split, the relocation must be refused. Pictures show
memory in units of half a huge page; ``T`` is where a huge page is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from guest_tests.mm import kpage, pagemap, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, ZERO, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MADV_DONTNEED, MREMAP_MUST_RELOCATE_ANON
from guest_tests.support.checks import State, counted, fails
from guest_tests.support.folios import huge_kb, huge_page, is_large, mthp, mthp_size, pmd_size, stamp, thp
from guest_tests.support.found import assert_found
from guest_tests.support.holds import Spliced, pinned
from guest_tests.support.moves import lenient_ways, move_or_refused, must_or_refused, pin_in_the_way, refused_move, ways

pytestmark = pytest.mark.shared_guest


@dataclass(frozen=True)
class Scene:
    """Room for four huge pages, and one huge page with known data at the beginning."""

    area: CarveOut
    #: the huge page
    source: Mapping
    #: pages in a huge page
    pages: int

    def at(self, halves: int, pages: int = 0) -> int:
        """The address ``halves`` halves of a huge page and ``pages`` pages behind the beginning."""
        return self.area.page(halves * (self.pages // 2) + pages)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """A huge page, in a mapping of its own."""
    pages = pmd_size() // PAGE_SIZE
    with thp(), carve_out(4 * pages) as area:
        source = area.map(0, pages)
        huge_page(source, source.address)
        stamp(source)
        assert is_large(source.address)
        yield Scene(area, source, pages)


def _large(mapping: Mapping) -> list[bool]:
    return [is_large(address) for address in mapping.page_addresses]


# --- whole huge pages --------------------------------------------------------------------------------------------


@ways
def test_to_an_aligned_place(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 76 (thp-aligned): a huge page moves to a place that is aligned to its size.

    ::

        half    0   1   2   3   4   5   6   7
                |TTTTTTT|       |--> here |

    Unpatched: after a plain move a PMD still maps it.
    Patched: the same with either flag, and the page is found; each of its pages is counted as relocated.
    """
    before = pagemap.pfn(scene.source.address)
    with counted(relocate, relocated=1 if flags else 0, relocated_pages=scene.pages if flags else 0):
        result = move_or_refused(relocate, scene.area, scene.source, scene.at(4), flags)
    if result is not None:
        assert huge_kb(result) == result.length >> 10, f"of a huge page {huge_kb(result)} kB are mapped as one"
        assert pagemap.pfn(result.address) == before, "the move changed the frame"
        assert_found(result)


@ways
@pytest.mark.parametrize("off", [1, -1])
def test_to_a_misaligned_place(relocate: bool, scene: Scene, flags: int, off: int) -> None:
    """Row 77 (thp-misaligned): a huge page moves to a place that is off by one page.

    ::

        half    0   1   2   3   4   5   6   7
                |TTTTTTT|        |--> here |            one page off

    Unpatched: after a plain move small entries map it, because no PMD can; the frames are the same.
    Patched: the same with either flag, and every page is found. The folio need not be split.
    """
    before = pagemap.pfns(scene.source.address, scene.pages)
    result = move_or_refused(relocate, scene.area, scene.source, scene.at(4, off), flags)
    if result is not None:
        assert huge_kb(result) == 0, f"no PMD fits, but {huge_kb(result)} kB are said to be mapped by one"
        assert pagemap.pfns(result.address, result.pages) == before, "the move changed frames"
        assert_found(result)


@ways
def test_the_huge_zero_page(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 83 (huge-zero): a huge page that was only read moves.

    Unpatched: after a plain move the zero page is mapped at the new place; it can be written, and is found then.
    Patched: the same with either flag.
    """
    source = scene.area.map(scene.pages, scene.pages).touch_read([0])
    if kpage.Flag.ZERO_PAGE not in kpage.flags_at(source.address):
        pytest.skip("needs the huge zero page: /sys/kernel/mm/transparent_hugepage/use_zero_page is 0")
    result = move_or_refused(relocate, scene.area, source, scene.at(6), flags)
    if result is not None:
        assert kpage.Flag.ZERO_PAGE in kpage.flags_at(result.address), "the zero page was copied"
        stamp(result, seed=1)
        assert_found(result)


# --- parts of a huge page ----------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("half", [0, 1], ids=["first", "second"])
def test_half_of_it(relocate: bool, scene: Scene, flags: int, half: int) -> None:
    """Row 78 (thp-half): one half of a huge page moves.

    ::

        half    0   1   2   3   4   5   6   7
                |TTT|TTT|       |--> here

    Unpatched: a plain move; both halves hold their data and are found.
    Patched: both flags split the folio and relocate the half; both halves are found.
    """
    count = scene.pages // 2
    part, rest = scene.source.part(half * count, count), scene.source.part((1 - half) * count, count)
    before = vmstat.vmstat()
    result = move_or_refused(relocate, scene.area, part, scene.at(4), flags)
    if result is not None:
        if flags:
            assert vmstat.delta(before, "thp_split_page") >= 1, "half of a folio was relocated without splitting it"
        assert_found(result, rest)


@ways
def test_half_of_it_within_the_mapping(relocate: bool, flags: int) -> None:
    """Row 79 (thp-half-same-root): one half of a huge page moves onto another part of the same mapping, which has the
    same anon_vma.

    ::

        half    0   1   2   3   4   5
                |.......|TTT|TTT|.......|
                |...|<---TTT|   |.......|

    Unpatched: a plain move; all pages are found.
    Patched: flag 8 succeeds. Flag 16 succeeds or is refused without a trace, because a folio cannot be split while its
    anon_vma is locked. All pages are found.
    """
    pages = pmd_size() // PAGE_SIZE
    with thp("madvise"), carve_out(3 * pages) as area:
        whole = area.map(0, 3 * pages)
        whole.contents = [None] * whole.pages
        for index in (0, 1, 3 * pages - 1):
            whole.write(index, b"around it %d " % index)
        with thp():
            huge = stamp(huge_page(whole, area.page(pages)))
        part, rest = huge.part(0, pages // 2), huge.part(pages // 2, pages // 2)
        to = area.page(pages // 2)
        if flags == MREMAP_MUST_RELOCATE_ANON:
            result = must_or_refused(relocate, area, part, to)
        else:
            result = move_or_refused(relocate, area, part, to, flags)
        around = [whole.part(0, 2), whole.part(3 * pages - 1)]
        assert_found(part if result is None else result, rest, *around)


@ways
def test_scattered(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 82 (scattered): one half of a huge page was moved plainly, and the other half, which still belongs to the
    same folio, moves.

    ::

        half    0   1   2   3   4   5   6   7
                |TTT|hole       |TTT|                    the folio is in two mappings

    Unpatched: a plain move; both halves are found.
    Patched: flag 8 succeeds, flag 16 succeeds or is refused without a trace; both halves are found.
    """
    count = scene.pages // 2
    away = move(scene.source.part(count, count), scene.at(4))
    rest = scene.source.part(0, count)
    if flags == MREMAP_MUST_RELOCATE_ANON:
        result = must_or_refused(relocate, scene.area, rest, scene.at(6))
    else:
        result = move_or_refused(relocate, scene.area, rest, scene.at(6), flags)
    assert_found(rest if result is None else result, away)


@lenient_ways
def test_split_afterwards(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 84 (split-huge): one half of a huge page moves, and the kernel is told to split the folio (debugfs).

    To split a folio the kernel has to find all of its pages.

    Unpatched: after a plain move no page belongs to a large folio any more, and all are found.
    Patched: the same with flag 8.
    """
    control = Path("/sys/kernel/debug/split_huge_pages")
    system.require_file(str(control), "DEBUG_FS")
    count = scene.pages // 2
    result = move_or_refused(relocate, scene.area, scene.source.part(0, count), scene.at(4), flags)
    if result is None:
        return
    rest = scene.source.part(count, count)
    for part in (result, rest):
        control.write_text(f"{os.getpid()},{part.address:#x},{part.end:#x},0")
    for part in (result, rest):
        large = [index for index, each in enumerate(_large(part)) if each]
        assert not large, f"after splitting, pages {large[:8]} … of {part} still belong to a large folio"
    assert_found(result, rest)


# --- folios smaller than a huge page -----------------------------------------------------------------------------


@contextmanager
def _folios(number: int) -> Iterator[tuple[CarveOut, Mapping, int]]:
    """A carve-out, a mapping of ``number`` large folios in it, and the number of pages in each folio."""
    size = mthp_size()
    pages = size // PAGE_SIZE
    with thp("madvise"), mthp(size), carve_out(4 * number * pages) as area:
        source = stamp(area.map(0, number * pages))
        large = _large(source)
        assert all(large), f"faults got no folios of {size >> 10} kB: {large}"
        yield area, source, pages


@ways
@pytest.mark.parametrize("off", [0, 1, 5])
def test_folios_inside(relocate: bool, flags: int, off: int) -> None:
    """Row 80 (mthp-inside): two large folios that lie completely in the range move, also to places that are not aligned
    for them.

    ::

        before    |FFFF|FFFF|FFFF|FFFF|
        after     |FFFF|               |FFFF|                |FFFF|FFFF|

    Unpatched: after a plain move they are still large folios with the same frames.
    Patched: the same with either flag; every page is found, and counted as relocated.
    """
    with _folios(4) as (area, source, pages):
        part = source.part(pages, 2 * pages)
        before = pagemap.pfns(part.address, part.pages)
        with counted(relocate, relocated_pages=part.pages if flags else 0):
            result = move_or_refused(relocate, area, part, area.page(8 * pages + off), flags)
        if result is not None:
            assert pagemap.pfns(result.address, result.pages) == before, "the move changed frames"
            assert all(_large(result)), f"folios inside of the range were split: {_large(result)}"
            assert_found(result, source.part(0, pages), source.part(3 * pages, pages))


@ways
@pytest.mark.parametrize("first", [1, 3])
def test_folios_across(relocate: bool, flags: int, first: int) -> None:
    """Row 81 (mthp-cross): a range that begins inside of a large folio moves.

    ::

        before    |FFFF|FFFF|FFFF|FFFF|
        range       |-----------------|
        after     |ff               |ff|FFFF|FFFF|FFFF|

    Unpatched: a plain move splits no folio.
    Patched: both flags split the folio at the edge and no other; the frames stay, and every page is found.
    """
    with _folios(4) as (area, source, pages):
        part, rest = source.part(first, source.pages - first), source.part(0, first)
        before = pagemap.pfns(part.address, part.pages)
        result = move_or_refused(relocate, area, part, area.page(8 * pages), flags)
        if result is not None:
            assert pagemap.pfns(result.address, result.pages) == before, "the move changed frames"
            edge = not flags  # a plain move splits nothing
            wanted = [edge] * (pages - first) + [True] * 3 * pages
            assert _large(result) == wanted, f"large folios are at {_large(result)}, expected {wanted}"
            assert_found(result, rest)


@ways
@pytest.mark.parametrize("dropped", ["first", "middle", "last"])
def test_a_dropped_part(relocate: bool, flags: int, dropped: str) -> None:
    """Row 80 (mthp-inside): large folios move, one page of which was unmapped (MADV_DONTNEED).

    The index of a folio is that of its first page, also where this page is not mapped.

    Unpatched: after a plain move every page is found.
    Patched: the same with either flag.
    """
    with _folios(2) as (area, source, pages):
        index = {"first": 0, "middle": 2, "last": pages - 1}[dropped]
        source.part(index).madvise(MADV_DONTNEED)
        source.contents[index] = ZERO
        result = move_or_refused(relocate, area, source, area.page(4 * pages), flags)
        if result is not None:
            assert_found(result)


@ways
def test_a_stranger_between_the_pages_of_a_folio(relocate: bool, flags: int) -> None:
    """Rows 80 (mthp-inside) and 82 (scattered): a large folio moves in whose place of one page a small page is mapped.

    The small page may turn out to be busy or pinned when half of the folio has been relocated. So the kernel splits the
    folio before it relocates it.

    ::

        before    |FFsFFFFF|FFFFFFFF|
        after                               |ffsfffff|FFFFFFFF|

    Unpatched: a plain move splits no folio.
    Patched: both flags split this folio and not the next one; every page is found.
    """
    with _folios(2) as (area, source, pages):
        source.part(2, 1).madvise(MADV_DONTNEED)
        stamp(source)
        assert _large(source) == [index != 2 for index in range(source.pages)], "page 2 is not a small page"
        before = pagemap.pfns(source.address, source.pages)
        result = move_or_refused(relocate, area, source, area.page(4 * pages), flags)
        if result is not None:
            assert pagemap.pfns(result.address, result.pages) == before, "the move changed frames"
            wanted = [not flags and index != 2 for index in range(pages)] + [True] * pages
            assert _large(result) == wanted, f"large folios are at {_large(result)}, expected {wanted}"
            assert_found(result)


# --- pins --------------------------------------------------------------------------------------------------------


@lenient_ways
def test_a_pinned_huge_page(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 74 (pinned-thp): a pinned huge page moves plainly and with flag 8.

    Unpatched: a plain move; a PMD still maps it.
    Patched: the same with flag 8.
    """
    with pin_in_the_way(relocate, scene.at(0, 7), flags):
        result = move_or_refused(relocate, scene.area, scene.source, scene.at(4), flags)
    if result is not None:
        assert huge_kb(result) == result.length >> 10, "a pinned huge page was split"
        assert_found(result)


def test_a_pinned_huge_page_is_refused(relocate: bool, scene: Scene) -> None:
    """Row 74 (pinned-thp): a pinned huge page is to move with flag 16.

    Unpatched: EINVAL; a PMD still maps it.
    Patched: EFAULT; a PMD still maps it, and it is found after the pin is gone.
    """
    with pinned(scene.at(0, 7)), counted(relocate, relocated=0, refused_pinned=1, undone=0):
        refused_move(relocate, scene.area, scene.source, scene.at(4))
        assert huge_kb(scene.source) == scene.source.length >> 10, "a refused relocation split a huge page"
    assert_found(scene.source)


@pytest.mark.parametrize("half", [0, 1], ids=["first", "second"])
def test_half_of_a_pinned_huge_page(relocate: bool, scene: Scene, half: int) -> None:
    """Rows 74 (pinned-thp) and 78 (thp-half): one half of a pinned huge page is to move with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, whichever half has the pin: a pinned folio cannot be split. Small entries map it now, because its
    mapping is split before the pin is seen; nothing else changes.
    """
    count = scene.pages // 2
    part = scene.source.part(half * count, count)
    with pinned(scene.at(0, 7)):
        before = State.of(scene.area)
        assert before.huge_kb, "no PMD maps the huge page"
        refusal = errno.EFAULT if relocate else errno.EINVAL
        fails(refusal, lambda: move(part, scene.at(4), MREMAP_MUST_RELOCATE_ANON), "a move with flag 16")
        wanted = replace(before, huge_kb=0) if relocate else before
        wanted.expect(scene.area, "a refused relocation")
    assert_found(scene.source.check())


# --- copy on write -----------------------------------------------------------------------------------------------


@lenient_ways
@pytest.mark.parametrize("mover", ["part", "rest"])
def test_copy_on_write(relocate: bool, scene: Scene, flags: int, mover: str) -> None:
    """Row 90 (cow-suite): after one half of a huge page has moved, a child gives one of its pages to a pipe and unmaps
    it, and the parent writes to that page.

    ::

        parent     move half ── fork ──────────────────────── write
        child                     └─ page into pipe, unmap ──────── read the pipe: as before

    Unpatched: after a plain move the pipe holds what the page held before the write.
    Patched: the same with flag 8.
    """
    count = scene.pages // 2
    part, rest = scene.source.part(0, count), scene.source.part(count, count)
    result = move_or_refused(relocate, scene.area, part, scene.at(4), flags)
    if result is None:
        return
    looked_at = result if mover == "part" else rest
    with Child() as child:
        child.call(_give_away, looked_at)
        expected = looked_at.read(3)
        looked_at.write(3, b"written after the fork")
        assert child.call(_taken_back) == expected, "a write of the parent is seen in a page that the child gave away"
        looked_at.check()
    assert_found(result, rest)


_pipe: list[Spliced] = []


def _give_away(mapping: Mapping) -> None:
    _pipe.append(Spliced(mapping.page(3)))
    mapping.unmap()


def _taken_back() -> bytes:
    with _pipe.pop() as pipe:
        return pipe.read(PAGE_SIZE)
