# SPDX-License-Identifier: GPL-2.0
"""The architectures we boot, as data. Adding one means adding a literal here."""

from __future__ import annotations

import platform
from dataclasses import dataclass

from harness.errors import UsageError


@dataclass(frozen=True, eq=False)
class Architecture:
    """Everything that differs between architectures on the host side.

    Compared by identity: there is one object per architecture.
    """

    #: the kernel's own name (ARCH=), used in test ids and reports
    name: str
    #: other names people type for it
    aliases: tuple[str, ...]
    #: ``uname -m``
    machine: str
    #: Debian's name, used in package names
    debian: str
    #: QEMU's program for it
    qemu: str
    #: the Debian package that ships that program
    qemu_package: str
    #: -machine under TCG
    tcg_machine: str
    #: -cpu under TCG
    tcg_cpu: str
    #: the same for a kernel with pages of 16 KiB
    tcg_cpu_16k: str
    #: -machine under KVM
    kvm_machine: str
    #: the kernel's name of the first serial port
    console: str
    #: kernel parameters that only make sense under TCG
    tcg_params: tuple[str, ...]
    #: where a built tree leaves its bootable image
    tree_image: str
    #: ``e_machine`` of its ELF files (include/uapi/linux/elf-em.h)
    elf_machine: int

    def __str__(self) -> str:
        return self.name


X86_64 = Architecture(
    name="x86_64",
    aliases=("x86-64", "amd64"),
    machine="x86_64",
    debian="amd64",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    tcg_machine="pc",
    # CPython needs a random source before virtio-rng is bound: qemu64 has no RDRAND of its own.
    tcg_cpu="qemu64,+rdrand",
    tcg_cpu_16k="",
    kvm_machine="q35",
    console="ttyS0",
    # Calibration loops are slow and inexact under emulation, and take minutes on an overloaded host.
    tcg_params=("tsc=reliable", "no_timer_check"),
    tree_image="arch/x86/boot/bzImage",
    elf_machine=62,
)

ARM64 = Architecture(
    name="arm64",
    aliases=("aarch64",),
    machine="aarch64",
    debian="arm64",
    qemu="qemu-system-aarch64",
    qemu_package="qemu-system-arm",
    tcg_machine="virt,gic-version=3",
    # "max" is 4-6 times slower: QEMU computes pointer authentication in software.
    tcg_cpu="cortex-a57",
    # An a57 has no such pages (ID_AA64MMFR0_EL1.TGran16), and the kernel stops without a word (__no_granule_support).
    tcg_cpu_16k="cortex-a76",
    kvm_machine="virt,gic-version=host",
    console="ttyAMA0",
    tcg_params=(),
    tree_image="arch/arm64/boot/Image",
    elf_machine=183,
)

ARCHITECTURES = (X86_64, ARM64)


def find(name: str) -> Architecture:
    """The architecture called ``name`` by the kernel, Debian, or ``uname -m``.

    :raises UsageError: if there is none.
    """
    for arch in ARCHITECTURES:
        if name in (arch.name, *arch.aliases):
            return arch
    known = ", ".join(arch.name for arch in ARCHITECTURES)
    raise UsageError(f"unknown architecture {name!r}: use one of {known}")


def host() -> Architecture:
    """The architecture of this host, or x86_64 where it is none of ours."""
    return next((arch for arch in ARCHITECTURES if arch.machine == platform.machine()), X86_64)
