# SPDX-License-Identifier: GPL-2.0
"""The order of Debian versions."""

from __future__ import annotations

import re


def version_key(version: str) -> tuple[tuple[int, tuple[object, ...]], ...]:
    """A sort key that orders Debian versions as deb-version(7) does."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return ((int(epoch), ()), (0, _part_key(upstream)), (0, _part_key(revision)))


def _part_key(part: str) -> tuple[object, ...]:
    def char(letter: str) -> int:
        if letter == "~":
            return -1  # sorts before everything, even before the end
        return ord(letter) if letter.isalpha() else ord(letter) + 256

    # Non-digits and digits alternate. The end of a run of non-digits is 0: after "~" and before letters.
    runs = re.findall(r"(\D*)(\d*)", part)
    return tuple((*map(char, text), 0, int(digits or 0)) for text, digits in runs)
