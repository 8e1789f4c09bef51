# SPDX-License-Identifier: GPL-2.0
"""A guest's memory as it was at one instant: by physical address, and by the kernel's own virtual ones."""

from __future__ import annotations

import mmap
import os
import struct
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.audit.layout import notes
from harness.audit.pagetable import EntryKind, Format
from harness.errors import HarnessError

#: the unit memory is found in; no kernel page is smaller
UNIT = 4096
_SHIFT = 12
_MASK = (1 << 64) - 1

#: bytes of notes and program headers beyond which a dump is taken for damaged
_MOST_HEADER = 1 << 20
#: translations kept; each stands for 4 KiB of kernel memory that was looked at
_MOST_CACHED = 1 << 18

_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
_S32 = struct.Struct("<i")


class DumpError(HarnessError):
    """A dump that is damaged, cut short, or not of the kernel it is read with."""


class Unreadable(Exception):
    """A kernel pointer that leads to no memory. Internal: the audit turns it into a discrepancy, or a DumpError."""

    def __init__(self, address: int, why: str = "is in no memory of the guest") -> None:
        super().__init__(f"{address:#x} {why}")
        #: the virtual or physical address
        self.address = address


class Image(ABC):
    """Physical memory."""

    #: the contents of the VMCOREINFO note, which the kernel writes for those who read its dumps
    vmcoreinfo: bytes
    #: ``e_machine``, 0 if unknown
    machine: int

    @abstractmethod
    def unit(self, number: int) -> tuple[Any, int]:
        """A buffer and the offset in it where the 4096 bytes at physical address ``number * 4096`` begin.

        :raises Unreadable: if there is no memory at that address.
        """

    @abstractmethod
    def close(self) -> None:
        """Let the dump go."""


class ElfImage(Image):
    """An ELF dump: raw ``dump-guest-memory``, ``virsh dump --memory-only``, or /proc/vmcore.

    The file is mapped, not read, and mapped privately: what is written to :attr:`buffer` never reaches it.

    :raises DumpError: if it is not whole.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise DumpError(f"{path} cannot be read as a dump: {error}") from error
        try:
            self._segments, self.vmcoreinfo, self.machine = _parse_elf(self.buffer, size, path)
        except (struct.error, OverflowError) as error:  # the latter is struct's for a place beyond 2^63
            self.buffer.close()
            raise DumpError(f"{path} is cut short within its headers: take the dump again") from error
        except BaseException:
            self.buffer.close()
            raise
        self._starts = [start for start, _, _ in self._segments]

    def unit(self, number: int) -> tuple[Any, int]:
        """See :meth:`Image.unit`."""
        return self.buffer, self.offset(number << _SHIFT, UNIT)

    def offset(self, address: int, size: int) -> int:
        """Where in the file the ``size`` bytes at a physical address begin.

        :raises Unreadable: if they are not in it.
        """
        index = bisect_right(self._starts, address) - 1
        if index >= 0:
            start, length, offset = self._segments[index]
            if address + size <= start + length:
                return offset + address - start
        raise Unreadable(address)

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self.buffer.close()


def _parse_elf(data: mmap.mmap, size: int, path: Path) -> tuple[list[tuple[int, int, int]], bytes, int]:
    """Segments as (physical address, bytes, offset), the VMCOREINFO note, and the machine."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise DumpError(f"{path} is no ELF dump of a 64-bit little-endian machine")
    kind, machine = struct.unpack_from("<HH", data, 16)
    if kind != 4:  # ET_CORE
        raise DumpError(f"{path} is an ELF file, but no dump: give what dump-guest-memory, virsh dump or kdump wrote")
    (headers,) = struct.unpack_from("<Q", data, 32)
    entry, count = struct.unpack_from("<HH", data, 54)
    if entry != 56 or count == 0xFFFF:
        raise DumpError(f"{path} has program headers of an unknown form")
    segments, vmcoreinfo = [], b""
    for index in range(count):
        header = struct.unpack_from("<IIQQQQQQ", data, headers + index * entry)
        kind, _, offset, _, physical, length, _, _ = header
        if kind not in (1, 4):
            continue
        if offset + length > size:
            raise DumpError(
                f"{path} is cut short: it should hold {offset + length} bytes and has {size}. Take the dump again"
            )
        if kind == 4:  # PT_NOTE
            for name, _, content in notes(data[offset : offset + min(length, _MOST_HEADER)]):
                vmcoreinfo = content if name == b"VMCOREINFO" else vmcoreinfo
        elif length:
            segments.append((physical, length, offset))
    if not segments:
        raise DumpError(f"{path} holds no memory")
    return _apart(segments), vmcoreinfo, machine


def _apart(segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Segments in order, none of which begins below the end of another.

    kdump describes the kernel's own memory twice: once from _text to _end, and once in the range of RAM that holds it
    (crash_prepare_elf64_headers(), kernel/crash_core.c).
    """
    found: list[tuple[int, int, int]] = []
    end = 0
    for start, length, offset in sorted(segments, key=lambda each: (each[0], -each[1])):
        if start + length <= end:
            continue
        # What goes beyond the others begins with a whole unit, so that none is torn in two.
        cut = max(0, (end & -UNIT) - start)
        found.append((start + cut, length - cut, offset + cut))
        end = start + length
    return found


@dataclass(frozen=True)
class Facts:
    """What VMCOREINFO says about a kernel: ``OSRELEASE``, ``BUILD-ID``, and numbers by their name."""

    release: str
    build_id: str
    page_size: int
    values: Mapping[str, str]

    @classmethod
    def parse(cls, text: bytes) -> Facts:
        """Read the note.

        :raises DumpError: if it is missing, or says too little.
        """
        if not text:
            raise DumpError(
                "the dump has no VMCOREINFO note: give the machine QEMU's -device vmcoreinfo, and its kernel the "
                "module qemu_fw_cfg"
            )
        lines = text.decode(errors="replace").replace("\0", "\n").splitlines()
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        try:
            size = int(values["PAGESIZE"])
            facts = cls(values["OSRELEASE"], values.get("BUILD-ID", ""), size, values)
        except (KeyError, ValueError) as error:
            raise DumpError(f"the dump's VMCOREINFO note is damaged: {error}") from error
        if size not in (4096, 16384, 65536):
            raise DumpError(f"the dump's VMCOREINFO note is damaged: pages of {size} bytes")
        return facts

    def number(self, name: str, default: int | None = None) -> int:
        """A number; C's notation, or hexadecimal digits for symbols and KERNELOFFSET.

        :raises DumpError: if it is missing and has no default.
        """
        text = self.values.get(name, "")
        try:
            if name.startswith(("SYMBOL", "KERNELOFFSET")):
                return int(text, 16)
            return int(text, 0)
        except ValueError:
            if default is None:
                raise DumpError(f"the dump's VMCOREINFO note does not say {name}") from None
            return default


class Memory:
    """Kernel memory by virtual address.

    :param image: the physical memory.
    :param tables: the format of page tables.
    :param root: physical address of the kernel's own top table.
    :param mask: the bits of an address that the tables translate.
    """

    def __init__(self, image: Image, tables: Format, root: int, mask: int = _MASK) -> None:
        self._image = image
        self._tables = tables
        self._root = root
        self._mask = mask
        self._physical: dict[int, tuple[Any, int]] = {}
        self._virtual: dict[int, tuple[Any, int]] = {}

    def unit(self, number: int) -> tuple[Any, int]:
        """See :meth:`Image.unit`; cached."""
        found = self._physical.get(number)
        if found is None:
            if len(self._physical) >= _MOST_CACHED:
                self._physical.clear()
            found = self._physical[number] = self._image.unit(number)
        return found

    def physical(self, address: int, size: int) -> bytes:
        """Bytes at a physical address.

        :raises Unreadable: if they are not there.
        """
        return self._gather(address, size, self.unit)

    def _gather(self, address: int, size: int, find: Any) -> bytes:
        parts = []
        while size > 0:
            buffer, offset = find(address >> _SHIFT)
            inside = address & (UNIT - 1)
            part = min(size, UNIT - inside)
            parts.append(buffer[offset + inside : offset + inside + part])
            address += part
            size -= part
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def translate(self, address: int) -> int:
        """The physical address of a kernel address.

        :raises Unreadable: if it is not mapped.
        """
        for entry in self._tables.walk(self._root, address & self._mask, self._table_entry):
            if entry.kind is EntryKind.PAGE:
                return (entry.pfn << self._tables.page_shift) + (address & (entry.size - 1))
        raise Unreadable(address)

    def _table_entry(self, address: int) -> int:
        buffer, offset = self.unit(address >> _SHIFT)
        return int(_U64.unpack_from(buffer, offset + (address & (UNIT - 1)))[0])

    def find(self, number: int) -> tuple[Any, int]:
        """Like :meth:`unit` for the virtual address ``number * 4096``."""
        found = self._virtual.get(number)
        if found is None:
            address = number << _SHIFT
            if not 0 <= address <= _MASK or address < 1 << 63:
                raise Unreadable(address)  # user space, or nonsense
            if len(self._virtual) >= _MOST_CACHED:
                self._virtual.clear()
            found = self._virtual[number] = self.unit(self.translate(address) >> _SHIFT)
        return found

    def read(self, address: int, size: int) -> bytes:
        """Bytes at a kernel address.

        :raises Unreadable: if they are not there.
        """
        return self._gather(address, size, self.find)

    def u64(self, address: int) -> int:
        """A pointer or unsigned long."""
        if address & 7:
            return int(_U64.unpack(self.read(address, 8))[0])
        buffer, offset = self._virtual.get(address >> _SHIFT) or self.find(address >> _SHIFT)
        return int(_U64.unpack_from(buffer, offset + (address & 4095))[0])

    def u32(self, address: int) -> int:
        """An unsigned int."""
        return int(_U32.unpack(self.read(address, 4))[0])

    def s32(self, address: int) -> int:
        """An int, or atomic_t."""
        return int(_S32.unpack(self.read(address, 4))[0])

    def where(self, address: int) -> tuple[Any, int]:
        """The buffer and offset of a kernel address, for who wants to change it there."""
        buffer, offset = self.find(address >> _SHIFT)
        return buffer, offset + (address & (UNIT - 1))
