# SPDX-License-Identifier: GPL-2.0
"""Makes small files that look like kernels, modules, build trees and packages to the host side."""

from __future__ import annotations

import gzip
import struct
import subprocess
from pathlib import Path

from harness.arch import ARCHITECTURES, ARM64, Architecture, ImageKind
from harness.kernels import kernel

EMBEDDED_CONFIG = (
    b"IKCFG_ST" + gzip.compress(b'CONFIG_KSM=y\n# CONFIG_SMP is not set\nCONFIG_LOCALVERSION="-x"\n') + b"IKCFG_ED"
)
BODY = b"\0Linux version 9.1.2-test (someone@somewhere) #1\n\0" + EMBEDDED_CONFIG


def bzimage(payload: bytes = b"", release: str = "9.1.2-test", xloadflags: int = 1) -> bytes:
    """An x86 image as far as the boot protocol describes one: a boot sector, one setup sector, the payload."""
    data = bytearray(1024)
    data[0x1F1] = 1  # setup_sects
    data[0x1FE:0x206] = b"\x55\xaa\xeb\x00HdrS"
    struct.pack_into("<H", data, 0x206, 0x20F)
    struct.pack_into("<H", data, 0x20E, 0x300 - 0x200)
    text = f"{release} (someone@somewhere) #1".encode()
    data[0x300 : 0x300 + len(text)] = text
    struct.pack_into("<H", data, 0x236, xloadflags)
    struct.pack_into("<II", data, 0x248, 0, len(payload))
    return bytes(data) + payload


def image(body: bytes = BODY, flags: int = 0, arch: Architecture = ARM64) -> bytes:
    """A raw image: the header's flags and magic, then anything."""
    return b"MZ".ljust(24, b"\0") + struct.pack("<Q", flags) + bytes(24) + arch.image.magic + bytes(4) + body


def zboot(payload: bytes, compression: bytes, machine: int = 0xAA64) -> bytes:
    """An EFI zboot image: DOS header with the payload's place and compression, PE header, payload."""
    header = struct.pack("<4s4sIIII", b"MZ\0\0", b"zimg", 0x100, len(payload), 0, 0) + compression.ljust(32, b"\0")
    header = header.ljust(0x3C, b"\0") + struct.pack("<I", 0x40) + b"PE\0\0" + struct.pack("<H", machine)
    return header.ljust(0x100, b"\0") + payload + b"padding"


def elf(machine: int, note: bytes = b"") -> bytes:
    """An ELF executable with one PT_NOTE."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(note), len(note), 4)
    return ident + header + segment + note


PVH_NOTE = struct.pack("<III", 4, 8, 18) + b"Xen\0" + bytes(8)


def ko(depends: str = "", **more: str) -> bytes:
    """A module as far as its dependencies go: an ELF file with the section .modinfo."""
    info = "".join(f"{key}={value}\0" for key, value in {"license": "GPL", "depends": depends, **more}.items()).encode()
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + sections


CONFIG = "CONFIG_KSM=y\n" + "".join(f"CONFIG_{name}=y\n" for name in kernel.REQUIRED)
IMAGES = {
    each: bzimage()
    if each.image.kind is ImageKind.BZIMAGE
    else image(b"\0Linux version 9.1.2-test (x@y) #1\n", arch=each)
    for each in ARCHITECTURES
}


def fill(files: dict[Path, bytes | str]) -> None:
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def build_tree(path: Path, *built: Architecture, config: str = CONFIG) -> Path:
    """What make leaves behind."""
    fill(
        {
            path / ".config": config,
            path / "Kbuild": "",
            path / "include/config/kernel.release": "9.1.2-tree\n",
            path / "modules.order": "drivers/block/zram/zram.o\n",
            path / "modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\n",
            path / "drivers/block/zram/zram.ko": ko(),
            path / "vmlinux": "symbols",
            **{path / each.tree_image: IMAGES[each] for each in built},
        }
    )
    return path


def build_deb(
    directory: Path,
    name: str,
    files: dict[str, bytes | str],
    arch: str = "amd64",
    *,
    version: str = "9.1.2-1",
    depends: str = "",
) -> Path:
    """A package made by dpkg-deb, as the archive's are."""
    root = directory / "build" / f"{name}_{version}"
    control = (
        f"Package: {name}\nVersion: {version}\nArchitecture: {arch}\nMaintainer: x <x@localhost>\nDescription: x\n"
    )
    control += f"Depends: {depends}\n" if depends else ""
    fill({root / "DEBIAN/control": control, **{root / path: content for path, content in files.items()}})
    path = directory / f"{name}_{version}_{arch}.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(path)], check=True, capture_output=True)
    return path
