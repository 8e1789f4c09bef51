# SPDX-License-Identifier: GPL-2.0
"""The kernel's taint bits, which tell what happened to a kernel since it was started.

A bit that is set stays set. Modules that are loaded at boot set some bits on every kernel, so a test is judged only by
the bits that were clear before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import ProtocolError


@dataclass(frozen=True)
class Taint:
    """One bit of ``/proc/sys/kernel/tainted``."""

    #: number of the bit, counted from 0
    bit: int
    #: the letter in the "Tainted:" line of a report; empty for a bit that is not in :data:`TAINTS`
    letter: str
    #: the name of the kernel's TAINT_… constant, in lower case with spaces
    name: str
    #: the bit means that the kernel misbehaved, not only that something was loaded into it or done to it
    damage: bool = False

    def __str__(self) -> str:
        return f"{self.letter or '?'}={self.name}"


#: taint_flags in kernel/panic.c and include/linux/panic.h; 6.12 and 7.3 differ only in FWCTL (6.15)
TAINTS: tuple[Taint, ...] = (
    # The kernel prints G while this bit is clear, and a space for every other clear bit.
    Taint(0, "P", "proprietary module"),
    Taint(1, "F", "forced module"),
    Taint(2, "S", "cpu out of spec"),
    Taint(3, "R", "forced rmmod"),
    Taint(4, "M", "machine check"),
    Taint(5, "B", "bad page", damage=True),
    Taint(6, "U", "user"),
    Taint(7, "D", "die", damage=True),
    Taint(8, "A", "overridden acpi table"),
    Taint(9, "W", "warn", damage=True),
    Taint(10, "C", "crap"),
    Taint(11, "I", "firmware workaround"),
    Taint(12, "O", "oot module"),
    Taint(13, "E", "unsigned module"),
    Taint(14, "L", "softlockup", damage=True),
    Taint(15, "K", "livepatch"),
    Taint(16, "X", "aux"),
    Taint(17, "T", "randstruct"),
    Taint(18, "N", "test"),
    Taint(19, "J", "fwctl"),
)


def decode(value: int) -> tuple[Taint, ...]:
    """The bits set in ``value``, lowest first. Unknown bits of a newer kernel have an empty letter.

    :param value: the contents of ``/proc/sys/kernel/tainted``.
    :raises ProtocolError: if the value does not fit in an unsigned long, in which the kernel keeps the bits.
    """
    if not 0 <= value < 1 << 64:
        raise ProtocolError(f"the guest reports a taint mask that no kernel can have: {value.bit_length()} bits")
    known = {taint.bit: taint for taint in TAINTS}
    set_bits = (bit for bit in range(value.bit_length()) if value >> bit & 1)
    return tuple(known.get(bit) or Taint(bit, "", f"unknown bit {bit}", damage=True) for bit in set_bits)


def new(before: int, after: int) -> tuple[Taint, ...]:
    """The bits that are set in ``after`` but not in ``before``.

    Those with :attr:`Taint.damage` mean that the kernel misbehaved in between.
    """
    return decode(after & ~before)
