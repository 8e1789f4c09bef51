# SPDX-License-Identifier: GPL-2.0
"""The memory that is available on the host."""

from __future__ import annotations

from pathlib import Path


def available() -> int:
    """Available memory of the host in MiB (MemAvailable in /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
