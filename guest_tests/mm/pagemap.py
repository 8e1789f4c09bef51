# SPDX-License-Identifier: GPL-2.0
"""What the kernel says of pages in a process: /proc/PID/pagemap and its ``PAGEMAP_SCAN`` ioctl.

Bits as in Documentation/admin-guide/mm/pagemap.rst of Linux 7.3.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest_tests.mm import system
from guest_tests.mm.mapping import PAGE_SIZE

Pid = int | str

#: the bits of an entry that hold the page frame number, or the swap area and slot
FRAME = (1 << 55) - 1
#: the bit that says that a page is present
PRESENT = 1 << 63
#: the bit that says that an entry is not present: of swap, a migration, poison or a guard region
SWAP = 1 << 62
_SWAP_TYPE_BITS = 5  # MAX_SWAPFILES_SHIFT


@dataclass(frozen=True)
class Entry:
    """One page of a process, from the 64 bits that pagemap has for it."""

    #: all of it
    raw: int

    def _bit(self, bit: int) -> bool:
        return bool(self.raw >> bit & 1)

    @property
    def present(self) -> bool:
        """Mapped to a page frame now."""
        return self._bit(63)

    @property
    def swap(self) -> bool:
        """A swap entry, or another entry that is not present: under migration, poisoned, a guard region."""
        return self._bit(62)

    @property
    def file(self) -> bool:
        """A page of a file or of shared anonymous memory (3.5)."""
        return self._bit(61)

    @property
    def guard(self) -> bool:
        """In a guard region (6.15)."""
        return self._bit(58)

    @property
    def uffd_wp(self) -> bool:
        """Write-protected through userfaultfd (5.13)."""
        return self._bit(57)

    @property
    def exclusive(self) -> bool:
        """Certainly mapped only here (4.2); unset says nothing on recent kernels."""
        return self._bit(56)

    @property
    def soft_dirty(self) -> bool:
        """Written to, moved or mapped since soft-dirty bits were cleared; CONFIG_MEM_SOFT_DIRTY."""
        return self._bit(55)

    @property
    def pfn(self) -> int | None:
        """The page frame number, or None if not present. Reads 0 without CAP_SYS_ADMIN."""
        return self.raw & FRAME if self.present else None

    @property
    def swap_type(self) -> int | None:
        """Which swap area (or kind of non-present entry), or None if :attr:`swap` is unset."""
        return self.raw & ((1 << _SWAP_TYPE_BITS) - 1) if self.swap else None

    @property
    def swap_offset(self) -> int | None:
        """The slot in the swap area, in pages, or None if :attr:`swap` is unset."""
        return (self.raw & FRAME) >> _SWAP_TYPE_BITS if self.swap else None

    def __str__(self) -> str:
        if self.present:
            return f"pfn {self.pfn:#x}"
        return f"swap type {self.swap_type} offset {self.swap_offset:#x}" if self.swap else "none"


def words(address: int, pages: int, pid: Pid = "self") -> array.array[int]:
    """The 64 bits of each of ``pages`` pages from ``address``; holes read as zero.

    :raises OSError: if the process is gone or may not be looked at.
    """
    found = array.array("Q")
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(found) < pages:
            got = os.pread(fd, 8 * (pages - len(found)), (address // PAGE_SIZE + len(found)) * 8)
            if not got:
                raise OSError(f"pagemap of process {pid} ends before {address + pages * PAGE_SIZE:#x}")
            found.frombytes(got)
    finally:
        os.close(fd)
    return found


def entries(address: int, pages: int, pid: Pid = "self") -> list[Entry]:
    """The entries of ``pages`` pages from ``address``: see :func:`words`."""
    return [Entry(raw) for raw in words(address, pages, pid)]


def entry(address: int, pid: Pid = "self") -> Entry:
    """The entry of the page at ``address``."""
    return entries(address, 1, pid)[0]


def pfns(address: int, pages: int, pid: Pid = "self") -> list[int | None]:
    """The page frame number of each page, None where nothing is present.

    :raises PermissionError: without CAP_SYS_ADMIN, where the kernel shows zeros instead.
    """
    # Without an Entry for each: tests ask for tens of thousands.
    numbers = [raw & FRAME if raw & PRESENT else None for raw in words(address, pages, pid)]
    if 0 in numbers:
        raise PermissionError(f"pagemap of process {pid} shows no frame numbers: CAP_SYS_ADMIN is needed")
    return numbers


def pfn(address: int, pid: Pid = "self") -> int:
    """The page frame number of the page at ``address``.

    :raises LookupError: if none is present.
    """
    number = pfns(address, 1, pid)[0]
    if number is None:
        raise LookupError(f"no page is present at {address:#x} in process {pid}: {entry(address, pid)}")
    return number


# --- PAGEMAP_SCAN ------------------------------------------------------------------------------------------------

#: _IOWR('f', 16, struct pm_scan_arg), include/uapi/linux/fs.h
PAGEMAP_SCAN = 0xC0606610

PAGE_IS_WPALLOWED = 1 << 0
PAGE_IS_WRITTEN = 1 << 1
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
#: 6.7
PAGE_IS_SOFT_DIRTY = 1 << 7
#: 6.15
PAGE_IS_GUARD = 1 << 8
#: 7.3
PAGE_IS_ACCESSED = 1 << 9


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


class _ScanArg(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("start", ctypes.c_uint64),
        ("end", ctypes.c_uint64),
        ("walk_end", ctypes.c_uint64),
        ("vec", ctypes.c_uint64),
        ("vec_len", ctypes.c_uint64),
        ("max_pages", ctypes.c_uint64),
        ("category_inverted", ctypes.c_uint64),
        ("category_mask", ctypes.c_uint64),
        ("category_anyof_mask", ctypes.c_uint64),
        ("return_mask", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Region:
    """Neighbouring pages of the same categories."""

    #: first address
    start: int
    #: first address behind it
    end: int
    #: those ``PAGE_IS_*`` that were asked for and hold
    categories: int


def soft_dirty(address: int, pages: int, pid: Pid = "self") -> list[bool]:
    """Which of ``pages`` pages are marked as changed since the marks were cleared."""
    return [entry.soft_dirty for entry in entries(address, pages, pid)]


def clear_soft_dirty(address: int, pages: int) -> None:
    """Clear the soft-dirty marks of this process. Skips unless ``pages`` pages, which were written, lose theirs."""
    system.require_config("MEM_SOFT_DIRTY")
    if not any(soft_dirty(address, pages)) and not system.has_config("MEM_SOFT_DIRTY"):
        # arm64 of 7.1.13, whose configuration is not known
        pytest.skip("needs CONFIG_MEM_SOFT_DIRTY=y: the kernel does not mark pages that were written")
    Path("/proc/self/clear_refs").write_text("4")
    if any(soft_dirty(address, pages)):
        pytest.skip("needs CONFIG_MEM_SOFT_DIRTY=y: the kernel does not clear the marks")


def scan(
    address: int,
    pages: int,
    report: int,
    *,
    all_of: int = 0,
    any_of: int = 0,
    inverted: int = 0,
    pid: Pid = "self",
) -> list[Region]:
    """The regions of pages that match, by ``PAGEMAP_SCAN`` (6.7).

    :param report: ``PAGE_IS_*`` to report.
    :param all_of: match only pages in all of these categories.
    :param any_of: match only pages in one of these categories.
    :param inverted: categories that match where they do *not* hold.
    :raises OSError: ENOTTY where the kernel has no such ioctl, EINVAL for a category it does not know.
    """
    regions = (_Region * pages)()
    request = _ScanArg(
        size=ctypes.sizeof(_ScanArg),
        start=address,
        end=address + pages * PAGE_SIZE,
        vec=ctypes.addressof(regions),
        vec_len=pages,
        category_inverted=inverted,
        category_mask=all_of,
        category_anyof_mask=any_of,
        return_mask=report,
    )
    with open(f"/proc/{pid}/pagemap", "rb") as file:
        count = fcntl.ioctl(file, PAGEMAP_SCAN, request)
    return [Region(region.start, region.end, region.categories) for region in regions[:count]]
