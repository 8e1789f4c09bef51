# SPDX-License-Identifier: GPL-2.0
"""Swap areas of the guest (CONFIG_SWAP)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.vmstat import meminfo


@dataclass(frozen=True)
class Area:
    """One line of /proc/swaps."""

    #: device or file
    path: str
    #: its size in kB
    size: int
    #: how much of it is used, in kB
    used: int


def areas() -> list[Area]:
    """The swap areas in use; none without CONFIG_SWAP."""
    try:
        lines = Path("/proc/swaps").read_text().splitlines()[1:]
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        words = line.split()
        found.append(Area(words[0], int(words[-3]), int(words[-2])))
    return found


def turn_off(area: Area) -> None:
    """Have all that is in a swap area read back, and stop using it (swapoff()).

    :raises OSError: ENOMEM if memory does not suffice.
    """
    path = ctypes.create_string_buffer(area.path.encode())
    syscalls.call("swapoff", ctypes.addressof(path))


def turn_on(area: Area) -> None:
    """Use a swap area again (swapon())."""
    path = ctypes.create_string_buffer(area.path.encode())
    syscalls.call("swapon", ctypes.addressof(path), 0)


def turn_off_and_on(area: Area) -> None:
    """Have all that is in a swap area read back.

    :raises OSError: as for :func:`turn_off`.
    """
    turn_off(area)
    turn_on(area)


def total_kb() -> int:
    """SwapTotal in kB."""
    return meminfo().get("SwapTotal", 0)


def free_kb() -> int:
    """SwapFree in kB."""
    return meminfo().get("SwapFree", 0)


def require_swap(kb: int = 1) -> None:
    """Skip the test unless that many kB of swap are free."""
    if free_kb() < kb:
        pytest.skip(f"needs {kb} kB of free swap, this machine has {free_kb()} kB of {total_kb()} kB")
