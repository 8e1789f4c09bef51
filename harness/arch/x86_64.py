# SPDX-License-Identifier: GPL-2.0
"""x86-64."""

from __future__ import annotations

from collections.abc import Callable

from harness.arch.model import (
    AcceleratorProbe,
    Architecture,
    BootImage,
    DumpFacts,
    ImageKind,
    PageTables,
    QemuArgs,
    Translation,
)

#: where the kernel's image is mapped (__START_KERNEL_map, arch/x86/include/asm/page_64_types.h)
_KERNEL_MAP = 0xFFFFFFFF80000000


def _translation(facts: DumpFacts) -> Translation:
    bits = 57 if facts.number("NUMBER(pgtable_l5_enabled)", 0) else 48
    return Translation(bits, facts.number("SYMBOL(swapper_pg_dir)") - _KERNEL_MAP + facts.number("NUMBER(phys_base)"))


def _vmemmap(facts: DumpFacts, page_struct: int, variable: Callable[[str], int]) -> int:
    return variable("vmemmap_base")


X86_64 = Architecture(
    name="x86_64",
    aliases=("x86-64", "amd64"),
    machine="x86_64",
    elf_machine=62,
    debian="amd64",
    debian_flavour="cloud-amd64",
    kbuild="x86_64",
    srcarch="x86",
    triple="x86_64-linux-gnu",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    tcg=QemuArgs(
        machine="pc",
        # CPython needs a random source before virtio-rng is bound: qemu64 has no RDRAND of its own.
        cpu="qemu64,+rdrand",
        # Calibration loops are slow and inexact under emulation, and take minutes on an overloaded host.
        params=("tsc=reliable", "no_timer_check"),
    ),
    kvm=QemuArgs(machine="q35", cpu="host"),
    devices=("pvpanic-pci", "vmcoreinfo"),
    best_effort=False,
    cpu_in_every_node=False,
    ram_at=0,
    console="ttyS0",
    probe=AcceleratorProbe(
        # probe_x86_64.S, assembled, and a far jump to it at the reset vector, 16 bytes below 4 GiB.
        code=bytes.fromhex(
            "fa31c08ed88ec0bf0010b90018fcf3ab66c70600100320000066c70600200330000066c7060030830000002e660f0116"
            "880066b8200000000f22e066b8001000000f22d866b9800000c00f32660d000100000f3066b8010000800f22c066ea65"
            "000f000800b900000008ffc975fcb010e6f4f40f1f440000000000000000000000000000009b20000f0078000f00"
        ).ljust(0xFFF0, b"\0")
        + bytes.fromhex("ea000000f0"),
        size=0x10000,
        status=0x21,
        devices=("isa-debug-exit,iobase=0xf4,iosize=0x04",),
    ),
    image=BootImage(kind=ImageKind.BZIMAGE, magic=b"HdrS", magic_at=0x202, boots_vmlinux=True),
    # arch/x86/include/asm/pgtable_types.h, pgtable_64.h and pgtable-invert.h of Linux 6.12 and 7.3
    page_tables=PageTables(
        present=0x101,  # _PAGE_PRESENT, _PAGE_PROTNONE
        present_huge=0x80,  # _PAGE_PSE stays when a page-middle entry is being split (pmd_present())
        table_mask=0x80,
        table_value=0,
        address=(1 << 48) - 1,
        inverted=True,  # against L1TF (protnone_mask())
        special=0x200,
        writable=0x2,
        swap_type=59,
        most_bits=57,
        kernel_half=True,
        translation=_translation,
        vmemmap=_vmemmap,
    ),
)
