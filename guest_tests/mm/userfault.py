# SPDX-License-Identifier: GPL-2.0
"""userfaultfd: registered ranges, and the event of a move."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import struct
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import ZERO, Mapping
from guest_tests.mm.waiting import patience

# include/uapi/linux/userfaultfd.h
_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
#: requests; the argument of each begins with address and length in bytes, and two of them have the mode then
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WRITEPROTECT: Final = 0xC018AA06
#: its argument is destination, source, length in bytes, mode, and room for an answer
UFFDIO_MOVE: Final = 0xC028AA05
WRITEPROTECT_MODE_WP: Final = 1
_MOVE_MODE_ALLOW_SRC_HOLES: Final = 2

MODE_MISSING: Final = 1
#: 5.7
MODE_WP: Final = 2
#: shared memory and hugetlb only (5.13)
MODE_MINOR: Final = 4

#: a move sends an event and waits until it is read
FEATURE_EVENT_REMAP: Final = 1 << 2
#: a fault that would wait ends with SIGBUS (4.14)
FEATURE_SIGBUS: Final = 1 << 7
#: 5.14
FEATURE_MINOR_SHMEM: Final = 1 << 10
#: memory that was never touched can be write-protected (6.4, and on arm64 6.10)
FEATURE_WP_UNPOPULATED: Final = 1 << 13
#: pages can be moved to where they are missing (6.8)
FEATURE_MOVE: Final = 1 << 16

EVENT_PAGEFAULT: Final = 0x12
EVENT_REMAP: Final = 0x14


class _Api(ctypes.Structure):
    _fields_ = (("api", ctypes.c_uint64), ("features", ctypes.c_uint64), ("ioctls", ctypes.c_uint64))


class _Register(ctypes.Structure):
    _fields_ = (
        ("start", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("ioctls", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Event:
    """One message: a fault (``arguments`` = flags, address, thread) or a move (from, to, length in bytes)."""

    #: ``EVENT_*``
    event: int
    #: its three words
    arguments: tuple[int, int, int]


def without_reader() -> Userfault | None:
    """A userfaultfd for a process that serves no faults; None if the kernel cannot write-protect untouched memory.

    A fault that would wait ends with SIGBUS. It can move pages if the kernel has that: see :attr:`Userfault.features`.
    """
    needed = FEATURE_SIGBUS | FEATURE_WP_UNPOPULATED
    for features in (needed | FEATURE_MOVE, needed):
        with contextlib.suppress(OSError):
            return Userfault(features)
    return None


class Userfault:
    """A userfaultfd: a context manager that unregisters everything in the end."""

    def __init__(self, features: int = 0) -> None:
        """Open it and agree on ``FEATURE_*``.

        :raises OSError: ENOSYS without CONFIG_USERFAULTFD, EINVAL for a feature the kernel does not know.
        """
        self.features = features
        self.fd = syscalls.call("userfaultfd", os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            fcntl.ioctl(self.fd, _UFFDIO_API, _Api(api=_API, features=features))
        except OSError:
            os.close(self.fd)
            raise

    def register(self, mapping: Mapping, mode: int = MODE_MISSING) -> None:
        """Have faults of ``mapping`` reported here instead of served by the kernel.

        :raises OSError: EINVAL for memory or a mode that cannot be.
        """
        fcntl.ioctl(self.fd, UFFDIO_REGISTER, _Register(start=mapping.address, length=mapping.length, mode=mode))

    def unregister(self, mapping: Mapping) -> None:
        """Give ``mapping`` back to the kernel."""
        fcntl.ioctl(self.fd, UFFDIO_UNREGISTER, struct.pack("=QQ", mapping.address, mapping.length))

    def write_protect(self, mapping: Mapping, on: bool = True) -> None:
        """Protect ``mapping`` against writes, which are reported here then; or stop that and wake who waits.

        :raises OSError: ENOENT for memory that is not registered for ``MODE_WP``.
        """
        mode = WRITEPROTECT_MODE_WP if on else 0
        fcntl.ioctl(self.fd, UFFDIO_WRITEPROTECT, struct.pack("=QQQ", mapping.address, mapping.length, mode))

    def move(self, source: Mapping, to: int) -> Mapping:
        """Move the pages of ``source`` to ``to``, where none may be present; both stay mapped.

        :returns: the mapping there, with the data that it should hold.
        :raises OSError: EBUSY for pages that are not the process's alone, EEXIST for pages that are present there.
        """
        fcntl.ioctl(self.fd, UFFDIO_MOVE, bytearray(struct.pack("=QQQQq", to, source.address, source.length, 0, 0)))
        moved = Mapping(to, source.pages, list(source.contents))
        source.contents = [ZERO] * source.pages
        return moved

    def move_some(self, source: int, to: int, length: int) -> int:
        """Move the first pages of ``length`` bytes at ``source`` to ``to``: as many as can be moved at this moment.

        There may be holes between them.

        :returns: how much was moved, in bytes.
        :raises OSError: as for :meth:`move`.
        """
        request = bytearray(struct.pack("=QQQQq", to, source, length, _MOVE_MODE_ALLOW_SRC_HOLES, 0))
        try:
            fcntl.ioctl(self.fd, UFFDIO_MOVE, request)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise
        (moved,) = struct.unpack_from("=q", request, 32)
        return max(int(moved), 0)

    def read(self, seconds: float = 5.0) -> Event | None:
        """The next event, or None if there is none in time.

        :param seconds: how long an ordinary machine may take.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        if not poll.poll(patience(seconds) * 1000):
            return None
        event, first, second, third = struct.unpack("=B7xQQQ", os.read(self.fd, 32))
        return Event(event, (first, second, third))

    def close(self) -> None:
        """Close it: the kernel serves all faults again."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
