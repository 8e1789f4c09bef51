# SPDX-License-Identifier: GPL-2.0
"""What the host side must know of an architecture: the fields that each file of this directory fills in."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class ImageKind(StrEnum):
    """Forms a kernel comes in."""

    #: x86 boot protocol (Documentation/arch/x86/boot.rst)
    BZIMAGE = "bzImage"
    #: boot protocol of arm64 (Documentation/arch/arm64/booting.rst), and of those that copied its header
    IMAGE = "Image"
    #: the same, compressed with gzip
    IMAGE_GZ = "Image.gz"
    #: EFI application that unpacks an Image (drivers/firmware/efi/libstub/zboot-header.S)
    ZBOOT = "EFI zboot"
    #: ELF file with a PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY), which QEMU boots on x86
    VMLINUX = "vmlinux"


@dataclass(frozen=True)
class QemuArgs:
    """QEMU's arguments and the kernel's parameters under one accelerator."""

    #: -machine
    machine: str
    #: -cpu
    cpu: str
    #: -cpu for kernels whose pages of this many bytes the CPU above does not have
    cpu_by_page_size: Mapping[int, str] = field(default_factory=dict)
    #: kernel parameters that only make sense under this accelerator
    params: tuple[str, ...] = ()

    def cpu_for(self, page_size: int) -> str:
        """The CPU for a kernel with pages of this many bytes."""
        return self.cpu_by_page_size.get(page_size, self.cpu)


@dataclass(frozen=True)
class AcceleratorProbe:
    """Guest code that ends QEMU, and how one sees that it ran."""

    #: the image, up to the last byte that is not zero
    code: bytes
    #: size of the whole image in bytes
    size: int
    #: QEMU's exit status when the code ran
    status: int
    #: QEMU's options, the last of which takes the image's file name
    load: tuple[str, ...] = ("-bios",)
    #: devices that the code needs
    devices: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageSizeField:
    """The field of an image's header that tells the kernel's page size."""

    #: offset in bytes of a 32-bit word
    offset: int
    #: lowest of its two bits
    shift: int
    #: page size in bytes for each value; other values tell nothing
    sizes: Mapping[int, int]


@dataclass(frozen=True)
class BootImage:
    """The image that a kernel build leaves, and how it is recognised."""

    #: its form; also the file's name
    kind: ImageKind
    #: bytes that every such image has
    magic: bytes
    #: offset of these bytes
    magic_at: int
    #: the machine in the PE header of its EFI zboot images; None if it has none
    pe_machine: int | None = None
    #: whether QEMU boots an ELF vmlinux that has a PVH note
    boots_vmlinux: bool = False
    #: where its header tells the page size; None where all kernels have pages of 4096 bytes
    page_size: PageSizeField | None = None

    def matches(self, head: bytes) -> bool:
        """Whether a file that begins with these bytes is such an image."""
        return head[self.magic_at : self.magic_at + len(self.magic)] == self.magic


class DumpFacts(Protocol):
    """What a dump's VMCOREINFO note says."""

    @property
    def page_size(self) -> int:
        """The kernel's page size in bytes."""

    def number(self, name: str, default: int | None = None) -> int:
        """A number by its name; an error if it is missing and has no default."""


@dataclass(frozen=True)
class Translation:
    """The page tables of one kernel."""

    #: bits of the addresses that they translate
    bits: int
    #: physical address of the kernel's own top table
    root: int


@dataclass(frozen=True)
class PageTables:
    """The format of page-table entries, as bit masks, and where a dump's tables are."""

    #: an entry with any of these bits maps memory or leads to a table
    present: int
    #: above the last level, an entry with any of these bits does so too: a huge page that is being split
    present_huge: int
    #: of an entry above the last level, the bits that tell a table from a huge page
    table_mask: int
    #: the value of these bits for a table
    table_value: int
    #: bits that hold a physical address
    address: int
    #: whether the address of an entry without bit 0 is stored inverted
    inverted: bool
    #: the bit of memory that has no reverse map: the zero page, devices
    special: int
    #: the bit that pte_write() tests
    writable: int
    #: lowest of the five bits that hold a swap entry's type
    swap_type: int
    #: the most bits of a virtual address that they can translate
    most_bits: int
    #: whether the kernel has the upper half of each process's tables
    kernel_half: bool
    #: finds a kernel's tables
    translation: Callable[[DumpFacts], Translation]
    #: the address of frame 0's struct page; takes the size of struct page in bytes, and a reader of the kernel's
    #: variables by name
    vmemmap: Callable[[DumpFacts, int, Callable[[str], int]], int]


@dataclass(frozen=True, eq=False, repr=False)
class Architecture:
    """Everything that differs between architectures on the host side.

    Compared by identity: there is one object per architecture.
    """

    #: the name used in test ids, reports and --arch
    name: str
    #: other names people type for it
    aliases: tuple[str, ...]
    #: ``uname -m``
    machine: str
    #: ``e_machine`` of its ELF files (include/uapi/linux/elf-em.h)
    elf_machine: int
    #: Debian's name of the architecture
    debian: str
    #: Debian's flavour of the kernel that is used: what follows the version in linux-image-VERSION-FLAVOUR
    debian_flavour: str
    #: ``ARCH=`` of a kernel build
    kbuild: str
    #: its directory below ``arch/`` of the kernel source
    srcarch: str
    #: the compiler's name for it
    triple: str
    #: QEMU's program for it
    qemu: str
    #: the Debian packages that ship that program and its firmware
    qemu_package: str
    #: under TCG
    tcg: QemuArgs
    #: under KVM
    kvm: QemuArgs
    #: devices beyond virtio's, as -device takes them
    devices: tuple[str, ...]
    #: whether it works, but is not part of continuous integration
    best_effort: bool
    #: whether QEMU's machine has no memory node without a CPU
    cpu_in_every_node: bool
    #: where the machine's RAM begins, as a physical address
    ram_at: int
    #: the kernel's name of the first serial port
    console: str
    #: shows whether an accelerator executes guest code
    probe: AcceleratorProbe
    #: its kernel images
    image: BootImage
    #: for the audit; None for an architecture that cannot be audited
    page_tables: PageTables | None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name.upper()

    @property
    def tree_image(self) -> str:
        """Where a built tree leaves its bootable image."""
        return f"arch/{self.srcarch}/boot/{self.image.kind}"

    @property
    def cross_prefix(self) -> str:
        """What stands before ``gcc`` in the name of its compiler on this host; empty for the host's own."""
        return "" if platform.machine() == self.machine else f"{self.triple}-"
