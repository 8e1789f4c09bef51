# SPDX-License-Identifier: GPL-2.0
"""Processes and kernel threads, as /proc shows them."""

from __future__ import annotations

from pathlib import Path


def kernel_thread(name: str) -> int | None:
    """The process ID of a kernel thread such as ``ksmd``; None if it does not run."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            found = comm.read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # that one has just ended
        if found == f"{name}\n":
            return int(comm.parent.name)
    return None


def state_of(pid: int) -> str:
    """The letter in /proc/PID/stat for what a process does, such as S if it sleeps; empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return stat.rpartition(b")")[2].split()[0].decode()
