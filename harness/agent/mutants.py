# SPDX-License-Identifier: GPL-2.0
"""Switches the mutants of this kernel, and reads which of their places were reached: see harness/build/schemata.py."""

from __future__ import annotations

import contextlib
from pathlib import Path

_ACTIVE = Path("/sys/module/kernel/parameters/mm_mutant")
_REACHED = Path("/proc/mm_mutants")

#: A test's report has this property: the mutants whose places the test reached, separated by spaces.
PROPERTY = "mutants reached"


def active() -> str:
    """The mutant that is active, or "record"; empty if none is, or if this kernel has no mutants."""
    with contextlib.suppress(OSError):
        return _ACTIVE.read_text().strip()
    return ""


def select(name: str) -> None:
    """Activate a mutant, and forget which places were reached. Does nothing if this kernel does not have it."""
    with contextlib.suppress(OSError):
        _ACTIVE.write_text(name)


def reached() -> list[str]:
    """The mutants whose places were reached since :func:`select`."""
    with contextlib.suppress(OSError):
        counts = dict(line.split() for line in _REACHED.read_text().splitlines())
        return [name for name, count in counts.items() if count != "0"]
    return []
