# SPDX-License-Identifier: GPL-2.0
"""Taint bits: the table, the description, and which bits are new."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.errors import ProtocolError
from harness.judging import taint

LOGS = Path(__file__).parent / "console_logs"


def test_the_bits_are_numbered_without_gaps_and_letters_are_unique() -> None:
    assert [t.bit for t in taint.TAINTS] == list(range(20))
    assert len({t.letter for t in taint.TAINTS}) == len(taint.TAINTS)


def test_the_letters_are_those_kernels_print() -> None:
    """Kernels since 6.10 spell the set bits out: "Tainted: [W]=WARN, [O]=OOT_MODULE"."""
    known = {t.letter: t.name for t in taint.TAINTS}
    printed = {
        pair for log in LOGS.glob("*.log") for pair in re.findall(r"\[([A-Z])\]=([A-Z_]+)", log.read_text("utf-8"))
    }
    assert len(printed) >= 5
    for letter, name in printed:
        assert known[letter] == name.lower().replace("_", " ")


def test_the_order_of_the_letters_is_that_of_the_tainted_line() -> None:
    """Kernels print one column per bit; a letter is printed at its bit's place."""
    lines = {
        match[1]
        for log in LOGS.glob("*.log")
        for match in re.finditer(r"Tainted: ([GP][ A-Z]{17,19})", log.read_text())
    }
    assert lines
    for line in lines:
        for bit, letter in enumerate(line):
            if letter not in " G":
                assert taint.TAINTS[bit].letter == letter


def test_a_clean_kernel_has_no_bits() -> None:
    assert taint.decode(0) == ()


def test_a_bit_is_shown_by_letter_and_name() -> None:
    shown = [str(bit) for bit in taint.decode(1 << 9 | 1 << 12 | 1 << 13)]
    assert shown == ["W=warn", "O=oot module", "E=unsigned module"]


def test_a_bit_of_a_newer_kernel_is_shown_and_taken_seriously() -> None:
    (unknown,) = taint.decode(1 << 40)
    assert unknown.damage
    assert str(unknown) == "?=unknown bit 40"


def test_only_bits_that_were_not_there_before_are_new() -> None:
    before = 1 << 12 | 1 << 13
    assert taint.new(before, before) == ()
    assert [t.letter for t in taint.new(before, before | 1 << 9 | 1 << 5)] == ["B", "W"]
    assert taint.new(before, 0) == ()


@pytest.mark.parametrize(("letter", "damage"), [("W", True), ("B", True), ("D", True), ("L", True), ("O", False)])
def test_damage_is_told_from_what_was_loaded(letter: str, damage: bool) -> None:
    (found,) = (t for t in taint.TAINTS if t.letter == letter)
    assert found.damage is damage


@pytest.mark.parametrize("mask", [-1, 1 << 64])
def test_a_mask_no_kernel_can_have_is_refused(mask: int) -> None:
    with pytest.raises(ProtocolError, match="taint mask"):
        taint.decode(mask)
