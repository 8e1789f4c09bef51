# SPDX-License-Identifier: GPL-2.0
"""Tells what kind of kernel image a file is, and unpacks the kinds that QEMU cannot boot as they are."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from harness.arch import ARCHITECTURES, ARM64, X86_64, Architecture
from harness.build import kconfig
from harness.errors import SpecError
from harness.host.cache import Cache, sha256
from harness.host.compression import DamagedError, UnknownCompressionError, decompress, gzip_head, name_of

#: enough of a file to tell its kind
_HEAD = 1 << 16

_GIVE = "give a bzImage, an arm64 Image, a build tree or a .deb"


class Kind(StrEnum):
    """Forms a kernel comes in."""

    #: x86 boot protocol (Documentation/arch/x86/boot.rst)
    BZIMAGE = "bzImage"
    #: arm64 boot protocol (Documentation/arch/arm64/booting.rst)
    IMAGE = "Image"
    #: the same, compressed with gzip
    IMAGE_GZ = "Image.gz"
    #: EFI application that unpacks an Image (drivers/firmware/efi/libstub/zboot-header.S)
    ZBOOT = "EFI zboot"
    #: ELF file with a PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY), which QEMU boots on x86
    VMLINUX = "vmlinux"


@dataclass(frozen=True)
class ImageInfo:
    """What a kernel image says of itself."""

    arch: Architecture
    kind: Kind


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
        return ImageInfo(_check_vmlinux(path, head), Kind.VMLINUX)
    if head[0x202:0x206] == b"HdrS":
        # xloadflags (protocol 2.12) bit 0: has the 64-bit entry point
        if _u16(head, 0x206) < 0x20C or not _u16(head, 0x236) & 1:
            raise SpecError(f"{path} is a 32-bit x86 kernel: only 64-bit kernels are supported")
        return ImageInfo(X86_64, Kind.BZIMAGE)
    if head[:2] == b"MZ" and head[4:8] == b"zimg":
        return ImageInfo(_check_zboot(path, head), Kind.ZBOOT)
    if _is_arm64(head):
        return ImageInfo(ARM64, Kind.IMAGE)
    if head[:2] == b"\x1f\x8b":
        if _is_arm64(gzip_head(head, 64)):
            return ImageInfo(ARM64, Kind.IMAGE_GZ)
        raise SpecError(f"{path} is no kernel image: it is a gzip file, but no arm64 Image is in it; {_GIVE}")
    raise SpecError(f"{path} is no kernel image: {_what_it_is(head)}; {_GIVE}")


def page_size(path: Path) -> int:
    """The page size in bytes of a kernel that QEMU boots: an arm64 Image says it in its header, if it has a choice.

    The field is ``flags``, bits 1 and 2 (Documentation/arch/arm64/booting.rst).

    :raises SpecError: if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise SpecError(f"cannot read {path}: {error.strerror}") from None
    sizes = {2: 1 << 14, 3: 1 << 16}
    return sizes.get(_u32(head, 24) >> 1 & 3, 4096) if _is_arm64(head) else 4096


def bootable(path: Path, cache: Cache) -> Path:
    """A form of the image that QEMU boots: itself, or its raw arm64 Image from the cache.

    :raises SpecError: if it is no kernel image, or a damaged one.
    :raises HostError: if the disk is full.
    """
    info = identify(path)
    if info.kind not in (Kind.IMAGE_GZ, Kind.ZBOOT):
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
    if info.kind is Kind.BZIMAGE:
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
    return kconfig.parse_config(gzip_head(raw[start + 8 :], 1 << 24).decode(errors="replace"))


def _raw(path: Path, info: ImageInfo) -> bytes:
    """The kernel as it is in memory; empty for a compression we have no program for."""
    data = path.read_bytes()
    if info.kind is Kind.IMAGE_GZ:
        return _checked(path, _decompress(path, "gzip", data))
    if info.kind is Kind.ZBOOT:
        start, size = _u32(data, 8), _u32(data, 12)
        name = data[24:56].split(b"\0")[0].decode("latin1")
        return _checked(path, _decompress(path, name, data[start : start + size]))
    if info.kind is Kind.BZIMAGE:
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


def _checked(path: Path, raw: bytes) -> bytes:
    if not _is_arm64(raw):
        raise SpecError(f"{path} is damaged: no arm64 Image comes out of it")
    return raw


def _is_arm64(head: bytes) -> bool:
    return head[56:60] == b"ARM\x64"


def _check_zboot(path: Path, head: bytes) -> Architecture:
    # e_lfanew leads to the PE header, whose second word names the machine
    pe = _u32(head, 0x3C)
    machine = _u16(head, pe + 4) if head[pe : pe + 4] == b"PE\0\0" else 0
    if machine != 0xAA64:
        raise SpecError(
            f"{path} is an EFI zboot image for another machine (0x{machine:x}): only arm64 ones are supported"
        )
    return ARM64


def _check_vmlinux(path: Path, head: bytes) -> Architecture:
    machine = _u16(head, 18)
    arch = next((arch for arch in ARCHITECTURES if arch.elf_machine == machine), None)
    if arch is None or head[4] != 2:
        raise SpecError(f"{path} is an ELF file for another machine ({machine}): {_GIVE}")
    if arch is not X86_64 or not _has_pvh(path, head):
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
