# SPDX-License-Identifier: GPL-2.0
"""arm64."""

from __future__ import annotations

from collections.abc import Callable

from harness.arch.model import (
    AcceleratorProbe,
    Architecture,
    BootImage,
    DumpFacts,
    ImageKind,
    PageSizeField,
    PageTables,
    QemuArgs,
    Translation,
)


def _translation(facts: DumpFacts) -> Translation:
    built = facts.number("NUMBER(VA_BITS)")
    bits = 64 - facts.number("NUMBER(TCR_EL1_T1SZ)", 64 - built)
    shift = facts.page_size.bit_length() - 1

    def levels(bits: int) -> int:
        return -(-(bits - shift) // (shift - 3))

    if levels(built) == levels(bits):
        # The kernel's top table is as large as it was built for; the hardware is given its last part.
        bits = built
    return Translation(bits, facts.number("SYMBOL(swapper_pg_dir)") - facts.number("NUMBER(kimage_voffset)"))


def _vmemmap(facts: DumpFacts, page_struct: int, variable: Callable[[str], int]) -> int:
    offset = facts.number("NUMBER(PHYS_OFFSET)")
    offset -= (offset >> 63) << 64  # memstart_addr is signed
    return facts.number("NUMBER(VMEMMAP_START)") - offset // facts.page_size * page_struct


ARM64 = Architecture(
    name="arm64",
    aliases=("aarch64",),
    machine="aarch64",
    elf_machine=183,
    debian="arm64",
    debian_flavour="cloud-arm64",
    kbuild="arm64",
    srcarch="arm64",
    triple="aarch64-linux-gnu",
    qemu="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    tcg=QemuArgs(
        machine="virt,gic-version=3",
        # "max" is 4-6 times slower: QEMU computes pointer authentication in software.
        cpu="cortex-a57",
        # An a57 has no pages of 16 KiB (ID_AA64MMFR0_EL1.TGran16), and the kernel stops without a message
        # (__no_granule_support, arch/arm64/kernel/head.S).
        cpu_by_page_size={16384: "cortex-a76"},
    ),
    kvm=QemuArgs(machine="virt,gic-version=host", cpu="host"),
    devices=("pvpanic-pci", "vmcoreinfo"),
    best_effort=False,
    cpu_in_every_node=False,
    ram_at=1 << 30,  # hw/arm/virt.c of QEMU
    console="ttyAMA0",
    probe=AcceleratorProbe(
        # At address 0: ldr w0,=0x84000008 (PSCI SYSTEM_OFF); hvc #0; b . — QEMU ends with status 0.
        code=bytes.fromhex("60000018020000d40000001408000084"),
        size=0x10000,
        status=0,
    ),
    image=BootImage(
        kind=ImageKind.IMAGE,
        magic=b"ARM\x64",
        magic_at=56,
        pe_machine=0xAA64,
        # The field is called "flags" in Documentation/arch/arm64/booting.rst.
        page_size=PageSizeField(offset=24, shift=1, sizes={2: 1 << 14, 3: 1 << 16}),
    ),
    # arch/arm64/include/asm/pgtable-prot.h, pgtable-hwdef.h and pgtable.h of Linux 6.12 and 7.3. Physical addresses
    # above 256 TiB are not decoded, nor PROT_NONE before 6.11.
    page_tables=PageTables(
        present=1 << 11 | 1,  # PTE_VALID; PTE_PRESENT_INVALID, from 6.11 on: PROT_NONE, or a huge page being split
        present_huge=0,
        table_mask=0b11,
        table_value=0b11,
        address=(1 << 48) - 1,
        inverted=False,
        special=1 << 56,
        writable=1 << 51,
        swap_type=6,
        most_bits=52,
        kernel_half=False,
        translation=_translation,
        vmemmap=_vmemmap,
    ),
)
