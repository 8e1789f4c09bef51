# SPDX-License-Identifier: GPL-2.0
"""Page tables of every page size. The tests build the entries themselves."""

from __future__ import annotations

import struct

import pytest

from harness.arch import ARM64, X86_64, Architecture
from harness.audit.pagetable import Entry, EntryKind, Format


def tables_of(architecture: Architecture, page_size: int, bits: int) -> Format:
    assert architecture.page_tables is not None
    return Format(architecture.page_tables, page_size.bit_length() - 1, bits)


X86 = tables_of(X86_64, 4096, 48)
ARM = {size: tables_of(ARM64, size << 10, 48) for size in (4, 16, 64)}
EVERY = pytest.mark.parametrize(
    "tables",
    [X86, tables_of(X86_64, 4096, 57), *ARM.values(), tables_of(ARM64, 4096, 39), tables_of(ARM64, 65536, 52)],
    ids=["x86", "x86 57", "arm64 4K", "arm64 16K", "arm64 64K", "arm64 4K 39", "arm64 64K 52"],
)


class Tables:
    """Page tables of one process, in a memory of their own."""

    def __init__(self, tables: Format) -> None:
        self.format = tables
        self.memory: dict[int, bytearray] = {}
        self.root = self._new()

    def _new(self) -> int:
        at = (len(self.memory) + 1) << self.format.page_shift
        self.memory[at] = bytearray(8 * max(512, 1 << 13, self.format.entries(self.format.levels - 1)))
        return at

    def map(self, address: int, value: int, level: int = 0) -> None:
        at = self.root
        for each in range(self.format.levels - 1, level, -1):
            place = 8 * self.format.index(address, each)
            (entry,) = struct.unpack_from("<Q", self.memory[at], place)
            if not entry:
                below = self._new()
                entry = below | (0x67 if self.format.form is X86.form else 3)
                struct.pack_into("<Q", self.memory[at], place, entry)
            at = entry & ((1 << 48) - 1) & -(1 << self.format.page_shift)
        struct.pack_into("<Q", self.memory[at], 8 * self.format.index(address, level), value)

    def table(self, at: int, offset: int, size: int, base: int) -> bytes:
        return bytes(self.memory[at][offset : offset + size])

    def scan(self, start: int, end: int) -> list[tuple[int, Entry]]:
        return list(self.format.scan(self.root, start, end, self.table))

    def walk(self, address: int) -> Entry:
        def read(at: int) -> int:
            table = max(base for base in self.memory if base <= at)
            return int(struct.unpack_from("<Q", self.memory[table], at - table)[0])

        return list(self.format.walk(self.root, address, read))[-1]

    def present(self, pfn: int, level: int = 0) -> int:
        """An entry that maps a frame."""
        if self.format.form is X86.form:
            return pfn << 12 | (0x80 if level else 0) | 0x67
        return pfn << self.format.page_shift | (1 if level else 3) | 1 << 10


@pytest.mark.parametrize(
    ("size", "bits", "levels"),
    [(4, 39, 3), (4, 48, 4), (4, 52, 5), (16, 47, 3), (16, 48, 4), (64, 42, 2), (64, 48, 3), (64, 52, 3)],
)
def test_arm64_has_as_many_levels_as_the_address_needs(size: int, bits: int, levels: int) -> None:
    assert tables_of(ARM64, size << 10, bits).levels == levels


@EVERY
def test_each_page_is_found_at_its_address_and_no_other(tables: Format) -> None:
    made = Tables(tables)
    size = 1 << tables.page_shift
    places = [0x7F00_0000_0000 & (1 << tables.bits - 1) - 1, 512 << 20, (512 << 20) + 3 * size]
    places = sorted({at & -size for at in places})
    for number, at in enumerate(places):
        made.map(at, made.present(0x100 + number))
    everything = made.scan(0, 1 << tables.bits - 1)
    assert [(at, entry.pfn, entry.size) for at, entry in everything] == [
        (at, 0x100 + number, size) for number, at in enumerate(places)
    ]
    assert made.scan(places[0], places[0] + size) == everything[:1]
    assert made.scan(places[0] + size, places[1]) == []
    assert [made.walk(at).pfn for at in places] == [0x100, 0x101, 0x102]


@EVERY
def test_a_huge_page_is_one_entry_that_covers_many(tables: Format) -> None:
    made = Tables(tables)
    at = tables.span(1) * 3
    made.map(at, made.present(1 << tables.page_shift - 3, level=1), level=1)
    ((where, entry),) = made.scan(0, 1 << tables.bits - 1)
    assert (where, entry.kind, entry.size) == (at, EntryKind.PAGE, tables.span(1))
    assert entry.pfn == 1 << tables.page_shift - 3


@EVERY
def test_a_range_in_the_middle_of_a_table_gives_that_part(tables: Format) -> None:
    made = Tables(tables)
    size = 1 << tables.page_shift
    for number in range(20):
        made.map(number * size, made.present(number + 1))
    assert [entry.pfn for _, entry in made.scan(5 * size, 9 * size)] == [6, 7, 8, 9]


def test_what_x86_protects_from_all_access_is_present_and_inverted() -> None:
    pfn = 0x1234
    value = ~(pfn << 12) & ((1 << 52) - 1) & ~0xFFF | 0x100
    entry = X86.decode(value, 0)
    assert (entry.kind, entry.pfn) == (EntryKind.PAGE, pfn)


def test_a_huge_page_that_x86_is_splitting_is_present_and_inverted() -> None:
    """pmd_mkinvalid() clears _PAGE_PRESENT and leaves _PAGE_PSE."""
    value = ~(0x1400 << 12) & ((1 << 48) - 1) & -(1 << 21) | 0x80 | 0x2
    assert X86.decode(value, 1) == Entry(EntryKind.PAGE, 0x1400, 2 << 20, writable=True)
    assert X86.decode(0x80, 0).kind is EntryKind.ABSENT, "no such thing on the last level"


def test_the_attribute_below_the_address_of_a_huge_page_is_not_part_of_its_frame() -> None:
    """_PAGE_PAT_LARGE is bit 12."""
    assert X86.decode(0x1400 << 12 | 1 << 12 | 0xE7, 1).pfn == 0x1400


def test_what_arm64_protects_from_all_access_is_present() -> None:
    entry = ARM[16].decode(0x77 << 14 | 1 << 11 | 2, 0)
    assert (entry.kind, entry.pfn) == (EntryKind.PAGE, 0x77)


def test_swap_entries_tell_their_type() -> None:
    assert X86.decode(25 << 59 | 0x1FF << 9, 0) == Entry(EntryKind.ABSENT, swap_type=25)
    assert ARM[4].decode(0x5 << 12 | 25 << 6, 0) == Entry(EntryKind.ABSENT, swap_type=25)


def test_the_zero_page_is_special() -> None:
    assert X86.decode(0x1000 | 0x225, 0).special
    assert ARM[64].decode(1 << 56 | 1 << 16 | 3, 0).special
    assert not X86.decode(0x1000 | 0x25, 0).special


def test_a_page_that_may_be_written_to_says_so_clean_or_dirty() -> None:
    assert X86.decode(0x1000 | 0x67, 0).writable
    assert X86.decode(0x20_0000 | 0xE7, 1).writable
    assert not X86.decode(0x1000 | 0x65, 0).writable, "dirty is not writable"
    for read_only in (0, 1 << 7):  # with PTE_WRITE, PTE_RDONLY means that it is clean
        assert ARM[4].decode(1 << 51 | read_only | 0x1003, 0).writable
        assert not ARM[4].decode(1 << 55 | read_only | 0x1003, 0).writable
    assert ARM[4].decode(1 << 51 | 0x20_0001, 1).writable


def test_nothing_is_nothing() -> None:
    assert X86.decode(0, 0).kind is ARM[4].decode(0, 2).kind is EntryKind.NONE
