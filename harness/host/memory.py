# SPDX-License-Identifier: GPL-2.0
"""How much memory the host can still give."""

from __future__ import annotations

from pathlib import Path


def available() -> int:
    """MiB of memory the host can hand out without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
