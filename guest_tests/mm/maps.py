# SPDX-License-Identifier: GPL-2.0
"""Address ranges as the kernel shows them: /proc/PID/maps (fast), /proc/PID/smaps (slow), ``PROCMAP_QUERY``.

The offset of an anonymous mapping reads 0 in all of them: its ``vm_pgoff`` is not visible from user space.
"""

from __future__ import annotations

import ctypes
import fcntl
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

Pid = int | str

_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")


@dataclass(frozen=True)
class Vma:
    """One mapping, as the kernel shows it."""

    #: its first address, in bytes
    start: int
    #: the first address behind it
    end: int
    #: like ``rw-p``
    perms: str
    #: byte offset in the file; 0 for anonymous memory
    offset: int
    #: device of the file, ``major:minor`` in hexadecimal
    dev: str
    #: inode of the file; 0 for anonymous memory
    inode: int
    #: path of the file, or a name in brackets, or nothing
    path: str
    #: fields of smaps in kB: Rss, Anonymous, KSM (6.7), AnonHugePages, Swap, Locked …; empty from maps
    sizes: dict[str, int] = field(default_factory=dict)
    #: the two-letter VmFlags of smaps: ``mg`` mergeable, ``lo`` locked, ``um``/``uw`` userfaultfd …; empty from maps
    vm_flags: frozenset[str] = frozenset()

    @property
    def length(self) -> int:
        """Its length in bytes."""
        return self.end - self.start

    @property
    def name(self) -> str:
        """The name given by ``PR_SET_VMA_ANON_NAME``, or nothing."""
        for prefix in ("[anon:", "[anon_shmem:"):
            if self.path.startswith(prefix):
                return self.path[len(prefix) : -1]
        return ""

    def size(self, field_name: str) -> int:
        """A field of smaps in kB.

        :raises KeyError: if this kernel does not show it (``KSM`` appeared in 6.7), or if this came from maps.
        """
        return self.sizes[field_name]

    def __str__(self) -> str:
        return f"{self.start:#x}-{self.end:#x} {self.perms} {self.path}".rstrip()


def _head(line: str) -> Vma | None:
    match = _HEAD.fullmatch(line)
    if match is None:
        return None
    start, end, perms, offset, dev, inode, path = match.groups()
    return Vma(int(start, 16), int(end, 16), perms, int(offset, 16), dev, int(inode), path)


def parse_maps(text: str) -> list[Vma]:
    """The mappings in the text of a maps file, in order of address."""
    found = []
    for line in text.splitlines():
        vma = _head(line)
        if vma is None:
            raise ValueError(f"not a line of a maps file: {line!r}")
        found.append(vma)
    return found


def parse_smaps(text: str) -> list[Vma]:
    """The mappings in the text of a smaps file, with sizes and flags."""
    return list(_smaps(text))


def _smaps(text: str) -> Iterator[Vma]:
    vma: Vma | None = None
    sizes: dict[str, int] = {}
    flags: frozenset[str] = frozenset()
    for line in text.splitlines():
        # The names of fields begin with a capital letter, the digits of addresses are small ones.
        head = None if line[:1].isupper() else _head(line)
        if head is not None:
            if vma is not None:
                yield _with(vma, sizes, flags)
            vma, sizes, flags = head, {}, frozenset()
            continue
        key, _, value = line.partition(":")
        if key == "VmFlags":
            flags = frozenset(value.split())
        elif value:
            # Most are in kB; THPeligible and ProtectionKey are plain numbers.
            sizes[key] = int(value.split()[0])
    if vma is not None:
        yield _with(vma, sizes, flags)


def _with(vma: Vma, sizes: dict[str, int], flags: frozenset[str]) -> Vma:
    return Vma(vma.start, vma.end, vma.perms, vma.offset, vma.dev, vma.inode, vma.path, sizes, flags)


def vmas(pid: Pid = "self", *, detailed: bool = False) -> list[Vma]:
    """All mappings of a process, in order of address.

    :param detailed: read smaps, which walks all page tables, instead of maps.
    """
    return vmas_between(0, 1 << 64, pid, detailed=detailed)


def vma_at(address: int, pid: Pid = "self", *, detailed: bool = False) -> Vma:
    """The mapping that holds ``address``.

    :param detailed: with sizes and flags.
    :raises LookupError: if nothing is mapped there.
    """
    for vma in vmas_between(address, address + 1, pid, detailed=detailed):
        return vma
    raise LookupError(f"nothing is mapped at {address:#x} in process {pid}")


def vmas_between(start: int, end: int, pid: Pid = "self", *, detailed: bool = False) -> list[Vma]:
    """The mappings that overlap ``start`` to ``end`` (exclusive), in order of address.

    The file is read up to the first mapping behind ``end``, and other mappings are not parsed: parsing the smaps of a
    whole interpreter took half the time of an emulated test.

    :param detailed: with sizes and flags.
    """
    text = _text_between(f"/proc/{pid}/{'smaps' if detailed else 'maps'}", start, end).decode(errors="replace")
    return parse_smaps(text) if detailed else parse_maps(text)


_RANGE = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) [r-][w-]", re.MULTILINE)


def _text_between(file_name: str, start: int, end: int) -> bytes:
    """The part of a maps or smaps file that is about the mappings that overlap ``start`` to ``end``."""
    text = bytearray()
    first: int | None = None
    seen = 0  # what follows has not been searched
    with open(file_name, "rb", buffering=0) as file:
        while chunk := file.read(1 << 16):
            text += chunk
            complete = text.rfind(b"\n") + 1
            for head in _RANGE.finditer(text, seen, complete):
                if int(head[1], 16) >= end:
                    return bytes(text[first : head.start()]) if first is not None else b""
                if first is None and int(head[2], 16) > start:
                    first = head.start()
            seen = complete
    return bytes(text[first:]) if first is not None else b""


def kilobytes(start: int, end: int, field_name: str, pid: Pid = "self") -> int:
    """The sum of a smaps field, in kB, over the mappings that overlap ``start`` to ``end``.

    :raises KeyError: if this kernel does not show the field (``KSM`` appeared in 6.7).
    """
    return sum(vma.size(field_name) for vma in vmas_between(start, end, pid, detailed=True))


# --- PROCMAP_QUERY -----------------------------------------------------------------------------------------------

#: _IOWR(0x66, 17, struct procmap_query), include/uapi/linux/fs.h
PROCMAP_QUERY = 0xC0686611

VMA_READABLE = 0x01
VMA_WRITABLE = 0x02
VMA_EXECUTABLE = 0x04
VMA_SHARED = 0x08
COVERING_OR_NEXT_VMA = 0x10
FILE_BACKED_VMA = 0x20


class _Query(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint64),
        ("query_flags", ctypes.c_uint64),
        ("query_addr", ctypes.c_uint64),
        ("vma_start", ctypes.c_uint64),
        ("vma_end", ctypes.c_uint64),
        ("vma_flags", ctypes.c_uint64),
        ("vma_page_size", ctypes.c_uint64),
        ("vma_offset", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("vma_name_size", ctypes.c_uint32),
        ("build_id_size", ctypes.c_uint32),
        ("vma_name_addr", ctypes.c_uint64),
        ("build_id_addr", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Queried:
    """The answer of ``PROCMAP_QUERY`` for one mapping."""

    #: its first address, in bytes
    start: int
    #: the first address behind it
    end: int
    #: ``VMA_READABLE`` and so on
    flags: int
    #: bytes in a page of it
    page_size: int
    #: byte offset in the file; 0 for anonymous memory
    offset: int
    #: inode of the file; 0 for anonymous memory
    inode: int


def query(address: int, pid: Pid = "self", *, flags: int = 0) -> Queried | None:
    """Ask for the mapping at ``address`` alone, without text in between (6.11).

    :param flags: ``COVERING_OR_NEXT_VMA`` and other restrictions.
    :returns: None if there is none.
    :raises OSError: ENOTTY where the kernel has no such ioctl: use :func:`vma_at`.
    """
    request = _Query(size=ctypes.sizeof(_Query), query_flags=flags, query_addr=address)
    with open(f"/proc/{pid}/maps", "rb") as file:
        try:
            fcntl.ioctl(file, PROCMAP_QUERY, request)
        except FileNotFoundError:
            return None
    return Queried(
        start=request.vma_start,
        end=request.vma_end,
        flags=request.vma_flags,
        page_size=request.vma_page_size,
        offset=request.vma_offset,
        inode=request.inode,
    )
