# SPDX-License-Identifier: GPL-2.0
"""Decompresses kernels and modules. Formats have the names that the kernel's build gives them."""

from __future__ import annotations

import lzma
import subprocess
import zlib

import zstandard

from harness.errors import HostError

#: limit of decompressed data in bytes; kernels and modules are smaller
LIMIT = 1 << 30

#: the first bytes of each format, longest first
MAGIC = {
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x5d\0\0": "lzma",
    b"\x1f\x8b": "gzip",
}


class DamagedError(ValueError):
    """The compressed data is invalid or incomplete."""


class UnknownCompressionError(ValueError):
    """The compression format is not supported."""


def name_of(data: bytes) -> str:
    """The compression format that ``data`` begins with; empty if it is not known."""
    return next((name for magic, name in MAGIC.items() if data.startswith(magic)), "")


def decompress(name: str, data: bytes) -> bytes:
    """Decompress one stream. Bytes after it are ignored: padding, or the size that the kernel's build appends.

    :param name: ``gzip``, ``xz`` (or ``xzkern``), ``lzma``, ``zstd`` (or ``zstd22``) or ``lz4``.
    :raises DamagedError: if the stream is invalid, incomplete, or larger than :data:`LIMIT` when decompressed.
    :raises UnknownCompressionError: if the format is another one.
    :raises HostError: if the program that decompresses lz4 is not installed.
    """
    try:
        match name:
            case "gzip":
                inflate = zlib.decompressobj(wbits=31)
                unpacked, whole = inflate.decompress(data, LIMIT), inflate.eof
            case "xz" | "xzkern" | "lzma":
                unlzma = lzma.LZMADecompressor()
                unpacked, whole = unlzma.decompress(data, LIMIT), unlzma.eof
            case "zstd" | "zstd22":
                unzstd = zstandard.ZstdDecompressor().decompressobj()
                unpacked, whole = unzstd.decompress(data), unzstd.eof
            case "lz4":
                return _lz4(data)
            case _:
                raise UnknownCompressionError(f"compression {name!r} is not supported")
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, EOFError) as error:
        raise DamagedError(f"its {name} data does not unpack ({error})") from None
    if not whole:
        raise DamagedError(f"its {name} data ends early")
    return unpacked


def gzip_head(data: bytes, size: int) -> bytes:
    """The first ``size`` decompressed bytes of a gzip stream, which may be incomplete; empty if it is not gzip."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data, size)
    except zlib.error:
        return b""


def _lz4(data: bytes) -> bytes:
    try:
        done = subprocess.run(["lz4", "-dc"], input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise HostError("this kernel is compressed with lz4: install the package lz4, or give the raw image") from None
    # lz4 fails because of the size that follows the stream, but only after it has written everything.
    if not done.stdout:
        raise DamagedError("its lz4 data does not unpack")
    return done.stdout
