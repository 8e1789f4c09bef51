# SPDX-License-Identifier: GPL-2.0
"""The model's memory: what each page of each process of a program should be.

The guest's emulated processor runs this for every operation, so that pages are bytes in ``bytearray`` objects, and
ranges of them are copied and translated rather than looped over.
"""

from __future__ import annotations

from array import array
from typing import Final

from harness.programs.language import PLACES, PROCESSES, SLOTS, Wire

#: pages from one place to the next
PLACE_PAGES: Final = 16
#: pages of the arena, which has the room of a place on both sides of the places
ARENA_PAGES: Final = (PLACES + 2) * PLACE_PAGES

# --- bits of Pages.attr: what the kernel keeps of a mapping, and two that it keeps of a page -----------------------

MAPPED: Final = 1
SHARED: Final = 2
READ: Final = 4
WRITE: Final = 8
MERGEABLE: Final = 16
LOCKED: Final = 32
#: a guard marker
GUARD: Final = 64
#: MADV_FREE was given: either its contents or zeros
LAZY: Final = 128

# --- bits of Pages.more: what happened to a page -------------------------------------------------------------------

#: it was written to, so that it has a page of its own
TOUCHED: Final = 1
#: a fork shared it
FORKED: Final = 2
#: KSM scanned it and may have merged it
MERGED: Final = 4
#: it may have been swapped out
SWAPPED: Final = 8
#: a pipe may hold a reference to it
HELD: Final = 16
#: a userfaultfd write-protects it
PROTECTED: Final = 32

# --- bits of Pages.kept: what else the kernel keeps of a mapping, for which it does not merge it with others --------

DONTFORK: Final = 1
WIPEONFORK: Final = 2
#: it has a memory policy
BOUND: Final = 4
#: it has a name
NAMED: Final = 8
#: it maps a file privately. Its page offset is one in the file, and never changes
FILED: Final = 16
#: it is registered with a userfaultfd
REGISTERED: Final = 32
#: it should have huge pages, or should have none
HUGE: Final = 64
SMALL: Final = 128

#: the home of a page whose page offset may be one or another
UNKNOWN: Final = -1

#: the contents that :data:`Kind.WRITE_SAME` writes; other writes count upwards from here
SAME: Final = 1


def without(bits: int) -> bytes:
    """A translation that clears bits."""
    return bytes(value & ~bits for value in range(256))


def plus(bits: int) -> bytes:
    """A translation that sets bits."""
    return bytes(value | bits for value in range(256))


def where(condition: int, change: bytes) -> bytes:
    """The change for values that have all bits of ``condition``."""
    return bytes(change[value] if value & condition == condition else value for value in range(256))


class Pages:
    """The arena of one process, by page."""

    __slots__ = ("attr", "home", "kept", "more", "slots", "tags")

    def __init__(self) -> None:
        self.attr = bytearray(ARENA_PAGES)
        self.more = bytearray(ARENA_PAGES)
        self.kept = bytearray(ARENA_PAGES)
        #: the byte that a page holds at its beginning and end; of shared memory its number in :attr:`Machine.cells`
        self.tags = bytearray(ARENA_PAGES)
        #: the page of the arena that the page offset of the mapping says; or :data:`UNKNOWN`
        self.home = array("h", range(ARENA_PAGES))
        #: first page and number of pages
        self.slots: list[tuple[int, int] | None] = [None] * SLOTS

    def copy(self) -> Pages:
        """The same pages, independent of these."""
        other = Pages.__new__(Pages)
        other.attr, other.more, other.kept, other.tags = self.attr[:], self.more[:], self.kept[:], self.tags[:]
        other.home, other.slots = self.home[:], self.slots[:]
        return other

    def clear(self, start: int, end: int) -> None:
        """Unmap a range."""
        zeros = bytes(end - start)
        self.attr[start:end] = zeros
        self.more[start:end] = zeros
        self.kept[start:end] = zeros
        self.tags[start:end] = zeros

    def all_have(self, start: int, end: int, bits: int) -> bool:
        """Whether each page of a range has all of ``bits`` in :attr:`attr`."""
        return 0 not in self.attr[start:end].translate(_HAS[bits])

    def none_has(self, start: int, end: int, bits: int) -> bool:
        """Whether no page of a range has any of ``bits`` in :attr:`attr`."""
        return not any(self.attr[start:end].translate(_ONLY[bits]))

    def alike(self, start: int, end: int, bits: int) -> bool:
        """Whether all pages of a range have the same of ``bits``."""
        attr = self.attr[start:end].translate(_ONLY[bits])
        return attr.count(attr[0]) == len(attr)

    def alike_kept(self, start: int, end: int, bits: int) -> bool:
        """Whether all pages of a range have the same of ``bits`` in :attr:`kept`."""
        kept = self.kept[start:end].translate(_ONLY[bits])
        return kept.count(kept[0]) == len(kept)

    def kept_by_none(self, start: int, end: int, bits: int) -> bool:
        """Whether no page of a range has any of ``bits`` in :attr:`kept`."""
        return not any(self.kept[start:end].translate(_ONLY[bits]))

    def more_of_none(self, start: int, end: int, bits: int) -> bool:
        """Whether no page of a range has any of ``bits`` in :attr:`more`."""
        return not any(self.more[start:end].translate(_ONLY[bits]))

    def one_mapping(self, start: int, end: int) -> bool:
        """Whether the pages are probably one mapping: they are uniform, and their page offsets go on."""
        shift = self.home[start] - start
        return self.uniform(start, end) and all(self.home[page] - page == shift for page in range(start, end))

    def uniform(self, start: int, end: int) -> bool:
        """Whether the pages may be one mapping: they differ in nothing that the kernel keeps of a mapping."""
        attr = self.attr[start:end].translate(_ONLY[0xFF & ~(GUARD | LAZY)])
        kept = self.kept[start:end]
        return attr.count(attr[0]) == len(attr) and kept.count(kept[0]) == len(kept)


_ONLY: Final = [bytes(value & bits for value in range(256)) for bits in range(256)]


class Machine:
    """All processes of a program."""

    __slots__ = ("cells", "next_cell", "next_tag", "processes")

    def __init__(self) -> None:
        self.processes: list[Pages | None] = [Pages(), *[None] * (PROCESSES - 1)]
        #: the contents of shared pages, by number
        self.cells = bytearray(256)
        self.next_cell = 1
        #: how many pages were written, in the numbers that tags are made of
        self.next_tag = 0

    def contents(self, pages: Pages, start: int, end: int) -> bytes:
        """The byte that each page of a mapped range should hold."""
        tags = pages.tags[start:end]
        if any(pages.attr[start:end].translate(_ONLY[SHARED])):
            shared = tags.translate(bytes(self.cells))
            return bytes(
                cell if attr & SHARED else tag
                for cell, tag, attr in zip(shared, tags, pages.attr[start:end], strict=True)
            )
        return bytes(tags)


class Step:
    """An operation with its operands resolved to pages of the arena."""

    __slots__ = ("dst", "kind", "new", "pages", "process", "start", "wire")

    def __init__(self, kind: int, process: int, start: int, pages: int, dst: int, new: int, wire: Wire) -> None:
        #: number of the kind
        self.kind = kind
        self.process = process
        #: first page that it is about
        self.start = start
        self.pages = pages
        #: first page of the place that it moves to or maps
        self.dst = dst
        #: how many pages there are afterwards
        self.new = new
        self.wire = wire

    @property
    def end(self) -> int:
        """The page behind the last one."""
        return self.start + self.pages


def runs(pages: Pages, bits: int = MAPPED) -> list[tuple[int, int]]:
    """The ranges of pages that have all of ``bits``, as first page and the page behind the last."""
    has = pages.attr.translate(_HAS[bits])
    found = []
    start = has.find(1)
    while start >= 0:
        end = has.find(0, start)
        if end < 0:
            end = ARENA_PAGES
        found.append((start, end))
        start = has.find(1, end)
    return found


_HAS: Final = [bytes(value & bits == bits for value in range(256)) for bits in range(256)]
