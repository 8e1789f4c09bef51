# SPDX-License-Identifier: GPL-2.0
"""Kernel images are recognized by their content, not by the name of the file."""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from harness.arch import ARCHITECTURES, RISCV64, X86_64, ImageKind
from harness.build import dotconfig
from harness.errors import SpecError
from harness.host.cache import Cache
from harness.kernels.image_format import bootable, identify, page_size, read
from tests.kernel_files import BODY, PVH_NOTE, bzimage, elf, image, zboot

#: architectures whose kernels are raw images
RAW = [each for each in ARCHITECTURES if each.image.kind is ImageKind.IMAGE]

COMPRESSORS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"zstd": lambda data: zstandard.ZstdCompressor().compress(data),
    b"xzkern": lzma.compress,
    b"lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        path = tmp_path / "some-file"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("data", "arch", "kind"),
    [
        pytest.param(bzimage(), X86_64, ImageKind.BZIMAGE, id="bzImage"),
        pytest.param(elf(62, PVH_NOTE), X86_64, ImageKind.VMLINUX, id="vmlinux with PVH"),
        *(pytest.param(image(arch=each), each, ImageKind.IMAGE, id=f"{each} Image") for each in RAW),
        *(
            pytest.param(gzip.compress(image(arch=each)), each, ImageKind.IMAGE_GZ, id=f"{each} Image.gz")
            for each in RAW
        ),
        *(
            pytest.param(zboot(b"", b"gzip", each.image.pe_machine), each, ImageKind.ZBOOT, id=f"{each} zboot")
            for each in RAW
        ),
    ],
)
def test_an_image_is_known_by_its_bytes(
    write: Callable[[bytes], Path], data: bytes, arch: object, kind: ImageKind
) -> None:
    info = identify(write(data))
    assert (info.arch, info.kind) == (arch, kind)


@pytest.mark.parametrize(
    ("data", "size"),
    [
        pytest.param(image(flags=0b0000), 4096, id="older than 4.6, or with pages of its own"),
        pytest.param(image(flags=0b1010), 4096, id="4K"),
        pytest.param(image(flags=0b1100), 16384, id="16K"),
        pytest.param(image(flags=0b1110), 65536, id="64K"),
        pytest.param(bzimage(), 4096, id="x86"),
        pytest.param(image(flags=0b1110, arch=RISCV64), 4096, id="riscv64, where these bits mean nothing"),
    ],
)
def test_an_image_tells_its_page_size(write: Callable[[bytes], Path], data: bytes, size: int) -> None:
    assert page_size(write(data)) == size


@pytest.mark.parametrize(
    ("data", "says"),
    [
        pytest.param(b"", "it is empty", id="empty"),
        pytest.param(b"#!/bin/sh\necho hello\n", "it starts with the text '#!/bin/sh", id="text"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(64), "it starts with the bytes 89 50", id="picture"),
        pytest.param(
            gzip.compress(b"x" * 1000), f"no {' or '.join(map(str, RAW))} Image is in it", id="gzip of something else"
        ),
        pytest.param(b"!<arch>\ndebian-binary", "Debian package whose name", id="package"),
        pytest.param(bzimage(xloadflags=0), "32-bit x86 kernel", id="i386"),
        pytest.param(elf(62), "give the arch/x86/boot/bzImage", id="vmlinux without PVH"),
        pytest.param(elf(183, PVH_NOTE), "give the arch/arm64/boot/Image", id="arm64 vmlinux"),
        pytest.param(elf(243, PVH_NOTE), "give the arch/riscv/boot/Image", id="riscv64 vmlinux"),
        pytest.param(elf(8), "another machine", id="MIPS"),
        pytest.param(zboot(b"", b"gzip", 0x6264), "another machine", id="LoongArch zboot"),
    ],
)
def test_what_is_no_kernel_is_refused_in_one_line(write: Callable[[bytes], Path], data: bytes, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        identify(write(data))
    assert says in str(caught.value)
    assert "some-file" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSORS, ids=bytes.decode)
def test_a_zboot_image_boots_as_the_raw_image_in_it(
    write: Callable[[bytes], Path], tmp_path: Path, compression: bytes
) -> None:
    path = write(zboot(COMPRESSORS[compression](image()), compression))
    unpacked = bootable(path, Cache(tmp_path / "cache"))
    assert unpacked.read_bytes() == image()
    assert read(path).release == "9.1.2-test"


def test_a_gzip_image_boots_as_the_raw_image_in_it(write: Callable[[bytes], Path], tmp_path: Path) -> None:
    assert bootable(write(gzip.compress(image())), Cache(tmp_path / "cache")).read_bytes() == image()


@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(image())[:-12],
        zboot(zstandard.compress(image())[:-4], b"zstd"),
        zboot(lzma.compress(image())[:-40], b"xz"),
    ],
    ids=["gzip", "zstd", "xz"],
)
def test_an_image_that_ends_early_is_damaged(write: Callable[[bytes], Path], tmp_path: Path, data: bytes) -> None:
    with pytest.raises(SpecError, match=r"is damaged: its \w+ data ends early"):
        bootable(write(data), Cache(tmp_path / "cache"))
    assert not list((tmp_path / "cache/images").iterdir())


@pytest.mark.parametrize("data", [bzimage(), image(), elf(62, PVH_NOTE)], ids=["bzImage", "Image", "vmlinux"])
def test_what_qemu_can_boot_is_booted_as_it_is(write: Callable[[bytes], Path], tmp_path: Path, data: bytes) -> None:
    path = write(data)
    assert bootable(path, Cache(tmp_path / "cache")) == path


def test_an_unknown_compression_is_named(write: Callable[[bytes], Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'brotli' is not supported; give the uncompressed Image"):
        bootable(write(zboot(b"", b"brotli")), Cache(tmp_path / "cache"))


@pytest.mark.parametrize("compression", COMPRESSORS, ids=bytes.decode)
def test_a_damaged_payload_is_no_kernel(write: Callable[[bytes], Path], tmp_path: Path, compression: bytes) -> None:
    payload = bytearray(COMPRESSORS[compression](image()))
    payload[:] = bytes(len(payload))
    with pytest.raises(SpecError, match="is damaged"):
        bootable(write(zboot(bytes(payload), compression)), Cache(tmp_path / "cache"))


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress, zstandard.compress], ids=["gzip", "xz", "zstd"])
def test_release_and_config_are_read_out_of_a_bzimage(
    write: Callable[[bytes], Path], compress: Callable[[bytes], bytes]
) -> None:
    # The build appends the unpacked size to the payload.
    contents = read(write(bzimage(compress(BODY) + struct.pack("<I", len(BODY)))))
    assert contents.release == "9.1.2-test"
    assert contents.config == {"KSM": "y", "LOCALVERSION": "-x"}


def test_release_and_config_are_read_out_of_an_arm64_image(write: Callable[[bytes], Path]) -> None:
    contents = read(write(image()))
    assert contents.release == "9.1.2-test"
    assert contents.config["KSM"] == "y"


def test_an_image_may_hold_neither_config_nor_release(write: Callable[[bytes], Path]) -> None:
    contents = read(write(image(b"nothing")))
    assert (contents.release, dict(contents.config)) == (None, {})


def test_options_that_are_not_set_are_absent() -> None:
    text = '# CONFIG_A is not set\nCONFIG_B=m\nCONFIG_C="a b"\nCONFIG_D=0x10\nCONFIG_E=""\n'
    assert dotconfig.parse(text) == {"B": "m", "C": "a b", "D": "0x10", "E": ""}
