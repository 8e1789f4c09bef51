# SPDX-License-Identifier: GPL-2.0
"""Probes that make the kernel collect the accessed bits of a page from all its mappings.

They are asked one place at a time: the page is touched through that place alone, and if the kernel learns of it, the
walk found the place. Before that the kernel has to see the page unused while nobody touches it, or the answer would
prove nothing. Each walk needs somebody in the process of the place to touch it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

from guest_tests.mm import numa
from guest_tests.mm.probes import damon, offline
from guest_tests.mm.probes.base import Answer, Probe
from guest_tests.mm.probes.place import Page, Place, changes, touch

_BITMAP: Final = Path("/sys/kernel/mm/page_idle/bitmap")


class IdleBitmap(Probe):
    """The idle-page bitmap: marked idle, touched through one place, and read.

    Both marking and reading walk (page_idle_clear_pte_refs(), mm/page_idle.c). A mapping that they miss keeps its
    accessed bit unseen, and the page stays idle.
    """

    name = "idle_bitmap"
    #: a walk gives up where it cannot lock the page at once (ksmd and reclaim lock it now and then)
    tries: Final = 3

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return None if _BITMAP.exists() else "needs CONFIG_IDLE_PAGE_TRACKING"

    def refuse(self, page: Page) -> str | None:
        """See :meth:`Probe.refuse`.

        Reading counts complete words only, so that of a machine whose memory ends within one, as x86's often does, the
        last frames can be marked but not looked at (page_idle_bitmap_read(), mm/page_idle.c, 7.3).
        """
        return None if self._word(page) else "the bitmap cannot be read so far: memory ends within the page's word"

    def force(self, page: Page) -> str:
        """Mark the page idle."""
        with open(_BITMAP, "r+b", buffering=0) as file:
            # Zeros change nothing.
            os.pwrite(file.fileno(), (1 << page.pfn % 64).to_bytes(8, "little"), page.pfn // 64 * 8)
        return ""

    def idle(self, page: Page) -> bool:
        """Whether the page is still idle."""
        return bool(int.from_bytes(self._word(page), "little") >> page.pfn % 64 & 1)

    def _word(self, page: Page) -> bytes:
        with open(_BITMAP, "rb", buffering=0) as file:
            return os.pread(file.fileno(), 8, page.pfn // 64 * 8)

    def look(self, page: Page) -> Answer:
        """See :meth:`Probe.look`."""
        drain()
        if not any(self._stays_idle(page) for _ in range(self.tries)):
            return self.unable("the page does not stay idle while nobody touches it", changes(page.before, page.before))
        found = frozenset(place for place in page.places if any(self._seen(page, place) for _ in range(self.tries)))
        return Answer(self.name, found, frozenset(page.places) - found, _seen_at(page, found))

    def _stays_idle(self, page: Page) -> bool:
        self.force(page)
        return self.idle(page)

    def _seen(self, page: Page, place: Place) -> bool:
        self.force(page)
        return place.run(touch, place.address) and not self.idle(page)


class DamonAccess(Probe):
    """DAMON's monitoring of physical memory: is an access through this place noticed?

    Every sample clears the accessed bits by one walk and looks at them by another (damon_folio_mkold() and
    damon_folio_young(), mm/damon/ops-common.c).
    """

    name = "damon"
    #: Aggregations to touch the page for, one after the other while nothing was seen: a guest on a busy host may sleep
    #: through all samples of one (2 were too short on a host with four times as much to do as it has processors).
    windows: Final = (2, 4, 8)
    _kdamond: damon.Kdamond
    _applied: int

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return damon.missing()

    def force(self, page: Page) -> str:
        """Let DAMON start."""
        try:
            self._kdamond.command("on")
        except OSError as error:
            return str(error)
        return ""

    def look(self, page: Page) -> Answer:
        """See :meth:`Probe.look`."""
        drain()
        with damon.Kdamond(page.pfn, "stat", accessed=True) as kdamond:
            self._kdamond = kdamond
            remark = self.force(page)
            if not kdamond.running:
                return self.unable("DAMON does not run", remark or "nobody started it")
            before = kdamond.settled()  # the first samples still see accesses from before
            self._applied = kdamond.settled()
            if self._applied != before:
                evidence = f"seen accessed in {self._applied - before} aggregations"
                return self.unable("the page is accessed although nobody touches it", evidence)
            found = frozenset(
                place for place in page.places if any(self._seen(kdamond, place, window) for window in self.windows)
            )
        return Answer(self.name, found, frozenset(page.places) - found, _seen_at(page, found))

    def _seen(self, kdamond: damon.Kdamond, place: Place, window: int) -> bool:
        place.run(touch_for, place.address, window * kdamond.aggregation, kdamond.sample / 2)
        before, self._applied = self._applied, kdamond.settled()
        return self._applied > before


def drain() -> None:
    """Flush the per-CPU batches of pages on their way to an LRU list: idle tracking and DAMON skip pages in them.

    move_pages(2) does so first of all, even for no page (lru_cache_disable() in do_pages_move(), mm/migrate.c, 5.13).
    """
    try:
        numa.move_pages(0, [], [])
    except OSError:  # without CONFIG_NUMA
        offline.attempt(Path("/proc/sys/vm/compact_memory"), "1", "drain")


def touch_for(address: int, seconds: float, pause: float) -> None:
    """Touch again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        touch(address)
        time.sleep(pause)


def _seen_at(page: Page, found: frozenset[Place]) -> str:
    return ", ".join(
        f"{place} {page.before[place]}: access {'seen' if place in found else 'not seen'}" for place in page.places
    )
