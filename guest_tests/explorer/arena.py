# SPDX-License-Identifier: GPL-2.0
"""The arena: a range of addresses where programs have their memory.

All of this is called thousands of times a second under emulation, so that numbers are looked up once and arrays are
allocated once.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
import struct
from typing import Final

from guest_tests.explorer.calls import Calls
from guest_tests.mm import numa, syscalls
from guest_tests.mm.pagemap import FRAME, PRESENT
from harness.programs.memory import ARENA_PAGES

PAGE: Final = mmap.PAGESIZE
#: Far below the addresses that the kernel chooses for mappings (mmap_base()), and far above the program.
BASE: Final = 1 << 44 if ctypes.sizeof(ctypes.c_void_p) == 8 else 1 << 29
LENGTH: Final = ARENA_PAGES * PAGE


class Arena:
    """The arena of the calling process. A forked process has its own at the same addresses."""

    def __init__(self) -> None:
        self.calls = Calls()
        #: makes one system call, and returns 0 or the errno that it failed with
        self.call = self.calls.call
        #: every byte of it and of the control page; reading where nothing is mapped is a segmentation fault
        self.bytes = memoryview((ctypes.c_char * (LENGTH + PAGE)).from_address(BASE)).cast("B")
        self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._move_pages = syscalls.number("move_pages")
        self._munmap = syscalls.number("munmap")
        # One more than the arena has, for the control page.
        count = ARENA_PAGES + 1
        self._arrays = [bytearray(size * count) for size in (8, 4, 4)]
        self._pointers = [ctypes.addressof(ctypes.c_char.from_buffer(each)) for each in self._arrays]

    def reset(self) -> None:
        """Unmap everything."""
        self.call(self._munmap, BASE, LENGTH)

    def tags(self, start: int, end: int) -> tuple[bytes, bytes]:
        """The first and the last byte of each page of a range."""
        whole = self.bytes
        return bytes(whole[start * PAGE : end * PAGE : PAGE]), bytes(whole[start * PAGE + PAGE - 1 : end * PAGE : PAGE])

    def fill(self, start: int, end: int, tags: bytes) -> None:
        """Write the first and the last byte of each page of a range. The bytes between them are zero and stay so."""
        whole = self.bytes
        whole[start * PAGE : end * PAGE : PAGE] = tags
        whole[start * PAGE + PAGE - 1 : end * PAGE : PAGE] = tags

    def first_wrong(self, start: int, expected: bytes) -> int | None:
        """The first page that holds another byte than it should anywhere; None if all are right."""
        for index, tag in enumerate(expected, start):
            page = bytes(self.bytes[index * PAGE : (index + 1) * PAGE])
            if page[0] != tag or page[-1] != tag or page.count(0, 1, PAGE - 1) != PAGE - 2:
                return index
        return None

    def entries(self, pid: int = 0) -> array.array[int]:
        """What pagemap says of each page of the arena, and of the control page behind it.

        :param pid: the process; 0 for the caller.
        """
        if pid == 0:
            return array.array("Q", os.pread(self._pagemap, 8 * (ARENA_PAGES + 1), BASE // PAGE * 8))
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return array.array("Q", os.pread(fd, 8 * (ARENA_PAGES + 1), BASE // PAGE * 8))
        finally:
            os.close(fd)

    def migrate(self, pid: int, addresses: list[int], nodes: list[int]) -> None:
        """Move pages to nodes, whoever else maps them. What pagemap says then shows which ones moved.

        :param pid: 0 for the caller.
        """
        count = len(addresses)
        struct.pack_into(f"={count}Q", self._arrays[0], 0, *addresses)
        struct.pack_into(f"={count}i", self._arrays[1], 0, *nodes)
        self.call(self._move_pages, pid, count, *self._pointers, numa.MPOL_MF_MOVE_ALL)


def frame(entry: int) -> int:
    """The page frame of an entry of pagemap; 0 if no page is present."""
    return entry & FRAME if entry & PRESENT else 0


def address(page: int) -> int:
    """The address of a page of the arena."""
    return BASE + page * PAGE
