# SPDX-License-Identifier: GPL-2.0
"""Moves of two pages to 2 GB, across page tables of every level, and within one mapping: rows 88 and 89."""

from __future__ import annotations

import array
import ctypes

import pytest

from guest_tests.mm import pagemap, swap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE, Mapping, carve_out, move
from guest_tests.mm.probes.ageing import drain
from guest_tests.mm.syscalls import MAP_NORESERVE
from guest_tests.support.checks import counted
from guest_tests.support.folios import stamp, thp
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused, unknown_flags, ways

pytestmark = pytest.mark.shared_guest


class _Bulk:
    """Memory in which every byte follows from its offset. Fast, because it is written in megabytes."""

    _BLOCK = 1 << 20

    def __init__(self, address: int, length: int) -> None:
        self.address, self.length = address, length
        pattern = bytes(range(251)) * (self._BLOCK // 251 + 1)
        self._pattern = pattern[: self._BLOCK]

    def _expected(self, offset: int) -> bytes:
        size = min(self._BLOCK, self.length - offset)
        words = memoryview(bytearray(self._pattern[:size])).cast("Q")
        step = PAGE_SIZE // 8
        first = offset // PAGE_SIZE
        words[::step] = memoryview(array.array("Q", range(first, first + size // PAGE_SIZE)))
        return words.tobytes()

    def fill(self) -> None:
        """Write all of it."""
        for offset in range(0, self.length, self._BLOCK):
            data = self._expected(offset)
            ctypes.memmove(self.address + offset, data, len(data))

    def check(self, address: int) -> None:
        """Compare every byte, after a move to ``address``."""
        for offset in range(0, self.length, self._BLOCK):
            data = self._expected(offset)
            actual = ctypes.string_at(address + offset, len(data))
            if actual != data:
                wrong = next(i for i, (a, b) in enumerate(zip(actual, data, strict=True)) if a != b)
                raise AssertionError(
                    f"byte {offset + wrong:#x} of {self.length:#x} at {address:#x} is {actual[wrong]:#x}"
                )

    def sample(self, address: int) -> Mapping:
        """At most 96 pages from the middle."""
        pages = self.length // PAGE_SIZE
        count = min(pages, 96)
        return Mapping(address + (pages - count) // 2 * PAGE_SIZE, count)


def _refused(source: Mapping, to: int, flags: int) -> None:
    """Assert that a kernel without relocation refuses the flags. Checks only the first page, because there are many."""
    before = pagemap.pfn(source.touch([0]).address)
    unknown_flags(source, to, flags)
    assert pagemap.pfn(source.address) == before, "a refused move changed the first page"


_MB = 1 << 20
#: length; offsets of source and destination from a multiple of 1 GiB; whether huge pages are used
_SIZES = [
    pytest.param(8 << 10, 1 << 12, 99 << 12, False, id="8KB-by-pages"),
    pytest.param(1 * _MB, 1 << 12, 2 * _MB, False, id="1MB-by-pages"),
    pytest.param(1 * _MB, 1 * _MB, 5 * _MB, False, id="1MB-by-megabytes"),
    pytest.param(2 * _MB, 0, 6 * _MB, True, id="2MB-aligned-thp"),
    pytest.param(2 * _MB, 1 * _MB, 6 * _MB, False, id="2MB-across-page-tables"),
    pytest.param(4 * _MB, 1 << 16, 9 * _MB, True, id="4MB-by-pages-thp"),
    pytest.param(16 * _MB, 0, 1024 * _MB, True, id="16MB-to-another-PUD-thp"),
    pytest.param(8 * _MB, 1020 * _MB, 40 * _MB, False, id="8MB-across-two-PUDs"),
    pytest.param(64 * _MB, 2 * _MB, 104 * _MB, True, id="64MB-behind-40MB-thp"),
]


@ways
@pytest.mark.parametrize(("length", "start", "to", "huge"), _SIZES)
def test_lengths(relocate: bool, length: int, start: int, to: int, huge: bool, flags: int) -> None:
    """Row 88 (size-matrix): moves of two pages to 64 MB, across page tables of every level, with and without huge
    pages.

    Unpatched: after a plain move every byte is right, a sample of pages is found, and memory before the destination is
    intact.
    Patched: the same with either flag.
    """
    length, start, to = (-(-number // PAGE_SIZE) * PAGE_SIZE for number in (length, start, to))
    with thp("always" if huge else "madvise"), carve_out((1 << 31) // PAGE_SIZE) as area:
        source = area.map(start // PAGE_SIZE, length // PAGE_SIZE)
        source.contents = [None] * source.pages
        if flags and not relocate:
            _refused(source, area.address + to, flags)
            return
        bulk = _Bulk(source.address, length)
        bulk.fill()
        below = source.end if start < to else area.address
        room = min(16, (area.address + to - below) // PAGE_SIZE)
        preamble = area.map(to // PAGE_SIZE - room, room).fill()
        result = move(source, area.address + to, flags)
        ends = 16 if result.pages > 200 else 0
        parts = [bulk.sample(result.address)]
        if ends:
            parts += [Mapping(result.address, ends), Mapping(result.end - ends * PAGE_SIZE, ends)]
        assert_found(*parts)
        bulk.check(result.address)
        preamble.check()


#: One page in 509 is present: one or two in each page table of small pages, at different indexes.
_SPARSE = 509


@ways
@pytest.mark.parametrize(
    ("start", "to"),
    [(0, 3 << 30), (2 * _MB, (3 << 30) + 8 * _MB), (_MB, (3 << 30) + 6 * _MB), (1 << 16, (3 << 30) + (3 << 16))],
    ids=["by-gigabytes", "by-2MB", "across-page-tables", "by-pages"],
)
def test_two_gigabytes(relocate: bool, start: int, to: int, flags: int) -> None:
    """Row 88 (size-matrix): a move of 2 GB with other memory 40 MB before the destination. It ends by swapping out the
    whole range in one call.

    The range is larger than the guest's memory and has one page in 509 present, so that it has many page tables and few
    pages.

    ::

        0                 2 GB       3 GB-40 MB  3 GB                 5 GB
        |.......source.......|           |preamble|.......target.......|
         x   x   x   x   x   x            x       x x   x   x   x   x   x      present

    Unpatched: after a plain move all pages hold their data, a sample of pages is found, and all go to swap and come
    back.
    Patched: the same with either flag; as many pages are counted as relocated as were present.
    """
    length = 2 << 30
    with thp("madvise"), carve_out((6 << 30) // PAGE_SIZE) as area:
        source = area.map(start // PAGE_SIZE, length // PAGE_SIZE, flags=MAP_NORESERVE)
        source.contents = [None] * source.pages
        if flags and not relocate:
            _refused(source, area.address + to, flags)
            return
        present = range(0, source.pages, _SPARSE)
        for index in present:
            ctypes.c_uint64.from_address(source.page(index)).value = index + 1
        preamble = stamp(area.map((to - 40 * _MB) // PAGE_SIZE, 40 * _MB // PAGE_SIZE).part(0, 4))
        with counted(relocate, **({"relocated": 1, "relocated_pages": len(present)} if flags else {})):
            result = move(source, area.address + to, flags)

        def wrong() -> list[int]:
            return [i for i in present if ctypes.c_uint64.from_address(result.page(i)).value != i + 1]

        assert not wrong(), f"{len(wrong())} of {len(present)} pages have not arrived: {wrong()[:8]}"
        middle = len(present) // 2
        assert_found(*(result.part(index) for index in (*present[:8], *present[middle:][:8], *present[-8:])))
        preamble.check()
        if swap.free_kb() > len(present) * PAGE_SIZE >> 9:
            drain()
            for _ in range(3):
                result.madvise(syscalls.MADV_PAGEOUT)
            left = [index for index in present if pagemap.entry(result.page(index)).present]
            assert not left, f"MADV_PAGEOUT leaves {len(left)} of {len(present)} pages where they are: {left[:8]}"
            assert not wrong(), f"{len(wrong())} of {len(present)} pages came back wrong from swap: {wrong()[:8]}"


@ways
@pytest.mark.parametrize("within", [False, True], ids=["from-start", "within"])
def test_within_a_range(relocate: bool, flags: int, within: bool) -> None:
    """Row 89 (within-range): a megabyte of a mapping moves onto another part of the same mapping.

    ::

        MB        0       1       2       3       4
        before    |................sssssssssssssss|
        after     |sssssssssssssss|.......hole....|        from-start

    Unpatched: after a plain move a sample of the moved pages and of the rest is found, with the right data.
    Patched: the same with either flag.
    """
    pages = _MB // PAGE_SIZE
    with thp("madvise"), carve_out(4 * pages) as area:
        whole = stamp(area.map(0, 4 * pages))
        at, to = (3 * pages, pages) if within else (2 * pages, 0)
        part = whole.part(at, pages)
        result = move_or_refused(relocate, area, part, area.page(to), flags)
        if result is None:
            whole.part(0, 4).check()
            return
        rest = [
            whole.part(index, 1)
            for index in range(0, 4 * pages, pages // 3)
            if not (at <= index < at + pages or to <= index < to + pages)
        ]
        for each in rest:
            each.check()
        few = pages // 4
        assert_found(result.part(0, few), result.part(pages - few, few), *rest)
