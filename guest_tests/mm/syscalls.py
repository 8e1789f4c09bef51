# SPDX-License-Identifier: GPL-2.0
"""Raw system calls by ``syscall(2)``: every bit reaches the kernel, and errno comes back as :class:`OSError`.

The C library's own wrappers are not used: its ``mremap()`` forwards ``new_addr`` only for flags it knows, and its
``mmap()`` refuses some arguments before the kernel sees them.

Numbers and constants are those of include/uapi (linux/mman.h, asm-generic/mman-common.h, linux/prctl.h) and of
arch/x86/entry/syscalls/syscall_64.tbl and scripts/syscall.tbl in Linux 7.3.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from typing import Any, Final

# --- numbers -----------------------------------------------------------------------------------------------------

#: numbers of scripts/syscall.tbl, which every architecture without a history of its own uses
_GENERIC: Final = {
    "ioctl": 29,
    "rt_sigtimedwait": 137,
    "prctl": 167,
    "getcpu": 168,
    "munmap": 215,
    "mremap": 216,
    "clone": 220,
    "mmap": 222,
    "swapon": 224,
    "swapoff": 225,
    "mprotect": 226,
    "mlock": 228,
    "munlock": 229,
    "mincore": 232,
    "madvise": 233,
    "mbind": 235,
    "get_mempolicy": 236,
    "set_mempolicy": 237,
    "migrate_pages": 238,
    "move_pages": 239,
    "perf_event_open": 241,
    "memfd_create": 279,
    "userfaultfd": 282,
    "mlock2": 284,
    "pidfd_open": 434,
    "process_madvise": 440,
    "mseal": 462,
}

#: system call numbers by machine (``uname -m``) and name
NUMBERS: Final[dict[str, dict[str, int]]] = {
    "x86_64": {
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "ioctl": 16,
        "mremap": 25,
        "mincore": 27,
        "madvise": 28,
        "clone": 56,
        "rt_sigtimedwait": 128,
        "mlock": 149,
        "munlock": 150,
        "prctl": 157,
        "swapon": 167,
        "swapoff": 168,
        "mbind": 237,
        "set_mempolicy": 238,
        "get_mempolicy": 239,
        "migrate_pages": 256,
        "move_pages": 279,
        "perf_event_open": 298,
        "getcpu": 309,
        "memfd_create": 319,
        "userfaultfd": 323,
        "mlock2": 325,
        "pidfd_open": 434,
        "process_madvise": 440,
        "mseal": 462,
    },
    "aarch64": _GENERIC,
    "riscv64": _GENERIC,
}

# --- constants ---------------------------------------------------------------------------------------------------

PROT_NONE: Final = 0
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
PROT_RW: Final = PROT_READ | PROT_WRITE

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_POPULATE: Final = 0x8000
MAP_HUGETLB: Final = 0x40000
#: fails with EEXIST instead of unmapping what is there (4.17)
MAP_FIXED_NOREPLACE: Final = 0x100000

MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
#: leave the old range mapped, and empty (5.7)
MREMAP_DONTUNMAP: Final = 4
#: rewrite the reverse map so that the moved memory is native to its new place; only in patched kernels
MREMAP_RELOCATE_ANON: Final = 8
#: the same, but fail with EFAULT where that cannot be done; only in patched kernels
MREMAP_MUST_RELOCATE_ANON: Final = 16

MADV_NORMAL: Final = 0
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_REMOVE: Final = 9
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_WIPEONFORK: Final = 18
MADV_KEEPONFORK: Final = 19
#: 5.4
MADV_COLD: Final = 20
#: reclaim now; leaves pages alone that are mapped more than once (5.4)
MADV_PAGEOUT: Final = 21
#: 5.14
MADV_POPULATE_READ: Final = 22
#: 5.14
MADV_POPULATE_WRITE: Final = 23
#: 6.1
MADV_COLLAPSE: Final = 25
#: CONFIG_MEMORY_FAILURE, CAP_SYS_ADMIN
MADV_HWPOISON: Final = 100
#: CONFIG_MEMORY_FAILURE, CAP_SYS_ADMIN; the page frame is lost until the next boot
MADV_SOFT_OFFLINE: Final = 101
#: 6.13
MADV_GUARD_INSTALL: Final = 102
#: 6.13
MADV_GUARD_REMOVE: Final = 103

PR_SET_PDEATHSIG: Final = 1
PR_MCE_KILL: Final = 33
PR_MCE_KILL_CLEAR: Final = 0
PR_MCE_KILL_SET: Final = 1
PR_MCE_KILL_LATE: Final = 0
PR_MCE_KILL_EARLY: Final = 1
PR_MCE_KILL_DEFAULT: Final = 2
PR_MCE_KILL_GET: Final = 34
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_THP_DISABLE: Final = 41
PR_GET_THP_DISABLE: Final = 42
#: 6.4
PR_SET_MEMORY_MERGE: Final = 67
#: 6.4
PR_GET_MEMORY_MERGE: Final = 68
PR_SET_VMA: Final = 0x53564D41
#: CONFIG_ANON_VMA_NAME (5.17)
PR_SET_VMA_ANON_NAME: Final = 0

# --- the call ----------------------------------------------------------------------------------------------------


@functools.cache
def _libc_syscall() -> Any:
    function = ctypes.CDLL(None, use_errno=True).syscall
    # All arguments are declared as full registers: ctypes would otherwise pass Python ints as 32-bit ints and leave
    # the upper half of an address or of a flag word undefined. Integer registers are the same for variadic and
    # ordinary functions on each of these ABIs, so that fixed argtypes are right for the variadic syscall().
    function.argtypes = [ctypes.c_long] + [ctypes.c_ulong] * 6
    function.restype = ctypes.c_long
    return function


def number(name: str) -> int:
    """The number of the system call ``name`` on this machine.

    :raises NotImplementedError: if the machine or the call is not in :data:`NUMBERS`.
    """
    machine = platform.machine()
    try:
        return NUMBERS[machine][name]
    except KeyError:
        raise NotImplementedError(f"no number for {name}() on {machine}: add it to {__name__}.NUMBERS") from None


def call(name: str, *args: int) -> int:
    """Make a system call. The GIL is released meanwhile.

    :param args: up to six integers; negative ones are passed as two's complement of 64 bits.
    :returns: what the kernel returned, never negative.
    :raises OSError: with the kernel's errno; the message names the call and its arguments.
    """
    padded = [*args, 0, 0, 0, 0, 0, 0][:6]
    result: int = _libc_syscall()(number(name), *padded)
    if result == -1:
        code = ctypes.get_errno()
        shown = ", ".join(hex(arg) if arg > 9 else str(arg) for arg in args)
        raise OSError(code, f"{name}({shown}) failed: {errno.errorcode.get(code, '?')} ({os.strerror(code)})")
    return result


def poke(address: int, data: bytes) -> None:
    """Write to memory of this process through /proc/self/mem, which no protection of the mapping need prevent.

    :raises OSError: EIO if the memory cannot be written, or its protection holds.
    """
    fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
    try:
        os.pwrite(fd, data, address)
    finally:
        os.close(fd)


# --- typed wrappers ----------------------------------------------------------------------------------------------


def mmap(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map ``length`` bytes; returns the address."""
    return call("mmap", address, length, prot, flags, fd, offset)


def munmap(address: int, length: int) -> None:
    """Unmap every page that overlaps ``length`` bytes from ``address``; holes are fine."""
    call("munmap", address, length)


def mprotect(address: int, length: int, prot: int) -> None:
    """Change the protection of ``length`` bytes; ENOMEM where something is not mapped."""
    call("mprotect", address, length, prot)


def mremap(old_address: int, old_length: int, new_length: int, flags: int, new_address: int = 0) -> int:
    """Move or resize a mapping, exactly as asked; returns the new address.

    :raises OSError: EINVAL for arguments or flags the kernel does not know, EFAULT for a range that is not mapped
        or may not be treated so, EPERM if sealed, ENOMEM, EAGAIN (mlock limit), EINTR (un-merging of KSM pages was
        interrupted by a signal).
    """
    return call("mremap", old_address, old_length, new_length, flags, new_address)


def madvise(address: int, length: int, advice: int) -> None:
    """Give advice ``MADV_*`` for ``length`` bytes."""
    call("madvise", address, length, advice)


def process_madvise(process: int, address: int, length: int, advice: int) -> int:
    """process_madvise(2) for one range.

    :param process: a descriptor by pidfd_open(2).
    :returns: how many bytes were advised.
    :raises OSError: errno of the call.
    """
    ranges = ctypes.create_string_buffer(struct.pack("=QQ", address, length))
    return call("process_madvise", process, ctypes.addressof(ranges), 1, advice)


def mlock(address: int, length: int) -> None:
    """Fault in and lock ``length`` bytes."""
    call("mlock", address, length)


def munlock(address: int, length: int) -> None:
    """Undo :func:`mlock`."""
    call("munlock", address, length)


def mseal(address: int, length: int) -> None:
    """Seal ``length`` bytes until the process ends: no move, no unmapping (6.10, 64-bit only; ENOSYS before)."""
    call("mseal", address, length, 0)


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """Get or set an attribute ``PR_*`` of the process or thread; EINVAL where the kernel does not know it."""
    return call("prctl", option, arg2, arg3, arg4, arg5)


def set_memory_merge(enable: bool = True) -> None:
    """Offer all memory of this process, present and future, to KSM, or stop doing so (6.4; inherited by fork).

    :raises OSError: EINVAL without CONFIG_KSM or on older kernels.
    """
    prctl(PR_SET_MEMORY_MERGE, int(enable))


def name_anonymous(address: int, length: int, name: str | None) -> None:
    """Name anonymous memory; mappings of different name do not merge.

    :param name: None takes the name away.
    :raises OSError: EINVAL without CONFIG_ANON_VMA_NAME, EBADF for memory of a file.
    """
    text = None if name is None else ctypes.create_string_buffer(name.encode())
    prctl(PR_SET_VMA, PR_SET_VMA_ANON_NAME, address, length, 0 if text is None else ctypes.addressof(text))


def memfd_create(name: str) -> int:
    """An unnamed file in memory; returns its descriptor, closed on exec."""
    return os.memfd_create(name)
