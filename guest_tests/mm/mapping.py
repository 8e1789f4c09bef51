# SPDX-License-Identifier: GPL-2.0
"""Reserved address ranges (carve-outs), memory with the data that it should hold (mappings), and moves.

::

    with carve_out(30) as area:
        source = area.map(0, 5).fill()
        moved = move(source, area.page(10))
        moved.check()
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import syscalls
from guest_tests.mm.syscalls import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PROT_NONE,
    PROT_RW,
)

#: bytes in a page: 4096, 16384 or 65536
PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")

# --- contents ----------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _numbered(seed: int, number: int) -> bytes:
    # One seed for both numbers, so that no two pages of different number or seed hold the same bytes.
    return random.Random(seed << 40 | number).randbytes(PAGE_SIZE)


@dataclass(frozen=True)
class Content:
    """The data that one page should hold, every byte of it."""

    #: bytes, repeated to fill the page; empty for a numbered page
    repeated: bytes = b""
    #: family of the numbered page
    seed: int = 0
    #: number of the page within its family
    number: int = 0

    @property
    def data(self) -> bytes:
        """The whole page."""
        if not self.repeated:
            return _numbered(self.seed, self.number)
        return (self.repeated * (PAGE_SIZE // len(self.repeated) + 1))[:PAGE_SIZE]

    def __str__(self) -> str:
        if not self.repeated:
            return f"numbered page {self.number} of seed {self.seed}"
        if len(self.repeated) == 1:
            return f"{self.repeated[0]:#04x} in every byte"
        return "bytes written by the test"


#: the data of memory that was mapped and never written
ZERO: Final = Content(repeated=b"\0")

# --- mappings ----------------------------------------------------------------------------------------------------


@dataclass
class Mapping:
    """A range of mapped pages, and what each should hold.

    It can be pickled and sent to a forked process, where the address has the same meaning.
    """

    #: where it begins, in bytes
    address: int
    #: its length in pages
    pages: int
    #: what each page should hold; None is not checked
    contents: list[Content | None] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self.contents += [None] * (self.pages - len(self.contents))

    @property
    def length(self) -> int:
        """Its length in bytes."""
        return self.pages * PAGE_SIZE

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.address + self.length

    def page(self, index: int) -> int:
        """The address of page ``index``; ``pages`` itself gives the end."""
        if not 0 <= index <= self.pages:
            raise IndexError(f"no page {index} in a mapping of {self.pages} pages")
        return self.address + index * PAGE_SIZE

    @property
    def page_addresses(self) -> list[int]:
        """The address of every page."""
        return [self.page(index) for index in range(self.pages)]

    def part(self, first: int, pages: int = 1) -> Mapping:
        """Some of its pages as a mapping of their own, with what they should hold.

        The two objects are independent: data written through one is unexpected by the other.
        """
        if first < 0 or pages < 1 or first + pages > self.pages:
            raise IndexError(f"no pages {first} to {first + pages - 1} in a mapping of {self.pages} pages")
        return Mapping(self.page(first), pages, self.contents[first : first + pages])

    # -- writing

    def _store(self, index: int, content: Content) -> None:
        ctypes.memmove(self.page(index), content.data, PAGE_SIZE)
        self.contents[index] = content

    def fill(self, seed: int = 0, first_number: int = 0) -> Self:
        """Write a different pattern to every page: each byte follows from ``seed`` and the page's number.

        :param first_number: the number of the first page; the following ones count up.
        """
        for index in range(self.pages):
            self._store(index, Content(seed=seed, number=first_number + index))
        return self

    def fill_same(self, byte: int = 0x77) -> Self:
        """Write the same byte everywhere, so that KSM can merge the pages."""
        for index in range(self.pages):
            self._store(index, Content(repeated=bytes([byte])))
        return self

    def write(self, index: int, data: bytes) -> None:
        """Write ``data``, repeated over the whole page ``index``."""
        if not data:
            raise ValueError("nothing to write")
        self._store(index, Content(repeated=data))

    def touch(self, indices: Iterable[int] | None = None) -> Self:
        """Fault pages in for writing without changing what they hold.

        :param indices: which pages; all by default.
        """
        for index in range(self.pages) if indices is None else indices:
            first = ctypes.c_ubyte.from_address(self.page(index))
            first.value = first.value
        return self

    def touch_read(self, indices: Iterable[int] | None = None) -> Self:
        """Fault pages in for reading: untouched anonymous memory gets the zero page.

        :param indices: which pages; all by default.
        """
        for index in range(self.pages) if indices is None else indices:
            _ = ctypes.c_ubyte.from_address(self.page(index)).value
        return self

    # -- reading

    def read(self, index: int) -> bytes:
        """All bytes of page ``index``."""
        return ctypes.string_at(self.page(index), PAGE_SIZE)

    def check(self) -> Self:
        """Compare every byte of every page with what it should hold.

        :raises AssertionError: naming page, offset, and both bytes.
        """
        for index, content in enumerate(self.contents):
            if content is not None and self.read(index) != content.data:
                raise AssertionError(self._difference(index, content))
        return self

    def _difference(self, index: int, content: Content) -> str:
        actual, expected = self.read(index), content.data
        wrong = [offset for offset in range(PAGE_SIZE) if actual[offset] != expected[offset]]
        offset = wrong[0]
        text = (
            f"page {index} of mapping {self.address:#x} (at {self.page(index):#x}) holds byte {actual[offset]:#04x} at "
            f"offset {offset}, expected {expected[offset]:#04x}: {len(wrong)} of {PAGE_SIZE} bytes differ"
        )
        for other, candidate in enumerate(self.contents):
            if candidate is not None and candidate != content and candidate.data == actual:
                return f"{text}; it holds what page {other} should hold ({candidate})"
        if not any(actual):
            return f"{text}; the page is all zero, its data ({content}) was lost"
        return f"{text}; it should be {content}"

    # -- the kernel's view

    def madvise(self, advice: int) -> Self:
        """Give ``MADV_*`` advice for all of it."""
        syscalls.madvise(self.address, self.length, advice)
        return self

    def mprotect(self, prot: int) -> Self:
        """Change the protection of all of it."""
        syscalls.mprotect(self.address, self.length, prot)
        return self

    def unmap(self) -> None:
        """Unmap all of it."""
        syscalls.munmap(self.address, self.length)


def map_anonymous(
    pages: int,
    at: int | None = None,
    *,
    prot: int = PROT_RW,
    shared: bool = False,
    flags: int = 0,
) -> Mapping:
    """Map zeroed memory.

    :param pages: how many pages.
    :param at: the exact address, replacing what is there; None lets the kernel choose.
    :param shared: shared with children (shmem) instead of private.
    :param flags: further ``MAP_*`` flags.
    :raises OSError: as mmap(2).
    """
    kind = MAP_SHARED if shared else MAP_PRIVATE
    placed = 0 if at is None else MAP_FIXED
    address = syscalls.mmap(at or 0, pages * PAGE_SIZE, prot, MAP_ANONYMOUS | kind | placed | flags)
    return Mapping(address, pages, [ZERO] * pages)


# --- carve-outs --------------------------------------------------------------------------------------------------

#: pages of reservation on either side of a carve-out that are never handed out
_GUARD = 16
#: carve-outs begin at multiples of this: a multiple of every huge page size below hugetlb's largest
_SLOT = 1 << 30


class CarveOut:
    """A reserved range of addresses in which tests place mappings side by side.

    The reservation is an inaccessible *shared* mapping, so that no anonymous memory merges with it. It begins at a
    multiple of 1 GiB far below the place where the kernel puts new mappings, so that the interpreter's memory does not
    get into holes that moves leave.
    """

    def __init__(self, pages: int) -> None:
        #: its length in pages
        self.pages = pages
        #: its first usable address, a multiple of 1 GiB
        self.address = _reserve(pages)

    def page(self, index: int) -> int:
        """The address of page ``index`` of the carve-out; ``pages`` itself gives the end."""
        if not 0 <= index <= self.pages:
            raise IndexError(f"no page {index} in a carve-out of {self.pages} pages")
        return self.address + index * PAGE_SIZE

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.page(self.pages)

    def map(self, at: int, pages: int, *, prot: int = PROT_RW, shared: bool = False, flags: int = 0) -> Mapping:
        """Map zeroed anonymous memory ``pages`` long at page ``at`` of the carve-out, replacing what is there."""
        self._within(at, pages)
        return map_anonymous(pages, self.page(at), prot=prot, shared=shared, flags=flags)

    def map_file(self, at: int, pages: int, fd: int, *, offset: int = 0, shared: bool = False) -> Mapping:
        """Map ``pages`` of a file from byte ``offset`` at page ``at``, for reading and writing."""
        self._within(at, pages)
        flags = MAP_FIXED | (MAP_SHARED if shared else MAP_PRIVATE)
        return Mapping(syscalls.mmap(self.page(at), pages * PAGE_SIZE, PROT_RW, flags, fd, offset), pages)

    def hole(self, at: int, pages: int) -> None:
        """Unmap some pages, so that nothing is mapped there."""
        self._within(at, pages)
        syscalls.munmap(self.page(at), pages * PAGE_SIZE)

    def reserve(self, at: int, pages: int) -> None:
        """Unmap some pages and reserve their addresses again."""
        self._within(at, pages)
        _map_reservation(self.page(at), pages * PAGE_SIZE, MAP_FIXED)

    def close(self) -> None:
        """Unmap everything in it."""
        syscalls.munmap(self.address - _GUARD * PAGE_SIZE, (self.pages + 2 * _GUARD) * PAGE_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _within(self, at: int, pages: int) -> None:
        if at < 0 or pages < 1 or at + pages > self.pages:
            raise IndexError(f"pages {at} to {at + pages - 1} are not in a carve-out of {self.pages} pages")


def carve_out(pages: int) -> CarveOut:
    """Reserve ``pages`` of address space; a context manager that unmaps all of it at the end."""
    return CarveOut(pages)


def _map_reservation(address: int, length: int, how: int) -> int:
    return syscalls.mmap(address, length, PROT_NONE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE | how)


@functools.cache
def _first_slot() -> int:
    # Half of where the kernel puts mappings now: below them and below a position-independent executable, with room
    # on either side, whatever the size of the address space.
    probe = syscalls.mmap(0, PAGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS)
    syscalls.munmap(probe, PAGE_SIZE)
    return probe // 2 // _SLOT * _SLOT


def _reserve(pages: int) -> int:
    length = (pages + 2 * _GUARD) * PAGE_SIZE
    for slot in range(1024):
        address = _first_slot() + slot * _SLOT
        try:
            _map_reservation(address - _GUARD * PAGE_SIZE, length, MAP_FIXED_NOREPLACE)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        else:
            return address
    raise MemoryError(f"no place for a carve-out of {pages} pages: 1024 are in use")


# --- moves -------------------------------------------------------------------------------------------------------


def move(mapping: Mapping, to: int | None, flags: int = 0, *, pages: int | None = None) -> Mapping:
    """Move ``mapping`` by the raw system call.

    :param to: the exact new address (``MREMAP_FIXED`` is added); None lets the kernel stay or choose.
    :param flags: further ``MREMAP_*`` flags; ``MREMAP_MAYMOVE`` is always added.
    :param pages: the new length in pages; unchanged by default. New pages are expected to be zero.
    :returns: the mapping at its new place, with the data that it should hold. Do not use the old object afterwards,
        except with ``MREMAP_DONTUNMAP``: then it is expected to be zero.
    :raises OSError: as :func:`guest_tests.mm.syscalls.mremap`; the old object is still valid.
    """
    pages = mapping.pages if pages is None else pages
    flags |= MREMAP_MAYMOVE | (0 if to is None else MREMAP_FIXED)
    address = syscalls.mremap(mapping.address, mapping.length, pages * PAGE_SIZE, flags, to or 0)
    if to is not None and address != to:
        raise AssertionError(f"mremap() was told to move to {to:#x} but says that it moved to {address:#x}")
    contents: Sequence[Content | None] = mapping.contents
    moved = Mapping(address, pages, [*contents[:pages], *[ZERO] * (pages - mapping.pages)])
    if flags & MREMAP_DONTUNMAP:
        mapping.contents = [ZERO] * mapping.pages
    return moved
