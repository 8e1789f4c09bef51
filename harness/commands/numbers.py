# SPDX-License-Identifier: GPL-2.0
"""Numbers on command lines, as argparse wants their types."""

from __future__ import annotations


def count(text: str) -> int:
    """How many of something: at least one."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def minutes(text: str) -> float:
    """A time of at most a day."""
    number = float(text)
    if not 0 < number <= 24 * 60:
        raise ValueError
    return number
