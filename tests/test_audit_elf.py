# SPDX-License-Identifier: GPL-2.0
"""ELF dumps that the tests write themselves: segments that overlap, and headers that are wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from harness.audit import memory
from harness.audit.memory import DumpError, ElfImage, Unreadable

UNIT = memory.UNIT
#: units of the guest's memory, told apart by their content
UNITS = range(16, 32)


def dump(path: Path, segments: Sequence[tuple[int, int]], *, headers: int = 64) -> Path:
    """Write a dump of :data:`UNITS` whose program headers are for these ranges of units, in this order."""
    body = 4096
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 4, 62, 1, 0, headers, 0, 0, 64, 56, len(segments), 0, 0, 0)
    for first, end in segments:
        offset, size = body + (first - UNITS.start) * UNIT, (end - first) * UNIT
        header += struct.pack("<IIQQQQQQ", 1, 7, offset, 0, first * UNIT, size, size, 0)
    path.write_bytes(header.ljust(body, b"\0") + b"".join(bytes([each]) * UNIT for each in UNITS))
    return path


def readable(path: Path) -> list[int]:
    """The units that can be read; each must have its own content."""
    image, found = ElfImage(path), []
    for number in range(40):
        try:
            buffer, offset = image.unit(number)
        except Unreadable:
            continue
        assert buffer[offset : offset + UNIT] == bytes([number]) * UNIT, f"unit {number} has another one's content"
        found.append(number)
    image.close()
    return found


@pytest.mark.parametrize(
    "segments",
    [
        [(20, 24), (16, 32)],  # what kdump writes: the kernel's own memory, and all of it
        [(16, 24), (16, 32)],
        [(24, 32), (16, 32)],
        [(16, 32), (16, 32)],
        [(16, 22), (18, 28), (20, 32)],
        [(16, 32), (18, 20), (19, 24)],
        [(24, 32), (16, 24)],
    ],
)
def test_overlapping_segments_are_read_correctly(tmp_path: Path, segments: list[tuple[int, int]]) -> None:
    assert readable(dump(tmp_path / "dump", segments)) == list(UNITS)


def test_a_gap_between_segments_is_no_memory(tmp_path: Path) -> None:
    assert readable(dump(tmp_path / "dump", [(26, 30), (16, 20), (17, 19)])) == [16, 17, 18, 19, 26, 27, 28, 29]


@pytest.mark.parametrize("headers", [1 << 20, (1 << 63) - 1, 1 << 63, (1 << 64) - 56])
def test_headers_outside_the_file_are_refused(tmp_path: Path, headers: int) -> None:
    path = dump(tmp_path / "dump", [(16, 32)], headers=headers)
    with pytest.raises(DumpError, match="cut short within its headers"):
        ElfImage(path)
