# SPDX-License-Identifier: GPL-2.0
"""Writes and reads cpio archives in the "newc" format, which the kernel unpacks as an initramfs.

The format is described in Documentation/driver-api/early-userspace/buffer-format.rst. The kernel accepts several
concatenated archives; later files replace earlier ones. So modules and tests are added to a userland that does not
change. Equal entries give equal archives: times and owners are zero, and inodes are numbered in order.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

#: what an entry begins with: 13 numbers behind the format's own
_HEADER = re.compile(rb"070701[0-9A-Fa-f]{104}")


@dataclass(frozen=True)
class Entry:
    """One file, directory or symbolic link. Its owner is root, and its time is 0."""

    #: path in the archive, without a leading slash
    path: str
    #: type and permission bits, as in ``st_mode``
    mode: int
    #: the content of a file, or the target of a symbolic link
    data: bytes = b""


def file(path: str, data: bytes, *, executable: bool = False) -> Entry:
    """A regular file."""
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def directory(path: str) -> Entry:
    """A directory."""
    return Entry(path, stat.S_IFDIR | 0o755)


def symlink(path: str, target: str) -> Entry:
    """A symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """``entries``, with missing parent directories added before the entries that need them.

    The kernel does not create parent directories, and silently drops a file without one (init/initramfs.c).
    """
    known: set[str] = set()
    result: list[Entry] = []
    for entry in entries:
        parents = [str(p) for p in reversed(PurePosixPath(entry.path).parents) if str(p) != "."]
        result += [directory(p) for p in parents if p not in known]
        known.update(parents)
        if stat.S_ISDIR(entry.mode):
            if entry.path in known:
                continue
            known.add(entry.path)
        result.append(entry)
    return result


def archive(entries: Iterable[Entry]) -> bytes:
    """The entries as one archive, padded so that another archive can follow."""
    out = bytearray()
    for inode, entry in enumerate([*with_parents(entries), Entry("TRAILER!!!", 0)], start=1):
        name = entry.path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        # inode, mode, uid, gid, nlink, mtime, size, device major/minor, rdev major/minor, name size, checksum
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        out += b"070701" + b"".join(b"%08X" % value for value in fields) + name
        out += bytes(-len(out) % 4)
        out += entry.data
        out += bytes(-len(out) % 4)
    out += bytes(-len(out) % 512)
    return bytes(out)


def entries(data: bytes) -> Iterator[Entry]:
    """The entries of an archive that somebody else may have made; what follows the first trailer is not read.

    :raises ValueError: if the data is no such archive, or ends early.
    """
    at = 0
    while True:
        if not _HEADER.match(data, at):
            raise ValueError(f"no entry begins at byte {at}")
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        start = (at + 110 + name_size + 3) // 4 * 4
        at = (start + size + 3) // 4 * 4
        if not name.endswith(b"\0") or at > len(data):
            raise ValueError("it ends in the middle of an entry")
        if name == b"TRAILER!!!\0":
            return
        yield Entry(name[:-1].decode(errors="replace"), mode, data[start : start + size])
