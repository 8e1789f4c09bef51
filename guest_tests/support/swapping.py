# SPDX-License-Identifier: GPL-2.0
"""Bring memory into swap, and back."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from guest_tests.mm import kpage, memcg, pagemap, syscalls
from guest_tests.mm.mapping import Mapping
from guest_tests.mm.probes import Place
from guest_tests.mm.probes.ageing import drain

_TRIES: Final = 3
_RECLAIMS: Final = 8


def page_out(mapping: Mapping) -> list[int]:
    """Swap out ``mapping`` with MADV_PAGEOUT, which skips pages that are mapped more than once.

    :returns: the numbers of the pages that are still present.
    """
    left: list[int] = []
    drain()  # it drains the batches of its own CPU only, and skips pages that are not on an LRU list yet
    for _ in range(_TRIES):
        mapping.madvise(syscalls.MADV_PAGEOUT)
        entries = pagemap.entries(mapping.address, mapping.pages)
        left = [index for index, entry in enumerate(entries) if entry.present]
        if not left:
            break
    return left


def assert_pages_out(mapping: Mapping) -> None:
    """Swap out all of ``mapping``, and assert that no page is present afterwards."""
    left = page_out(mapping)
    assert not left, (
        f"MADV_PAGEOUT leaves {len(left)} of {mapping.pages} pages of the mapping at {mapping.address:#x} present: "
        f"{left[:8]}"
    )


def reclaim_group(places: Sequence[Place]) -> None:
    """Make the kernel reclaim this process's control group until no page is present at ``places``.

    :raises AssertionError: if one is still present after several tries.
    """
    group = memcg.current()
    for _ in range(_RECLAIMS):
        try:
            (group / "memory.reclaim").write_text((group / "memory.current").read_text())
        except OSError as error:
            if error.errno != errno.EAGAIN:  # it reclaimed less than asked for: the page tables show what
                raise
        if all(pagemap.entry(place.address, place.pid).swap for place in places):
            return
    shown = ", ".join(f"{place} {pagemap.entry(place.address, place.pid)}" for place in places)
    raise AssertionError(f"reclaim of {group} does not unmap the page: {shown}")


def read_back(*mappings: Mapping) -> None:
    """Read swapped-out pages of this process's control group, and leave none of them in the swap cache.

    Memory failure treats poisoned pages in the swap cache differently (``me_swapcache_dirty()``,
    mm/memory-failure.c). The fault that is the last user of a swap slot frees it if the group is short of swap
    (``should_try_to_free_swap()``, mm/memory.c).
    """
    limit = memcg.current() / "memory.swap.max"
    limit.write_text("0")
    try:
        for mapping in mappings:
            mapping.touch_read()
    finally:
        limit.write_text("max")
    for address in (address for mapping in mappings for address in mapping.page_addresses):
        state = kpage.describe(pagemap.pfn(address))
        assert kpage.Flag.SWAPCACHE not in kpage.flags_at(address), f"still in the swap cache: {address:#x} {state}"
