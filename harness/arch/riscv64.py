# SPDX-License-Identifier: GPL-2.0
"""riscv64."""

from __future__ import annotations

from harness.arch.model import AcceleratorProbe, Architecture, BootImage, ImageKind, QemuArgs

RISCV64 = Architecture(
    name="riscv64",
    aliases=(),
    machine="riscv64",
    elf_machine=243,
    debian="riscv64",
    debian_flavour="riscv64",  # there is no cloud kernel
    kbuild="riscv",
    srcarch="riscv",
    triple="riscv64-linux-gnu",
    qemu="qemu-system-riscv64",
    # The firmware is OpenSBI, which QEMU loads by default and Debian packages by itself.
    qemu_package="qemu-system-misc opensbi",
    # The default, a PLIC for each node, is wired to the wrong pins of the second node's CPU in QEMU 7.2
    # (sifive_plic_create()). With aplic-imsic the serial port interrupts without end, because the APLIC sends a message
    # again although its line is low.
    tcg=QemuArgs(machine="virt,aia=aplic", cpu="rv64"),
    kvm=QemuArgs(machine="virt,aia=aplic", cpu="host"),
    devices=("pvpanic-pci",),  # QEMU 7.2 makes this machine's fw_cfg too late for the device vmcoreinfo
    best_effort=True,
    cpu_in_every_node=True,  # riscv_socket_check_hartids(), hw/riscv/numa.c of QEMU
    ram_at=1 << 31,  # hw/riscv/virt.c of QEMU
    console="ttyS0",
    probe=AcceleratorProbe(
        # At any address: lui t0, 0x100; lui t1, 0x5; addi t1, t1, 0x555; sw t1, 0(t0); j .
        # The word 0x5555 at 0x100000 makes QEMU's test device end QEMU with status 0 (hw/misc/sifive_test.c).
        code=bytes.fromhex("b7021000375300001303535523a062006f000000"),
        size=0x1000,
        status=0,
        # Under KVM there is no machine mode, and so no firmware.
        load=("-bios", "none", "-kernel"),
    ),
    image=BootImage(kind=ImageKind.IMAGE, magic=b"RSC\x05", magic_at=56, pe_machine=0x5064),
    page_tables=None,
)
