# SPDX-License-Identifier: GPL-2.0
"""Places where a page is mapped, and what the page tables hold there."""

from __future__ import annotations

import ctypes
import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from guest_tests.mm import pagemap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE
from guest_tests.mm.proctree import Child

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One page of one address space."""

    #: the virtual address in bytes; rounded down to its page
    address: int
    #: the process that has it mapped; None is the calling one
    child: Child | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "address", self.address & -PAGE_SIZE)

    @property
    def pid(self) -> int:
        """The process that has it mapped."""
        return os.getpid() if self.child is None else self.child.pid

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` in the process of the place; see :meth:`guest_tests.mm.proctree.Child.call`."""
        return function(*args, **kwargs) if self.child is None else self.child.call(function, *args, **kwargs)

    def __str__(self) -> str:
        return f"{self.pid}:{self.address:#x}"


@dataclass(frozen=True)
class Page:
    """A page that is asked for, as it was before the walk."""

    #: its frame number
    pfn: int
    #: where it is asked for
    places: tuple[Place, ...]
    #: what the page tables held there
    before: Mapping[Place, pagemap.Entry]

    @property
    def mapped(self) -> frozenset[Place]:
        """The places that really map it."""
        return frozenset(place for place, entry in self.before.items() if entry.pfn == self.pfn)

    def moved_to(self, after: Mapping[Place, pagemap.Entry]) -> int | None:
        """The frame that the places which mapped it have moved to, or None if they have not moved."""
        frames = Counter(after[place].pfn for place in self.mapped)
        del frames[self.pfn], frames[None]
        return frames.most_common(1)[0][0] if frames else None


def observe(places: Iterable[Place]) -> dict[Place, pagemap.Entry]:
    """What the page tables hold at each of ``places``."""
    return {place: pagemap.entry(place.address, place.pid) for place in places}


def changes(before: Mapping[Place, pagemap.Entry], after: Mapping[Place, pagemap.Entry]) -> str:
    """What became of each place, for the evidence."""
    return ", ".join(f"{place} {old} -> {after[place]}" for place, old in before.items())


def touch(address: int) -> bool:
    """Read the byte at ``address`` of the calling process as its CPU would, after flushing the TLB.

    The accessed bit is set when a translation is loaded, so it stays clear as long as the TLB still has the old one,
    and ageing does not flush (ptep_clear_young_notify(), include/linux/mmu_notifier.h). The byte is read by copying
    from user memory in write(2), which fails where a load would kill.

    :returns: whether the byte could be read.
    """
    _flush_tlb()
    libc = ctypes.CDLL(None, use_errno=True)
    read_end, write_end = os.pipe()
    try:
        if libc.write(write_end, ctypes.c_void_p(address), ctypes.c_size_t(1)) == 1:
            return True
        if ctypes.get_errno() != errno.EFAULT:
            raise OSError(ctypes.get_errno(), f"cannot read {address:#x}")
        return False
    finally:
        os.close(read_end)
        os.close(write_end)


#: Unmapping pages this far apart makes every architecture flush the TLB as a whole rather than page by page (x86: more
#: than 33 pages, arch/x86/mm/tlb.c; arm64: more than one page table of pages, asm/tlbflush.h).
_FAR = 1 << 30


def _flush_tlb() -> None:
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    address = syscalls.mmap(0, _FAR, syscalls.PROT_RW, flags)
    syscalls.madvise(address, _FAR, syscalls.MADV_NOHUGEPAGE)
    for end in (address, address + _FAR - 1):
        ctypes.c_ubyte.from_address(end).value = 1
    syscalls.munmap(address, _FAR)
