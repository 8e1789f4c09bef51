# SPDX-License-Identifier: GPL-2.0
"""Numbers on command lines, as argparse wants their types, and in what commands print."""

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


def size(number: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("kB", "MB"):
        number /= 1000
        if number < 1000:
            return f"{number:.0f} {unit}"
    return f"{number / 1000:.1f} GB"


def ago(seconds: float) -> str:
    """A time that has passed, as a person says it."""
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if (count := int(seconds // length)) > 0:
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "now"
