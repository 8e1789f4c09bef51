# SPDX-License-Identifier: GPL-2.0
"""References and pins that a test takes on pages.

A reference does not keep a page from moving with its mapping. A pin promises that the page stays in place for direct
memory access, so that a kernel must not relocate it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import pytest

from guest_tests.mm import system
from guest_tests.mm.mapping import PAGE_SIZE


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


# --- references --------------------------------------------------------------------------------------------------


def vmsplice(pipe: int, address: int, length: int = PAGE_SIZE) -> None:
    """Give the pages of ``length`` bytes of memory to a pipe, by reference (vmsplice(2)).

    :param pipe: the descriptor of its end for writing. It must have room for all of them.
    """
    vector = _Iovec(address, length)
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.vmsplice(pipe, ctypes.byref(vector), ctypes.c_ulong(1), ctypes.c_uint(0))
    if got != length:
        code = ctypes.get_errno()
        raise OSError(code, f"vmsplice() of {length} bytes at {address:#x} gave {got}: {os.strerror(code)}")


class Spliced:
    """A pipe that holds a reference to each of some pages, by vmsplice(2). A context manager that drops them.

    The references make migration fail. When reclaim unmaps such a page, the page stays in the swap cache, because the
    kernel cannot free it (``is_page_cache_freeable()``, mm/vmscan.c). On a slow swap device every page is in this
    state while it is written.

    :param address: the first page's address.
    :param length: how much memory, in bytes.
    """

    def __init__(self, address: int, length: int = PAGE_SIZE) -> None:
        self._read, self._write = os.pipe()
        try:
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, max(length // PAGE_SIZE, 1) * PAGE_SIZE)
            vmsplice(self._write, address, length)
        except BaseException:
            self.close()
            raise

    def read(self, length: int) -> bytes:
        """Take ``length`` bytes out of the pipe: what the pages hold now."""
        return os.read(self._read, length)

    def close(self) -> None:
        """Drop the references."""
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


# --- pins --------------------------------------------------------------------------------------------------------


class _Pinner(Protocol):
    def close(self) -> None:
        """Unpin."""


# These numbers are the same on every architecture.
_IO_URING_SETUP: Final = 425
_IO_URING_REGISTER: Final = 427
_REGISTER_BUFFERS: Final = 0
_UNREGISTER_BUFFERS: Final = 1


def _raw(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number} failed: {errno.errorcode.get(code, code)}")
    return result


class Ring:
    """An io_uring that pins one buffer at a time (CONFIG_IO_URING, sysctl kernel.io_uring_disabled)."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
        self._fd = _raw(_IO_URING_SETUP, ctypes.c_ulong(1), parameters)

    def pin(self, address: int, length: int) -> None:
        """Pin ``length`` bytes as a fixed buffer.

        :raises OSError: EFAULT if the memory is not mapped.
        """
        vector = _Iovec(address, length)
        self._register(_REGISTER_BUFFERS, ctypes.byref(vector), 1)

    def unpin(self) -> None:
        """Undo :meth:`pin`."""
        self._register(_UNREGISTER_BUFFERS, None, 0)

    def close(self) -> None:
        """Close the ring. The kernel may unpin later than this call returns: call :meth:`unpin` first."""
        os.close(self._fd)

    def _register(self, what: int, vector: object, number: int) -> None:
        fd = ctypes.c_ulong(self._fd)
        _raw(_IO_URING_REGISTER, fd, ctypes.c_ulong(what), vector, ctypes.c_ulong(number))


class _RingPin:
    def __init__(self, address: int, length: int) -> None:
        self._ring = Ring()
        try:
            self._ring.pin(address, length)
        except BaseException:
            self._ring.close()
            raise

    def close(self) -> None:
        self._ring.unpin()
        self._ring.close()


_GUP_TEST: Final = "/sys/kernel/debug/gup_test"
# _IOW('g', 7, struct pin_longterm_test) and _IO('g', 8), mm/gup_test.h of Linux 7.3
_PIN_LONGTERM_TEST_START: Final = 0x40186707
_PIN_LONGTERM_TEST_STOP: Final = 0x6708


class _GupTestPin:
    def __init__(self, address: int, length: int) -> None:
        self._fd = os.open(_GUP_TEST, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = b"".join(number.to_bytes(8, "little") for number in (address, length, 1))
            fcntl.ioctl(self._fd, _PIN_LONGTERM_TEST_START, request)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        fcntl.ioctl(self._fd, _PIN_LONGTERM_TEST_STOP)
        os.close(self._fd)


def require_ring() -> None:
    """Skip the test where there is no io_uring."""
    system.require_config("IO_URING")
    try:
        Ring().close()
    except OSError as error:
        pytest.skip(f"needs io_uring, but {error}: CONFIG_IO_URING=y and sysctl kernel.io_uring_disabled=0 bring it")


@contextmanager
def pinned(address: int, length: int = PAGE_SIZE) -> Iterator[None]:
    """Pin memory while the block runs, as for direct memory access. Skips the test where nothing can pin.

    The pin is made by gup_test where the kernel has it (CONFIG_GUP_TEST), else by an io_uring fixed buffer, which moves
    memory out of CMA areas first (folio_is_longterm_pinnable(), include/linux/mm.h). So look at frames in the block.
    """
    pin: _Pinner
    if Path(_GUP_TEST).exists():
        pin = _GupTestPin(address, length)
    else:
        require_ring()
        pin = _RingPin(address, length)
    try:
        yield
    finally:
        pin.close()
