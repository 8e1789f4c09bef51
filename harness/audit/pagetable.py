# SPDX-License-Identifier: GPL-2.0
"""The walk down a kernel's page tables.

What the entries look like is said by each architecture (:class:`harness.arch.model.PageTables`). Physical addresses
above 256 TiB are not decoded.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from harness.arch.model import PageTables

#: reads a part of a table: its physical address, offset and size in bytes, and the first virtual address it is for
Table = Callable[[int, int, int, int], bytes]


class EntryKind(Enum):
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

    kind: EntryKind
    #: frame number of the page or of the next table, in units of the kernel's page size
    pfn: int = 0
    #: bytes the entry covers
    size: int = 0
    #: whether it maps memory that has no reverse map: the zero page, devices
    special: bool = False
    #: what pte_write() says, whether the page is clean (arm64's PTE_RDONLY) or not
    writable: bool = False
    #: the swap type of an absent entry
    swap_type: int = 0


@dataclass(frozen=True)
class Format:
    """How one kernel's page tables are laid out.

    :param form: the architecture's format of entries.
    :param page_shift: log2 of the kernel's page size, which is also the size of a table.
    :param bits: bits of the addresses that the tables translate.
    """

    form: PageTables
    page_shift: int
    bits: int

    @property
    def levels(self) -> int:
        """The number of tables on the way to a page."""
        return -(-(self.bits - self.page_shift) // (self.page_shift - 3))

    @property
    def user_end(self) -> int:
        """Where user space ends at the latest."""
        return 1 << (self.bits - 1 if self.form.kernel_half else self.bits)

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
        form = self.form
        if not value:
            return Entry(EntryKind.NONE)
        if not value & (form.present | form.present_huge if level else form.present):
            return Entry(EntryKind.ABSENT, swap_type=value >> form.swap_type & 31)
        address = (~value if form.inverted and not value & 1 else value) & form.address
        pfn = address >> self.page_shift
        if level:
            if value & form.table_mask == form.table_value:
                return Entry(EntryKind.TABLE, pfn)
            pfn &= -(1 << level * (self.page_shift - 3))  # x86 keeps an attribute below a huge page's address
        return Entry(EntryKind.PAGE, pfn, self.span(level), bool(value & form.special), bool(value & form.writable))

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
            if entry.kind is not EntryKind.TABLE:
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
            if entry.kind is not EntryKind.TABLE:
                yield address, entry
            elif level:
                yield from self._scan(entry.pfn << self.page_shift, level - 1, address, start, end, table)
