# SPDX-License-Identifier: GPL-2.0
"""Page-table formats of the architectures we audit, as data, and the walk down them.

From arch/x86/include/asm/pgtable_types.h and pgtable_64.h, arch/arm64/include/asm/pgtable-prot.h, pgtable-hwdef.h and
pgtable.h of Linux 6.12 and 7.3. Physical addresses above 256 TiB are not decoded, nor arm64's PROT_NONE before 6.11.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

_ADDRESS = (1 << 48) - 1


#: reads a part of a table: its physical address, offset and size in bytes, and the first virtual address it is for
Table = Callable[[int, int, int, int], bytes]


class Kind(Enum):
    """What an entry is."""

    NONE = 0
    TABLE = 1
    #: maps memory, at whatever level
    PAGE = 2
    #: not empty and not present: swap, migration, a marker
    ABSENT = 3


@dataclass(frozen=True, slots=True)
class Entry:
    """A decoded entry."""

    kind: Kind
    #: of the page, or of the next table, in kernel pages
    pfn: int = 0
    #: bytes the entry covers
    size: int = 0
    #: maps memory that has no reverse map: the zero page, devices
    special: bool = False
    #: as pte_write() says, whether it is clean (arm64's PTE_RDONLY) or not
    writable: bool = False
    #: of an absent entry
    swap_type: int = 0


@dataclass(frozen=True)
class Format:
    """How one kernel's page tables are laid out.

    :param x86: else arm64.
    :param page_shift: log2 of the kernel's page size, which is also the size of a table.
    :param levels: number of tables on the way to a page.
    :param bits: of the addresses they translate.
    """

    x86: bool
    page_shift: int
    levels: int
    bits: int

    @classmethod
    def for_x86(cls, five_levels: bool) -> Format:
        """4 KiB pages, 48 or 57 bits."""
        return cls(True, 12, 5 if five_levels else 4, 57 if five_levels else 48)

    @classmethod
    def for_arm64(cls, page_size: int, bits: int) -> Format:
        """Pages of 4, 16 or 64 KiB; ``bits`` as the hardware translates them (TCR_EL1.T0SZ)."""
        shift = page_size.bit_length() - 1
        return cls(False, shift, -(-(bits - shift) // (shift - 3)), bits)

    @property
    def user_end(self) -> int:
        """Where user space ends at the latest: x86 gives the upper half of one tree to the kernel, arm64 none."""
        return 1 << (self.bits - 1 if self.x86 else self.bits)

    def span(self, level: int) -> int:
        """Bytes that one entry covers at a level; the pages' own level is 0."""
        return 1 << (self.page_shift + level * (self.page_shift - 3))

    def entries(self, level: int) -> int:
        """How many entries a table has; the top one may have fewer, or (arm64, 52 bits) more."""
        if level == self.levels - 1:
            return 1 << max(1, self.bits - self.page_shift - level * (self.page_shift - 3))
        return 1 << (self.page_shift - 3)

    def decode(self, value: int, level: int) -> Entry:
        """Understand the entry ``value`` of a table at ``level``."""
        if not value:
            return Entry(Kind.NONE)
        return self._decode_x86(value, level) if self.x86 else self._decode_arm64(value, level)

    def _decode_x86(self, value: int, level: int) -> Entry:
        if not value & 0x101:  # neither _PAGE_PRESENT nor _PAGE_PROTNONE
            # A page-middle entry that is being split keeps _PAGE_PSE and is present (pmd_present()).
            if level and value & 0x80:
                pfn = (~value & _ADDRESS) >> 12 & -(1 << 9 * level)
                return Entry(Kind.PAGE, pfn, self.span(level), False, bool(value & 2))
            return Entry(Kind.ABSENT, swap_type=value >> 59)
        # What is not accessible has its frame number inverted against L1TF (protnone_mask()).
        address = (value if value & 1 else ~value) & _ADDRESS
        if level == 0:
            return Entry(Kind.PAGE, address >> 12, 4096, bool(value & 0x200), bool(value & 2))
        if value & 0x80:
            pfn = address >> 12 & -(1 << 9 * level)
            return Entry(Kind.PAGE, pfn, self.span(level), bool(value & 0x200), bool(value & 2))
        return Entry(Kind.TABLE, address >> 12)

    def _decode_arm64(self, value: int, level: int) -> Entry:
        address = value & _ADDRESS & -(1 << self.page_shift)
        pfn = address >> self.page_shift
        special, writable = bool(value & 1 << 56), bool(value & 1 << 51)
        if value & 1:
            if level and value & 2:
                return Entry(Kind.TABLE, pfn)
            return Entry(Kind.PAGE, pfn, self.span(level), special, writable)
        if value & 1 << 11:  # PTE_PRESENT_INVALID, from 6.11 on: PROT_NONE, or in the middle of being split
            return Entry(Kind.PAGE, pfn, self.span(level), special, writable)
        return Entry(Kind.ABSENT, swap_type=value >> 6 & 31)

    def index(self, address: int, level: int) -> int:
        """The index of an address in a table at a level."""
        return address >> (self.page_shift + level * (self.page_shift - 3)) & (self.entries(level) - 1)

    def walk(self, root: int, address: int, read: Callable[[int], int]) -> Iterator[Entry]:
        """The entries on the way to one address, from the top table down.

        :param read: gives the 64-bit value at a physical address.
        """
        table = root
        for level in reversed(range(self.levels)):
            entry = self.decode(read(table + 8 * self.index(address, level)), level)
            yield entry
            if entry.kind is not Kind.TABLE:
                return
            table = entry.pfn << self.page_shift

    def scan(self, root: int, start: int, end: int, table: Table) -> Iterator[tuple[int, Entry]]:
        """Every entry that maps or holds something between two addresses, in order, with the address it is for.

        :param table: gives the bytes of tables.
        """
        yield from self._scan(root, self.levels - 1, 0, start, end, table)

    def _scan(self, at: int, level: int, base: int, start: int, end: int, table: Table) -> Iterator[tuple[int, Entry]]:
        span = self.span(level)
        first = max(0, (start - base) // span)
        last = min(self.entries(level), -(-(end - base) // span))
        if first >= last:
            return
        count = last - first
        values = struct.unpack(f"<{count}Q", table(at, 8 * first, 8 * count, base))
        for index, value in enumerate(values, first):
            if not value:
                continue
            address = base + index * span
            entry = self.decode(value, level)
            if entry.kind is not Kind.TABLE:
                yield address, entry
            elif level:
                yield from self._scan(entry.pfn << self.page_shift, level - 1, address, start, end, table)
