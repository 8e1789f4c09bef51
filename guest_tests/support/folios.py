# SPDX-License-Identifier: GPL-2.0
"""Large folios and huge pages: their sizes here, the settings that produce them, and memory made of them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import kpage, maps, pagemap, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, Mapping

THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
#: A guest's memory must have room for so many huge pages, so that one can be had when a test needs it.
_ROOM: Final = 32


def stamp(mapping: Mapping, seed: int = 0) -> Mapping:
    """Fill ``mapping`` so that each byte follows from ``seed`` and the page's number. Faster than ``Mapping.fill``."""
    for index in range(mapping.pages):
        mapping.write(index, (seed << 32 | index + 1).to_bytes(8, "little"))
    return mapping


@contextmanager
def knob(path: Path | str, value: str) -> Iterator[None]:
    """Write ``value`` to a file of the kernel, and restore the file when the block ends."""
    file = Path(path)
    before = file.read_text()
    _, bracket, rest = before.partition("[")  # "always [madvise] never": the one in brackets holds
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(rest.partition("]")[0] if bracket else before.strip())


# --- huge pages --------------------------------------------------------------------------------------------------


def pmd_size() -> int:
    """The size in bytes of a huge page that a PMD maps. Skips where there are none, or they are too large here."""
    system.require_config("TRANSPARENT_HUGEPAGE")
    try:
        size = int((THP / "hpage_pmd_size").read_text())
    except FileNotFoundError:
        pytest.skip(f"needs CONFIG_TRANSPARENT_HUGEPAGE=y: this kernel has no {THP}")
    have, needed = vmstat.meminfo()["MemTotal"] >> 10, _ROOM * size >> 20
    if have < needed:
        pytest.skip(f"needs {needed} MB of memory for huge pages of {size >> 20} MB, has {have}: give --guest-memory")
    return size


@contextmanager
def thp(value: str = "always") -> Iterator[None]:
    """Huge pages for every fault that fits ("always"), or for none without advice ("madvise"), while the block runs.

    "never" would stop khugepaged, which scans at once when it is started again. Skips where huge pages are wanted and
    the kernel has none.
    """
    if value == "always":
        pmd_size()
    elif not THP.exists():
        yield
        return
    with knob(THP / "enabled", value):
        yield


def huge_page(mapping: Mapping, at: int) -> Mapping:
    """Touch ``mapping`` at the PMD-aligned address ``at`` and return the huge page there. Call within :func:`thp`."""
    # No read first: 6.12 and older never turn the huge zero page into a huge page (do_huge_pmd_wp_page()).
    ctypes.memset(at, 0, 1)
    assert is_large(at), f"no huge page at {at:#x}: is memory too fragmented? {kpage.describe(pagemap.pfn(at))}"
    return mapping.part((at - mapping.address) // PAGE_SIZE, pmd_size() // PAGE_SIZE)


def huge_kb(mapping: Mapping) -> int:
    """How much of ``mapping`` is mapped by PMDs, in kB."""
    return maps.kilobytes(mapping.address, mapping.end, "AnonHugePages")


# --- smaller large folios ----------------------------------------------------------------------------------------


def _enabled(size: int) -> Path:
    """Where folios of ``size`` bytes are turned on."""
    return THP / f"hugepages-{size >> 10}kB/enabled"


def mthp_size() -> int:
    """The size in bytes of large folios of 16 pages, else of 8, that anonymous memory can have (6.8); else skips."""
    wanted = {size for size in (8 * PAGE_SIZE, 16 * PAGE_SIZE) if _enabled(size).exists()}
    if not wanted:
        pytest.skip(
            f"needs Linux 6.8 and CONFIG_TRANSPARENT_HUGEPAGE: no {THP}/hugepages-*kB/enabled, "
            f"this is {platform.release()}"
        )
    return max(wanted)


@contextmanager
def mthp(size: int) -> Iterator[None]:
    """Folios of ``size`` bytes for faults, and no larger ones, while the block runs."""
    with knob(_enabled(size), "always"):
        yield


def large_folio(mapping: Mapping) -> Mapping:
    """Fill ``mapping``, which is as long as :func:`mthp_size` and aligned to it, so that one large folio backs it."""
    with thp("madvise"), mthp(mapping.length):
        stamp(mapping)
    assert all(map(is_large, mapping.page_addresses)), f"faults got no folio of {mapping.length >> 10} kB"
    return mapping


@contextmanager
def advised_folios() -> Iterator[None]:
    """Folios of 4 and 8 pages for memory with MADV_HUGEPAGE, while the block runs, if the kernel has them (6.8)."""
    with ExitStack() as stack:
        for enabled in (_enabled(4 * PAGE_SIZE), _enabled(8 * PAGE_SIZE)):
            if enabled.exists():
                stack.enter_context(knob(enabled, "madvise"))
        yield


def is_large(address: int) -> bool:
    """Whether the page at ``address`` belongs to a large folio."""
    return bool(kpage.flags_at(address) & kpage.LARGE)
