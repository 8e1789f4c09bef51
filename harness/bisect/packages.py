# SPDX-License-Identifier: GPL-2.0
"""Ranges of Debian's kernel versions, such as ``6.16..7.3``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from harness.errors import UsageError


def within(versions: Sequence[str], text: str) -> list[str]:
    """The versions in a range. Its ends may leave out the last numbers: ``..7.3`` includes 7.3.4.

    :param versions: the oldest first.
    :raises UsageError: if the text is no range, or fewer than two versions are in it.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)*)\.\.(\d+(?:\.\d+)*)", text)
    if not found:
        raise UsageError(f"{text!r} is no range of versions: give two versions such as 6.16..7.3")
    low, high = numbers(found[1]), numbers(found[2])
    chosen = [each for each in versions if numbers(each) >= low and numbers(each)[: len(high)] <= high]
    if len(chosen) < 2:
        raise UsageError(
            f"Debian has {len(chosen)} of the kernels {text}, and a bisect needs two: it has {', '.join(versions)}"
        )
    return chosen


def numbers(version: str) -> tuple[int, ...]:
    """A version as a key that sorts it."""
    return tuple(map(int, version.split(".")))
