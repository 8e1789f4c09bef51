# SPDX-License-Identifier: GPL-2.0
"""SIGBUS for poisoned memory, with its code and address (CONFIG_MEMORY_FAILURE).

Two kinds arrive, see ``kill_proc()`` in mm/memory-failure.c of Linux 7.3:

``MCEERR_AO``
    Sent early to processes that asked for it (:func:`early_kill`) and map the page. It may be blocked, so that
    :class:`Watch` can collect it later.
``MCEERR_AR``
    Forced on the process that touches a poisoned page, and on the one that injects the error if it maps the page. A
    forced signal that is blocked or ignored kills, so that the injecting process should not be the watching one.
"""

from __future__ import annotations

import ctypes
import errno
import signal
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import syscalls
from guest_tests.mm.waiting import patience

#: "action required": the page was about to be consumed (include/uapi/asm-generic/siginfo.h)
MCEERR_AR: Final = 4
#: "action optional": the page was found to be bad before a process used it
MCEERR_AO: Final = 5


@dataclass(frozen=True)
class Sigbus:
    """One SIGBUS."""

    #: ``MCEERR_AO``, ``MCEERR_AR``, or another ``si_code``
    code: int
    #: where the lost memory was mapped in this process, in bytes
    address: int
    #: the size of the lost memory as a power of two, in bytes
    address_lsb: int


def early_kill(enable: bool = True) -> None:
    """Ask the kernel to signal this thread when a page is poisoned, instead of when the page is touched.

    :raises OSError: EINVAL without CONFIG_MEMORY_FAILURE.
    """
    how = syscalls.PR_MCE_KILL_EARLY if enable else syscalls.PR_MCE_KILL_DEFAULT
    syscalls.prctl(syscalls.PR_MCE_KILL, syscalls.PR_MCE_KILL_SET, how)


class _Siginfo(ctypes.Structure):
    # 64-bit layout: the union begins at offset 16, the whole is 128 bytes.
    _fields_ = (
        ("signo", ctypes.c_int),
        ("errno", ctypes.c_int),
        ("code", ctypes.c_int),
        ("_pad", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("address_lsb", ctypes.c_short),
        ("_rest", ctypes.c_char * 102),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


class Watch:
    """Collects SIGBUS in this thread: a context manager that blocks the signal and asks for it early."""

    def __enter__(self) -> Self:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        early_kill()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        early_kill(False)
        while self.wait(0) is not None:
            pass  # a pending one would kill when unblocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])

    def wait(self, seconds: float = 5.0) -> Sigbus | None:
        """The next SIGBUS, or None if there is none in time.

        :param seconds: how long an ordinary machine may take; 0 only looks.
        """
        return take(patience(seconds) if seconds else 0.0)


def take(seconds: float) -> Sigbus | None:
    """Take a pending SIGBUS, which must be blocked, by ``rt_sigtimedwait(2)``.

    Python's own function does not return the address.

    :param seconds: how long to wait, not scaled.
    """
    mask = ctypes.c_uint64(1 << (signal.SIGBUS - 1))
    info = _Siginfo()
    end = time.monotonic() + seconds
    while True:
        left = max(0.0, end - time.monotonic())
        limit = _Timespec(int(left), int(left % 1 * 1e9))
        try:
            syscalls.call(
                "rt_sigtimedwait",
                ctypes.addressof(mask),
                ctypes.addressof(info),
                ctypes.addressof(limit),
                ctypes.sizeof(mask),
            )
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return None
            if error.errno != errno.EINTR:
                raise
        else:
            return Sigbus(info.code, info.address, info.address_lsb)
