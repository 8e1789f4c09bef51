# SPDX-License-Identifier: GPL-2.0
"""Page frames as the kernel shows them: /proc/kpageflags and /proc/kpagecount (root only, CONFIG_PROC_PAGE_MONITOR)."""

from __future__ import annotations

import enum
import functools
import os
import struct
from collections.abc import Iterable

from guest_tests.mm import pagemap
from guest_tests.mm.mapping import map_anonymous


class Flag(enum.IntFlag, boundary=enum.KEEP):
    """Bits of a frame (include/uapi/linux/kernel-page-flags.h, include/linux/kernel-page-flags.h, 7.3).

    Bits 32 and up are for kernel developers and may change without notice.
    """

    LOCKED = 1 << 0
    REFERENCED = 1 << 2
    UPTODATE = 1 << 3
    DIRTY = 1 << 4
    LRU = 1 << 5
    ACTIVE = 1 << 6
    SLAB = 1 << 7
    WRITEBACK = 1 << 8
    RECLAIM = 1 << 9
    BUDDY = 1 << 10
    MMAP = 1 << 11
    ANON = 1 << 12
    SWAPCACHE = 1 << 13
    SWAPBACKED = 1 << 14
    COMPOUND_HEAD = 1 << 15
    COMPOUND_TAIL = 1 << 16
    HUGE = 1 << 17
    UNEVICTABLE = 1 << 18
    #: poisoned, or taken away by soft offline
    HWPOISON = 1 << 19
    NOPAGE = 1 << 20
    #: merged by KSM, but not for KSM's zero pages. Wrong unless :func:`tells_ksm`; use guest_tests.mm.ksm.is_ksm
    KSM = 1 << 21
    THP = 1 << 22
    OFFLINE = 1 << 23
    ZERO_PAGE = 1 << 24
    #: set through page_idle and not accessed since; CONFIG_IDLE_PAGE_TRACKING
    IDLE = 1 << 25
    PGTABLE = 1 << 26
    RESERVED = 1 << 32
    MLOCKED = 1 << 33
    OWNER_2 = 1 << 34
    PRIVATE = 1 << 35
    PRIVATE_2 = 1 << 36
    OWNER_PRIVATE = 1 << 37
    ARCH = 1 << 38
    SOFTDIRTY = 1 << 40
    ARCH_2 = 1 << 41
    ARCH_3 = 1 << 42


#: either of them: the frame belongs to a large folio
LARGE = Flag.COMPOUND_HEAD | Flag.COMPOUND_TAIL


def _word(path: str, pfn: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.pread(fd, 8, pfn * 8)
    finally:
        os.close(fd)
    if len(data) != 8:
        raise LookupError(f"{path} has no frame {pfn:#x}")
    (word,) = struct.unpack("=Q", data)
    return int(word)


def flags(pfn: int) -> Flag:
    """The flags of page frame ``pfn``.

    :raises LookupError: if there is no such frame.
    """
    return Flag(_word("/proc/kpageflags", pfn))


def in_large_folios(pfns: Iterable[int]) -> set[int]:
    """Which of these page frames belong to large folios.

    Neighbouring frames are read at once: a huge page has hundreds.

    :raises LookupError: if there is no such frame.
    """
    wanted = sorted(set(pfns))
    found: set[int] = set()
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while wanted:
            first = wanted[0]
            count = next((index for index, pfn in enumerate(wanted) if pfn != first + index), len(wanted))
            data = os.pread(fd, 8 * count, first * 8)
            if not data:
                raise LookupError(f"/proc/kpageflags has no frame {first:#x}")
            words = struct.unpack(f"={len(data) // 8}Q", data)
            found.update(first + index for index, word in enumerate(words) if word & LARGE)
            del wanted[: len(words)]
    finally:
        os.close(fd)
    return found


def flags_at(address: int, pid: pagemap.Pid = "self") -> Flag:
    """The flags of the frame that is present at ``address``.

    :raises LookupError: if none is present.
    """
    return flags(pagemap.pfn(address, pid))


@functools.cache
def tells_ksm() -> bool:
    """Whether :attr:`Flag.KSM` can be trusted. It is not, if it is set for a page that cannot be merged.

    Since dee3d0bef2b0 (6.10) ``stable_page_flags()`` (fs/proc/page.c) sets it for every anonymous page: it tests the
    two bits of ``PAGE_MAPPING_KSM`` for any instead of both. 81401cebfc15 (7.2) is right again.
    """
    scratch = map_anonymous(1).fill()
    try:
        return Flag.KSM not in flags_at(scratch.address)
    finally:
        scratch.unmap()


def mapcount(pfn: int) -> int:
    """How often page frame ``pfn`` is mapped; for large folios a rounded average on kernels that keep only that."""
    return _word("/proc/kpagecount", pfn)


def describe(pfn: int) -> str:
    """A page frame as text for messages: ``pfn 0x1234 ANON|KSM|LRU mapped 2 times``."""
    return f"pfn {pfn:#x} {flags(pfn).name or 'no flags'} mapped {mapcount(pfn)} times"
