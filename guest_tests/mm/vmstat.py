# SPDX-License-Identifier: GPL-2.0
"""Counters of the system (/proc/vmstat, meminfo and slabinfo) and of processes (/proc/PID/status), as integers."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_tests.mm.waiting import wait_until

Pid = int | str


def vmstat() -> dict[str, int]:
    """/proc/vmstat: events since boot, and numbers of pages now. Which there are depends on the kernel.

    Of use here: ``pgmigrate_success``, ``pgmigrate_fail``, ``pswpout``, ``cow_ksm``, ``ksm_swpin_copy`` (5.19),
    ``thp_split_page``, ``thp_split_pmd``.
    """
    pairs = (line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return {name: int(value) for name, value in pairs}


def delta(before: dict[str, int], name: str) -> int:
    """How far a counter of :func:`vmstat` rose since ``before``.

    :raises KeyError: if this kernel does not count it.
    """
    return vmstat()[name] - before[name]


def meminfo() -> dict[str, int]:
    """/proc/meminfo in kB (``HugePages_*`` are counts): ``MemFree``, ``Committed_AS``, ``HardwareCorrupted`` …."""
    pairs = (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return {name: int(value.split()[0]) for name, _, value in pairs}


def slab_objects(cache: str) -> int:
    """How many objects of a slab cache are in use in the whole system (/proc/slabinfo).

    Those that a processor keeps for its next allocations count as well. A cache without a constructor and other
    peculiarities may be merged with others and not have a line of its own. KASAN keeps freed objects, which count
    until the cache is shrunk (kasan_cache_shrink(), mm/kasan/generic.c), so it is shrunk first.

    :raises pytest.skip.Exception: if this kernel does not count them.
    """
    shrink = Path(f"/sys/kernel/slab/{cache}/shrink")
    if shrink.exists():
        shrink.write_text("1")
    slabs = Path("/proc/slabinfo")
    for line in slabs.read_text().splitlines() if slabs.exists() else ():
        words = line.split()
        if words[0] == cache:
            return int(words[1])
    pytest.skip(f"needs CONFIG_SLUB_DEBUG=y: /proc/slabinfo does not count {cache}")


def assert_freed(cache: str, before: int, allowed: int, what: str, seconds: float) -> None:
    """Assert that fewer than ``allowed`` more objects than ``before`` are left of a slab cache.

    RCU frees with a delay, and passes objects to KASAN with one (CONFIG_SLUB_RCU_DEBUG).

    :param what: left them; completes the message.
    :param seconds: how long an ordinary machine may take.
    """
    try:
        wait_until(lambda: slab_objects(cache) - before < allowed, f"objects of {cache} to be freed", seconds)
    except TimeoutError:
        pytest.fail(f"{slab_objects(cache) - before} objects of {cache} are left of {what}")


def status(pid: Pid = "self") -> dict[str, int]:
    """The sizes in /proc/PID/status in kB: ``VmSize``, ``VmRSS``, ``RssAnon``, ``VmSwap``, ``VmLck`` ….

    ``Rss*`` may be late: each thread adds its share in batches.
    """
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words[1:] == ["kB"]:
            found[name] = int(words[0])
    return found
