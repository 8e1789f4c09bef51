# SPDX-License-Identifier: GPL-2.0
"""Compressed dumps that the tests write as makedumpfile and QEMU do: plain, flattened and damaged."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest
import zstandard

from harness.audit import formats
from harness.audit.memory import DumpError, Unreadable

BLOCK = 4096
VMCOREINFO = b"OSRELEASE=7.3.4\nPAGESIZE=4096\n"
#: frame number to its content and the flags of its compression
FRAMES = {3: (b"a", 0x1), 4: (b"b", 0x0), 5000: (b"c", 0x20), 9000: (b"d", 0x1)}


def content(frame: int) -> bytes:
    return FRAMES[frame][0] * BLOCK


def stored(frame: int) -> bytes:
    packers = {0x1: zlib.compress, 0x20: zstandard.ZstdCompressor().compress, 0x0: bytes, 0x2: bytes}
    return packers[FRAMES[frame][1]](content(frame))


def kdump() -> bytes:
    header = bytearray(BLOCK)
    header[:12] = b"KDUMP   " + struct.pack("<I", 6)
    struct.pack_into("<IIII", header, 428, BLOCK, 1, 2, 10_000)
    sub = bytearray(BLOCK)
    note = struct.pack("<III12s", 11, len(VMCOREINFO), 0, b"VMCOREINFO\0") + VMCOREINFO
    struct.pack_into("<QQQQ", sub, 32, 0, 0, BLOCK + 2048, len(note))
    sub[2048 : 2048 + len(note)] = note
    bitmap = bytearray(BLOCK)
    for frame in FRAMES:
        bitmap[frame >> 3] |= 1 << (frame & 7)
    start = 4 * BLOCK + 24 * len(FRAMES)
    descriptors, body = b"", b""
    for frame, (_, flags) in FRAMES.items():
        descriptors += struct.pack("<QIIQ", start + len(body), len(stored(frame)), flags, 0)
        body += stored(frame)
    return bytes(header + sub + bitmap + bitmap) + descriptors + body


def read_all(path: Path) -> None:
    with formats.opened(path) as image:
        for frame in FRAMES:
            image.unit(frame)


def flattened(dump: bytes, pieces: int = 5) -> bytes:
    step = len(dump) // pieces + 1
    records = [(at, dump[at : at + step]) for at in range(0, len(dump), step)]
    written = b"".join(struct.pack(">qq", at, len(data)) + data for at, data in reversed(records))
    return b"makedumpfile".ljust(4096, b"\0") + written + struct.pack(">qq", -1, -1)


@pytest.mark.parametrize("data", [kdump(), flattened(kdump())], ids=["proper", "flattened"])
def test_each_frame_is_read_with_every_compression(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "dump"
    path.write_bytes(data)
    with formats.opened(path) as image:
        assert image.vmcoreinfo == VMCOREINFO
        for frame in FRAMES:
            buffer, offset = image.unit(frame)
            assert buffer[offset : offset + BLOCK] == content(frame)
        for frame in (0, 2, 6, 4999, 9999, 1 << 40):
            with pytest.raises(Unreadable):
                image.unit(frame)
    assert [each.name for each in tmp_path.iterdir()] == ["dump"], "nothing is left behind"


@pytest.mark.parametrize("data", [kdump(), flattened(kdump())], ids=["proper", "flattened"])
def test_a_dump_that_is_cut_short_anywhere_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "dump"
    for size in range(8, len(data) - 20, len(data) // 17):
        path.write_bytes(data[:size])
        with pytest.raises(DumpError):
            read_all(path)


def test_a_damaged_frame_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    data = kdump()
    path.write_bytes(data[: -len(stored(9000))] + b"\xff" * len(stored(9000)))
    with formats.opened(path) as image, pytest.raises(DumpError, match="damaged at frame 0x2328"):
        image.unit(9000)


def test_a_record_that_would_fill_the_disk_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dump"
    path.write_bytes(b"makedumpfile".ljust(4096, b"\0") + struct.pack(">qq", 1 << 50, 4) + b"data")
    with pytest.raises(DumpError, match="cut short"), formats.opened(path):
        pass


def test_an_unsupported_compression_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FRAMES, 4, (b"b", 0x2))
    path = tmp_path / "dump"
    path.write_bytes(kdump())
    with formats.opened(path) as image, pytest.raises(DumpError, match="LZO or snappy"):
        image.unit(4)


def test_a_frame_with_a_forged_huge_size_is_not_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """zstd allocates the size that a frame's header states, without a limit."""
    forged = zstandard.ZstdCompressor().compress(b"c" * (64 << 20))
    assert len(forged) < 2 * BLOCK
    path = tmp_path / "dump"
    monkeypatch.setitem(FRAMES, 5000, (forged[:BLOCK], 0x20))
    monkeypatch.setattr("tests.test_audit_kdump.stored", lambda frame: forged[:BLOCK])
    path.write_bytes(kdump())
    with formats.opened(path) as image, pytest.raises(DumpError, match="larger than a frame"):
        image.unit(5000)
