# SPDX-License-Identifier: GPL-2.0
"""Tells what kind of kernel image a file is, and unpacks the kinds that QEMU cannot boot as they are."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.arch import ARCHITECTURES, Architecture, ImageKind, of_elf_machine
from harness.build import dotconfig
from harness.errors import SpecError
from harness.host.cache import Cache, sha256
from harness.host.compression import DamagedError, UnknownCompressionError, decompress, gzip_head, name_of

#: enough of a file to tell its kind
_HEAD = 1 << 16

_GIVE = "give a bzImage, an Image, a build tree or a .deb"


@dataclass(frozen=True)
class ImageInfo:
    """What a kernel image says of itself."""

    arch: Architecture
    kind: ImageKind


def identify(path: Path) -> ImageInfo:
    """What kind of kernel a file is, by its first bytes.

    :raises SpecError: if it is none that QEMU can boot.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    if head[:4] == b"\x7fELF":
        return ImageInfo(_check_vmlinux(path, head), ImageKind.VMLINUX)
    if head[:2] == b"MZ" and head[4:8] == b"zimg":
        return ImageInfo(_check_zboot(path, head), ImageKind.ZBOOT)
    if arch := _recognise(head):
        if arch.image.kind is ImageKind.BZIMAGE:
            _check_bzimage(path, head)
        return ImageInfo(arch, arch.image.kind)
    if head[:2] == b"\x1f\x8b":
        packed = _recognise(gzip_head(head, 64))
        if packed:
            return ImageInfo(packed, ImageKind.IMAGE_GZ)
        raise SpecError(f"{path} is no kernel image: it is a gzip file, but no {_raw_images()} Image is in it; {_GIVE}")
    raise SpecError(f"{path} is no kernel image: {_what_it_is(head)}; {_GIVE}")


def page_size(path: Path) -> int:
    """The page size in bytes of a kernel that QEMU boots; 4096 unless the image's header tells another one.

    :raises SpecError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    arch = _recognise(head)
    field = arch.image.page_size if arch else None
    return field.sizes.get(_u32(head, field.offset) >> field.shift & 3, 4096) if field else 4096


def bootable(path: Path, cache: Cache) -> Path:
    """A form of the image that QEMU boots: itself, or the raw Image in it, from the cache.

    :raises SpecError: if it is no kernel image, or a damaged one.
    :raises HostError: if the disk is full.
    """
    info = identify(path)
    if info.kind not in (ImageKind.IMAGE_GZ, ImageKind.ZBOOT):
        return path

    def unpack(target: Path) -> None:
        target.write_bytes(_raw(path, info))

    return cache.file("images", sha256(path), unpack, name="Image")


@dataclass(frozen=True)
class Contents:
    """What is written inside a kernel image."""

    #: as ``uname -r`` shows it; None if not found
    release: str | None
    #: from CONFIG_IKCONFIG; empty if it has none
    config: Mapping[str, str]


def read(path: Path) -> Contents:
    """Look inside an image; takes up to a second.

    :raises SpecError: if it is no kernel image, or a damaged one.
    """
    info = identify(path)
    raw = _raw(path, info)
    release = None
    if info.kind is ImageKind.BZIMAGE:
        data = path.read_bytes()
        # kernel_version (offset 0x20E): where the version string is, less 0x200
        start = _u16(data, 0x20E) + 0x200
        release = _word(data[start : start + 200]) if start > 0x200 else None
    if release is None and (banner := re.search(rb"Linux version ([!-~]{1,120}) ", raw)):
        release = banner[1].decode()
    return Contents(release, embedded_config(raw))


def embedded_config(raw: bytes) -> dict[str, str]:
    """The configuration that CONFIG_IKCONFIG put into an uncompressed kernel (kernel/configs.c)."""
    start = raw.find(b"IKCFG_ST\x1f\x8b")
    if start < 0:
        return {}
    return dotconfig.parse(gzip_head(raw[start + 8 :], 1 << 24).decode(errors="replace"))


def _raw(path: Path, info: ImageInfo) -> bytes:
    """The kernel as it is in memory; empty for a compression we have no program for."""
    data = path.read_bytes()
    if info.kind is ImageKind.IMAGE_GZ:
        return _checked(path, info.arch, _decompress(path, "gzip", data))
    if info.kind is ImageKind.ZBOOT:
        start, size = _u32(data, 8), _u32(data, 12)
        name = data[24:56].split(b"\0")[0].decode("latin1")
        return _checked(path, info.arch, _decompress(path, name, data[start : start + size]))
    if info.kind is ImageKind.BZIMAGE:
        # setup_sects, payload_offset, payload_length (protocol 2.08)
        start = (data[0x1F1] + 1) * 512 + _u32(data, 0x248)
        payload = data[start : start + _u32(data, 0x24C)]
        name = name_of(payload)
        # Only a configuration is looked for in here: not worth an error, nor a program to install.
        return _decompress(path, name, payload) if name and name != "lz4" else b""
    return data


def _decompress(path: Path, name: str, payload: bytes) -> bytes:
    try:
        return decompress(name, payload)
    except DamagedError as error:
        raise SpecError(f"{path} is damaged: {error}") from None
    except UnknownCompressionError as error:
        raise SpecError(f"{path}: {error}; give the uncompressed Image") from None


def _checked(path: Path, arch: Architecture, raw: bytes) -> bytes:
    if not arch.image.matches(raw):
        raise SpecError(f"{path} is damaged: no {arch} Image comes out of it")
    return raw


def _recognise(head: bytes) -> Architecture | None:
    """The architecture whose boot image begins with these bytes."""
    return next((arch for arch in ARCHITECTURES if arch.image.matches(head)), None)


def _raw_images() -> str:
    return " or ".join(arch.name for arch in ARCHITECTURES if arch.image.kind is ImageKind.IMAGE)


def _check_bzimage(path: Path, head: bytes) -> None:
    # xloadflags (protocol 2.12) bit 0: has the 64-bit entry point
    if _u16(head, 0x206) < 0x20C or not _u16(head, 0x236) & 1:
        raise SpecError(f"{path} is a 32-bit x86 kernel: only 64-bit kernels are supported")


def _check_zboot(path: Path, head: bytes) -> Architecture:
    # e_lfanew leads to the PE header, whose second word names the machine
    pe = _u32(head, 0x3C)
    machine = _u16(head, pe + 4) if head[pe : pe + 4] == b"PE\0\0" else 0
    for arch in ARCHITECTURES:
        if machine == arch.image.pe_machine:
            return arch
    raise SpecError(
        f"{path} is an EFI zboot image for another machine (0x{machine:x}): only {_raw_images()} ones are supported"
    )


def _check_vmlinux(path: Path, head: bytes) -> Architecture:
    machine = _u16(head, 18)
    arch = of_elf_machine(machine)
    if arch is None or head[4] != 2:
        raise SpecError(f"{path} is an ELF file for another machine ({machine}): {_GIVE}")
    if not arch.image.boots_vmlinux or not _has_pvh(path, head):
        raise SpecError(f"{path} is an ELF file that QEMU cannot boot: give the {arch.tree_image} built with it")
    return arch


def _has_pvh(path: Path, head: bytes) -> bool:
    """Whether a PT_NOTE of the ELF file has XEN_ELFNOTE_PHYS32_ENTRY, type 18 (include/xen/interface/elfnote.h)."""
    offset, size, count = struct.unpack_from("<Q", head, 32)[0], _u16(head, 54), _u16(head, 56)
    with path.open("rb") as file:
        for index in range(min(count, 64)):
            file.seek(offset + index * size)
            header = file.read(56).ljust(56, b"\0")
            if _u32(header, 0) == 4:
                start, length = struct.unpack_from("<Q", header, 8)[0], struct.unpack_from("<Q", header, 32)[0]
                file.seek(start)
                if struct.pack("<I", 18) + b"Xen\0" in file.read(min(length, _HEAD)):
                    return True
    return False


def _what_it_is(head: bytes) -> str:
    if not head:
        return "it is empty"
    if head[:8] == b"!<arch>\n":
        return "it looks like a Debian package whose name does not end in .deb"
    line = head.split(b"\n")[0][:32]
    if line and line.isascii() and line.decode().isprintable():
        return f"it starts with the text {line.decode()!r}"
    return f"it starts with the bytes {head[:8].hex(' ')}"


def _word(data: bytes) -> str | None:
    found = re.match(rb"[!-~]{1,120}", data)
    return found[0].decode() if found else None


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")
