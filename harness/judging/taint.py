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
    #: the first kernel with this bit; "2.6" if every supported kernel has it
    since: str
    #: the bit means that the kernel misbehaved, not only that something was loaded into it or done to it
    damage: bool = False

    def __str__(self) -> str:
        return f"{self.letter or '?'}={self.name}"


#: taint_flags in kernel/panic.c and include/linux/panic.h; 6.12 and 7.3 differ only in FWCTL
TAINTS: tuple[Taint, ...] = (
    # The kernel prints G while this bit is clear, and a space for every other clear bit.
    Taint(0, "P", "proprietary module", "2.6"),
    Taint(1, "F", "forced module", "2.6"),
    Taint(2, "S", "cpu out of spec", "2.6"),
    Taint(3, "R", "forced rmmod", "2.6"),
    Taint(4, "M", "machine check", "2.6"),
    Taint(5, "B", "bad page", "2.6", damage=True),
    Taint(6, "U", "user", "2.6"),
    Taint(7, "D", "die", "2.6", damage=True),
    Taint(8, "A", "overridden acpi table", "2.6"),
    Taint(9, "W", "warn", "2.6", damage=True),
    Taint(10, "C", "crap", "2.6"),
    Taint(11, "I", "firmware workaround", "2.6"),
    Taint(12, "O", "oot module", "3.2"),
    Taint(13, "E", "unsigned module", "3.15"),
    Taint(14, "L", "softlockup", "3.17", damage=True),
    Taint(15, "K", "livepatch", "4.0"),
    Taint(16, "X", "aux", "4.15"),
    Taint(17, "T", "randstruct", "4.17"),
    Taint(18, "N", "test", "6.0"),
    Taint(19, "J", "fwctl", "6.15"),
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
    return tuple(known.get(bit) or Taint(bit, "", f"unknown bit {bit}", "", damage=True) for bit in set_bits)


def describe(value: int) -> str:
    """The bits as text, such as "W=warn, O=oot module", or "not tainted"."""
    return ", ".join(map(str, decode(value))) or "not tainted"


def new(before: int, after: int) -> tuple[Taint, ...]:
    """The bits that are set in ``after`` but not in ``before``.

    Those with :attr:`Taint.damage` mean that the kernel misbehaved in between.
    """
    return decode(after & ~before)
