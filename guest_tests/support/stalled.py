# SPDX-License-Identifier: GPL-2.0
"""Swap devices whose writes do not end before the test lets them, so that pages stay under writeback.

Whoever wants to migrate or offline such a page locks it and waits (``migrate_folio_unmap()``, mm/migrate.c;
``soft_offline_in_use_page()``, mm/memory-failure.c). So a page can be locked for as long as a test needs.

A device is a loop device of a file in memory. What stalls its writes is another write to the file: the data for that
one is missing by userfaultfd, and while it waits for the data it holds the lock of the inode
(``shmem_file_write_iter()``, mm/shmem.c).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from guest_tests.mm import swap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, map_anonymous
from guest_tests.mm.userfault import Userfault

# include/uapi/linux/loop.h
_SET_FD: Final = 0x4C00
_CLR_FD: Final = 0x4C01
_CTL_GET_FREE: Final = 0x4C82
_CONTROL: Final = "/dev/loop-control"
# include/linux/swap.h
_PREFER: Final = 0x8000


@contextmanager
def stalled_swaps(*slots: int) -> Iterator[list[Callable[[], None]]]:
    """Swap devices of so many pages each, in this order of preference, and no other ones while the block runs.

    :returns: for each a function that lets its writes go on for good. The end of the block does that first.
    """
    system.require_config("SWAP", "BLK_DEV_LOOP", "USERFAULTFD")
    system.require_file(_CONTROL, "BLK_DEV_LOOP=y")
    with ExitStack() as stack:
        # A processor goes on with the device that it used last, whichever is preferred (swap_alloc_fast(), 6.15).
        for area in swap.areas():
            _libc("swapoff", area.path.encode())
            stack.callback(_libc, "swapon", area.path.encode(), 0)
        files = [_device(stack, count, len(slots) - number) for number, count in enumerate(slots)]
        yield [_stall(stack, fd, (count + 1) * PAGE_SIZE) for fd, count in zip(files, slots, strict=True)]


def _device(stack: ExitStack, slots: int, priority: int) -> int:
    """Swap to a new loop device; returns the descriptor of its file, which has a page more than swap uses."""
    file = syscalls.memfd_create("swap")
    stack.callback(os.close, file)
    os.ftruncate(file, (slots + 2) * PAGE_SIZE)
    # union swap_header: version, last page; the signature ends the first page.
    header = bytearray(PAGE_SIZE)
    struct.pack_into("=II", header, 1024, 1, slots)
    header[-10:] = b"SWAPSPACE2"
    os.pwrite(file, header, 0)
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        path = f"/dev/loop{fcntl.ioctl(control, _CTL_GET_FREE)}"
    finally:
        os.close(control)
    device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    stack.callback(os.close, device)
    fcntl.ioctl(device, _SET_FD, file)
    stack.callback(fcntl.ioctl, device, _CLR_FD)
    _libc("swapon", path.encode(), _PREFER | priority)
    stack.callback(_libc, "swapoff", path.encode())
    return file


def _stall(stack: ExitStack, file: int, offset: int) -> Callable[[], None]:
    """Let writes to ``file`` wait until the returned function is called, or the stack is unwound."""
    data = map_anonymous(1)
    stack.callback(data.unmap)
    faults = Userfault()
    faults.register(data)
    buffer = (ctypes.c_char * PAGE_SIZE).from_address(data.address)
    thread = threading.Thread(target=os.pwrite, args=(file, buffer, offset))

    def let_go() -> None:
        if thread.is_alive():
            faults.close()  # the kernel serves the fault then
            thread.join()

    thread.start()
    stack.callback(let_go)
    assert faults.read() is not None, "a write from missing memory causes no fault"
    return let_go


def _libc(name: str, *args: object) -> None:
    library: Any = ctypes.CDLL(None, use_errno=True)
    if library[name](*args):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}{args} failed: {errno.errorcode.get(code, code)}")
