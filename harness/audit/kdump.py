# SPDX-License-Identifier: GPL-2.0
"""Compressed dumps: kdump's format, which makedumpfile and QEMU (``dump-guest-memory -z``) write.

A header, a sub-header, two bitmaps (which frames exist, which are in the dump), a descriptor for each frame that is in
the dump, and the frames (diskdump_mod.h of makedumpfile, include/sysemu/dump.h of QEMU 7.2). It is read here rather
than with drgn because the library behind that (libkdumpfile 0.5) does not take what QEMU 7.2 writes.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import zstandard

from harness.audit.layout import notes
from harness.audit.memory import UNIT, DumpError, Image, Unreadable

#: the flattened form can be written to a pipe, and is all that QEMU writes before 8.2: a header of this size, then
#: records of offset, size and bytes, big-endian, until a negative offset
_FLATTENED, _FLAT_HEADER = b"makedumpfile", 4096
_MOST_RECORD = 1 << 30

#: page_desc.flags
_ZLIB, _LZO, _SNAPPY, _ZSTD = 0x1, 0x2, 0x4, 0x20
_DESCRIPTOR = struct.Struct("<QII8x")
#: frames whose bits are counted together
_CHUNK = 512 * 8
_MOST_KEPT = 1 << 13


class KdumpImage(Image):
    """A compressed dump.

    :raises DumpError: if it is damaged, or compressed in a way we cannot read.
    """

    def __init__(self, path: Path) -> None:
        self.machine = 0
        self._path = path
        self._blocks: dict[int, bytes] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        try:
            with path.open("rb") as file:
                flattened = file.read(len(_FLATTENED)) == _FLATTENED
            if flattened:
                self._scratch = tempfile.TemporaryDirectory(prefix="dump-", dir=path.parent)
                path = reassemble(path, Path(self._scratch.name) / "dump")
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._parse()
        except (OSError, ValueError, struct.error) as error:
            self.close()
            raise DumpError(f"{self._path} cannot be read as a compressed dump: {error}") from error
        except BaseException:
            self.close()
            raise

    def _parse(self) -> None:
        data = self._data
        self._block, sub_blocks, bitmap_blocks, frames = struct.unpack_from("<IIII", data, 428)
        if self._block not in (4096, 16384, 65536) or not 0 < sub_blocks < 1 << 16:
            raise DumpError(f"{self._path} has a damaged header: take the dump again")
        sub = self._block
        vmcoreinfo, vmcoreinfo_size, note, note_size = struct.unpack_from("<QQQQ", data, sub + 32)
        if max(vmcoreinfo_size, note_size) > 1 << 20 or vmcoreinfo + vmcoreinfo_size > len(data):
            raise DumpError(f"{self._path} has a damaged sub-header: take the dump again")
        self.vmcoreinfo = bytes(data[vmcoreinfo : vmcoreinfo + vmcoreinfo_size])
        for name, _, content in notes(bytes(data[note : note + note_size])):
            self.vmcoreinfo = content if name == b"VMCOREINFO" else self.vmcoreinfo
        start = (1 + sub_blocks) * self._block
        half = bitmap_blocks * self._block // 2
        self._bitmap = bytes(data[start + half : start + 2 * half])
        if len(self._bitmap) != half or frames > 8 * half:
            raise DumpError(f"{self._path} is cut short within its bitmaps: take the dump again")
        self._descriptors = start + 2 * half
        #: how many frames are in the dump before each chunk
        self._before = [0]
        for at in range(0, half, _CHUNK // 8):
            chunk = int.from_bytes(self._bitmap[at : at + _CHUNK // 8], "little")
            self._before.append(self._before[-1] + chunk.bit_count())
        end = self._descriptors + self._before[-1] * _DESCRIPTOR.size
        if end > len(data) or not self._before[-1]:
            raise DumpError(f"{self._path} is cut short: it has no room for what it should hold. Take the dump again")

    def unit(self, number: int) -> tuple[Any, int]:
        """See :meth:`Image.unit`."""
        frame, offset = divmod(number * UNIT, self._block)
        found = self._blocks.get(frame)
        if found is None:
            found = self._frame(frame)
            if len(self._blocks) >= _MOST_KEPT:
                self._blocks.clear()
            self._blocks[frame] = found
        return found, offset

    def _frame(self, frame: int) -> bytes:
        if not 0 <= frame < 8 * len(self._bitmap) or not self._bitmap[frame >> 3] >> (frame & 7) & 1:
            raise Unreadable(frame * self._block, "is in no memory of the dump")
        chunk, inside = divmod(frame, _CHUNK)
        bits = int.from_bytes(self._bitmap[chunk * _CHUNK // 8 :][: _CHUNK // 8], "little") & (1 << inside) - 1
        rank = self._before[chunk] + bits.bit_count()
        offset, size, flags = _DESCRIPTOR.unpack_from(self._data, self._descriptors + rank * _DESCRIPTOR.size)
        packed = self._data[offset : offset + size] if size <= self._block else b""
        try:
            content = self._unpack(packed, flags)
        except (zlib.error, zstandard.ZstdError) as error:
            raise DumpError(f"{self._path} is damaged at frame {frame:#x}: {error}") from error
        if len(content) != self._block:
            raise DumpError(f"{self._path} is damaged or cut short at frame {frame:#x}: take the dump again")
        return content

    def _unpack(self, packed: bytes, flags: int) -> bytes:
        if flags & _ZLIB:
            return zlib.decompressobj().decompress(packed, self._block)
        if flags & _ZSTD:
            # What a frame says of its own size goes before max_output_size.
            if zstandard.frame_content_size(packed) > self._block:
                raise zstandard.ZstdError("its content is larger than a frame")
            return zstandard.ZstdDecompressor().decompress(packed, max_output_size=self._block)
        if flags & (_LZO | _SNAPPY):
            raise DumpError(
                f"{self._path} is compressed with LZO or snappy, which is not supported: write it with zlib "
                "(dump-guest-memory -z, makedumpfile -c), or uncompressed"
            )
        return packed

    def close(self) -> None:
        """See :meth:`Image.close`."""
        self._blocks.clear()
        if hasattr(self, "_data"):
            self._data.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def reassemble(path: Path, target: Path) -> Path:
    """Write a flattened dump in its proper form; returns ``target``.

    :raises DumpError: if it is cut short.
    """
    end = 0
    with path.open("rb") as source, target.open("wb") as out:
        size = os.fstat(source.fileno()).st_size
        source.seek(_FLAT_HEADER)
        while len(record := source.read(16)) == 16:
            offset, length = struct.unpack(">qq", record)
            if offset < 0:
                return target
            # What is written is never much larger than what was read: a damaged offset must not fill the disk.
            data = source.read(length) if 0 <= length <= _MOST_RECORD and offset <= end + size else b""
            if len(data) != length:
                break
            out.seek(offset)
            out.write(data)
            end = max(end, offset + length)
    raise DumpError(f"{path} is cut short: the end of its records is missing. Take the dump again")
