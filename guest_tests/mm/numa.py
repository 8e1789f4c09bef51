# SPDX-License-Identifier: GPL-2.0
"""NUMA nodes: where pages are, and moving them (CONFIG_NUMA, CONFIG_MIGRATION)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from guest_tests.mm import syscalls

_NODES: Final = Path("/sys/devices/system/node")

MPOL_DEFAULT: Final = 0
MPOL_PREFERRED: Final = 1
MPOL_BIND: Final = 2
MPOL_INTERLEAVE: Final = 3
MPOL_LOCAL: Final = 4
#: 5.15
MPOL_PREFERRED_MANY: Final = 5

MPOL_MF_STRICT: Final = 1
#: move pages that only this process maps
MPOL_MF_MOVE: Final = 2
#: also move pages that other processes map; CAP_SYS_NICE
MPOL_MF_MOVE_ALL: Final = 4

_LONG_BITS: Final = 64
_MASK_WORDS: Final = 16
#: what mbind(2) is told of the size of a mask. The kernel takes one less as the number of bits (get_nodes(),
#: mm/mempolicy.c).
MASK_BITS: Final = _MASK_WORDS * _LONG_BITS + 1


def parse_list(text: str) -> list[int]:
    """The numbers in a kernel list such as ``0-2,5``."""
    numbers: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def nodes() -> list[int]:
    """The nodes that have memory; ``[0]`` on a kernel without CONFIG_NUMA."""
    try:
        return parse_list((_NODES / "has_memory").read_text())
    except FileNotFoundError:
        return [0]


def free_kb(node: int) -> int:
    """Free memory of a node in kB."""
    for line in (_NODES / f"node{node}" / "meminfo").read_text().splitlines():
        words = line.split()
        if words[2] == "MemFree:":
            return int(words[3])
    raise LookupError(f"no MemFree for node {node}")


def move_pages(pid: int, addresses: Sequence[int], targets: Sequence[int] | None, flags: int = 0) -> list[int]:
    """Move pages of a process, or ask where they are.

    :param pid: 0 for the caller.
    :param targets: the node for each page; None only asks.
    :param flags: ``MPOL_MF_MOVE`` or ``MPOL_MF_MOVE_ALL``; pages mapped by others too need the latter.
    :returns: for each page its node, or a negative errno: -ENOENT not present, -EFAULT not mapped or the zero page,
        -EBUSY cannot be isolated now, -EACCES mapped by others too, -EINPROGRESS where the kernel gave up at or before
        this page without saying more (do_pages_move(), mm/migrate.c): ask :func:`nodes_of` where it is.
    :raises OSError: as move_pages(2); ENODEV for a node without memory. Pages that did not move are no error.
    """
    count = len(addresses)
    if targets is not None and len(targets) != count:
        raise ValueError(f"{count} addresses but {len(targets)} nodes")
    page_array = (ctypes.c_void_p * count)(*addresses)
    # A status that the kernel does not write would read as "moved to node 0".
    status = (ctypes.c_int * count)(*[-errno.EINPROGRESS] * count)
    node_array = None if targets is None else (ctypes.c_int * count)(*targets)
    syscalls.call(
        "move_pages",
        pid,
        count,
        ctypes.addressof(page_array),
        0 if node_array is None else ctypes.addressof(node_array),
        ctypes.addressof(status),
        flags,
    )
    return list(status)


def nodes_of(addresses: Sequence[int], pid: int = 0) -> list[int]:
    """The node of each page, or a negative errno as :func:`move_pages` gives."""
    return move_pages(pid, addresses, None)


def node_of(address: int, pid: int = 0) -> int:
    """The node of the page at ``address``.

    :raises OSError: ENOENT if none is present (EFAULT before 6.12), EFAULT if nothing is mapped there or it is the zero
        page.
    """
    node = nodes_of([address], pid)[0]
    if node < 0:
        raise OSError(-node, f"no node for the page at {address:#x}: {errno.errorcode[-node]} ({os.strerror(-node)})")
    return node


def mask(chosen: Iterable[int]) -> ctypes.Array[ctypes.c_ulong]:
    """A set of nodes as mbind(2) takes it, together with :data:`MASK_BITS`."""
    words = (ctypes.c_ulong * _MASK_WORDS)()
    for node in chosen:
        words[node // _LONG_BITS] |= 1 << node % _LONG_BITS
    return words


def mbind(address: int, length: int, mode: int, chosen: Iterable[int] = (), flags: int = 0) -> None:
    """Set the memory policy ``MPOL_*`` of ``length`` bytes.

    :param chosen: the nodes that the policy names.
    :raises OSError: as mbind(2); EIO if existing pages do not follow and ``MPOL_MF_STRICT`` was given.
    """
    words = mask(chosen)
    syscalls.call("mbind", address, length, mode, ctypes.addressof(words), MASK_BITS, flags)


def set_mempolicy(mode: int, chosen: Iterable[int] = ()) -> None:
    """Set the memory policy ``MPOL_*`` of this thread."""
    words = mask(chosen)
    syscalls.call("set_mempolicy", mode, ctypes.addressof(words), MASK_BITS)


def migrate_pages(pid: int, sources: Iterable[int], targets: Iterable[int]) -> int:
    """Move all pages of a process from some nodes to others.

    :param pid: 0 for the caller.
    :returns: how many pages could not be moved.
    """
    old, new = mask(sources), mask(targets)
    return syscalls.call("migrate_pages", pid, MASK_BITS, ctypes.addressof(old), ctypes.addressof(new))
