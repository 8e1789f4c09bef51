# SPDX-License-Identifier: GPL-2.0
"""The architectures of guests, as data: one file for each, and the list of them here.

:mod:`harness.arch.model` says what each field is for.
"""

from __future__ import annotations

import platform

from harness.arch.arm64 import ARM64
from harness.arch.model import Architecture, ImageKind, PageTables, QemuArgs
from harness.arch.riscv64 import RISCV64
from harness.arch.x86_64 import X86_64
from harness.errors import UsageError

__all__ = (
    "ARCHITECTURES",
    "ARM64",
    "RISCV64",
    "X86_64",
    "Architecture",
    "ImageKind",
    "PageTables",
    "QemuArgs",
    "find",
    "host",
    "of_elf_machine",
)

ARCHITECTURES = (X86_64, ARM64, RISCV64)


def find(name: str) -> Architecture:
    """The architecture called ``name`` by the kernel, Debian, or ``uname -m``.

    :raises UsageError: if there is none.
    """
    for arch in ARCHITECTURES:
        if name in (arch.name, *arch.aliases):
            return arch
    known = ", ".join(arch.name for arch in ARCHITECTURES)
    raise UsageError(f"unknown architecture {name!r}: use one of {known}")


def of_elf_machine(machine: int) -> Architecture | None:
    """The architecture whose ELF files have this ``e_machine``; None if it is none of ours."""
    return next((arch for arch in ARCHITECTURES if arch.elf_machine == machine), None)


def host() -> Architecture:
    """The architecture of this host, or x86_64 where it is none of ours."""
    return next((arch for arch in ARCHITECTURES if arch.machine == platform.machine()), X86_64)
