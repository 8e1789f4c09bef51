# SPDX-License-Identifier: GPL-2.0
"""Probes that make the kernel swap a page out, which has to turn every mapping of it into one same swap entry.

Reclaim leaves the entries it did find changed when it misses one (try_to_unmap() in shrink_folio_list(), mm/vmscan.c),
so these probes tell the lost place from the others. What was swapped out is no KSM page any more when it comes back.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from guest_tests.mm import kpage, memcg, swap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE
from guest_tests.mm.pagemap import Entry
from guest_tests.mm.probes import damon, offline
from guest_tests.mm.probes.ageing import drain
from guest_tests.mm.probes.base import EffectProbe
from guest_tests.mm.probes.place import Page, Place, observe

#: type and offset of a swap entry in pagemap
_SLOT: Final = (1 << 55) - 1


class SwapProbe(EffectProbe):
    """A probe after which every place it found holds one same swap entry."""

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return None if swap.free_kb() else "needs free swap (CONFIG_SWAP, and a swap device or CONFIG_ZRAM)"

    def followed(self, page: Page, after: Mapping[Place, Entry]) -> frozenset[Place]:
        """The places of the page that hold the swap entry most of them hold."""
        slots = Counter(after[place].raw & _SLOT for place in page.mapped if after[place].swap)
        if not slots:
            return frozenset()
        slot = slots.most_common(1)[0][0]
        return frozenset(place for place in page.mapped if after[place].swap and after[place].raw & _SLOT == slot)


class Reclaim(SwapProbe):
    """memory.reclaim of the control group that the page is charged to.

    The page must be charged to a group of its own, not to the root group with everything else: enter one before
    allocating (:class:`guest_tests.mm.memcg.Memcg`). All of the group is swapped out. Several tries are needed, because
    the LRU spares what was referenced since it last looked and, under CONFIG_LRU_GEN, the youngest generations.
    """

    name = "reclaim"
    tries = 8

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        if not memcg.available():
            return f"needs CONFIG_MEMCG and cgroup version 2 mounted at {memcg.ROOT}, with the memory controller"
        if not (memcg.ROOT / "memory.reclaim").exists():
            return "needs Linux 5.19 (memory.reclaim)"
        return super().missing()

    def refuse(self, page: Page) -> str | None:
        """See :meth:`Probe.refuse`."""
        group = charged_to(page.pfn)
        if group is None or group == memcg.ROOT:
            return "the page is charged to no control group of its own: enter one before allocating it"
        return None

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        group = charged_to(page.pfn)
        if group is None:
            return "the frame was freed"
        # All of it: EAGAIN because it got less is no news, the page tables tell.
        offline.attempt(group / "memory.reclaim", (group / "memory.current").read_text(), "reclaim")
        return ""


class DamonPageout(SwapProbe):
    """DAMON told to page out the frame (action ``pageout``), whoever maps it and whatever it is charged to.

    It spares a page that was accessed since it last looked (damon_pa_pageout(), mm/damon/paddr.c), hence the tries.
    """

    name = "damon_pageout"

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return damon.missing() or super().missing()

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        drain()
        with damon.Kdamond(page.pfn, "pageout", accessed=False) as kdamond:
            try:
                kdamond.command("on")
            except OSError as error:
                return str(error)
            time.sleep(3 * kdamond.aggregation)
            if not self.followed(page, observe(page.places)):
                kdamond.settled()  # a guest on a busy host may have stood still during most of that time
        return ""


class Pageout(SwapProbe):
    """MADV_PAGEOUT, for pages that only one place maps.

    The kernel leaves others alone (madvise_cold_or_pageout_pte_range(), mm/madvise.c).
    """

    name = "pageout"

    def refuse(self, page: Page) -> str | None:
        """See :meth:`Probe.refuse`."""
        count = kpage.mapcount(page.pfn)
        return None if count == 1 else f"MADV_PAGEOUT leaves pages alone that are mapped {count} times"

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        place = page.places[0]
        drain()
        try:
            place.run(syscalls.madvise, place.address, PAGE_SIZE, syscalls.MADV_PAGEOUT)
        except OSError as error:
            return str(error)
        return ""


def charged_to(pfn: int) -> Path | None:
    """The directory of the control group that frame ``pfn`` is charged to, or None if it is free.

    From /proc/kpagecgroup, which has the inode number of the directory.
    """
    with open("/proc/kpagecgroup", "rb", buffering=0) as file:
        inode = int.from_bytes(os.pread(file.fileno(), 8, pfn * 8), "little")
    if not inode:
        return None
    return next((Path(path) for path, _, _ in os.walk(memcg.ROOT) if os.stat(path).st_ino == inode), None)
