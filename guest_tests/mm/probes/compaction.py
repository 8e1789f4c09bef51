# SPDX-License-Identifier: GPL-2.0
"""A probe that has memory compacted, in a way that makes the page one of those that have to move."""

from __future__ import annotations

import array
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guest_tests.mm import numa, pagemap, syscalls, vmstat
from guest_tests.mm.kpage import Flag
from guest_tests.mm.mapping import PAGE_SIZE, Mapping, map_anonymous
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.base import Answer
from guest_tests.mm.probes.migration import MigrationProbe
from guest_tests.mm.probes.place import Page, changes, observe

#: what may be spent on making free frames
_MOST_BALLAST: Final = (24 << 20) // PAGE_SIZE
_CHUNK: Final = 1024
_COMPACT: Final = Path("/proc/sys/vm/compact_memory")
_PCP: Final = Path("/proc/sys/vm/percpu_pagelist_high_fraction")


class Compaction(MigrationProbe):
    """Compaction of the zone that the page lies in.

    Compaction moves the lowest movable pages of a zone to free frames in its highest *partly* used blocks, until the
    two scanners meet (compact_zone(), mm/compaction.c). So there have to be more such frames above the page than
    movable pages below it. They are made by filling memory and freeing every second frame: those of even number,
    because the scanner looks at every 32nd frame only while it finds none (isolate_freepages()).

    Where the page lies too high for that, move_pages(2) brings it to the emptiest node first. If that fails the answer
    is inconclusive: compaction may well never have tried.
    """

    name = "compaction"
    tries = 1
    #: how often the page is brought to another frame because compaction has no use for it where it lies
    hops: Final = 4

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return None if _COMPACT.exists() else "needs CONFIG_COMPACTION"

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        place = page.places[0]
        node = Path(f"/sys/devices/system/node/node{numa.node_of(place.address, place.pid)}/compact")
        return offline.attempt(node if node.exists() else _COMPACT, "1", "compaction")

    def look(self, page: Page) -> Answer:
        """See :meth:`Probe.look`."""
        zone = _zone_of(page.pfn)
        with _Ballast(zone.node) as ballast:
            if ballast.make_room(zone, page.pfn):
                return self._compact(page, ballast)
        with _Ballast(_emptiest()) as ballast:
            for _ in range(self.hops):
                # Filled while the page is away, or it would get back the frame that it left: the last one freed.
                away = _moved(page, next((node for node in numa.nodes() if node != ballast.node), None))
                ballast.grow()
                there = away and _moved(away, ballast.node)
                if there is None:
                    return self.unable(
                        "compaction has no use for the page where it lies, and move_pages() cannot bring it elsewhere",
                        f"{ballast}; {changes(page.before, observe(page.places))}",
                    )
                page = there
                if ballast.make_room(_zone_of(page.pfn), page.pfn):
                    answer = self._compact(page, ballast)
                    return replace(answer, evidence=f"brought to node {ballast.node}; {answer.evidence}")
            return self.unable("compaction has no use for the page wherever it lies", str(ballast))

    def _compact(self, page: Page, ballast: _Ballast) -> Answer:
        answer = super().look(page)
        return replace(answer, evidence=f"{answer.evidence}; {ballast}")


def _emptiest() -> int:
    return max(numa.nodes(), key=numa.free_kb)


def _moved(page: Page, node: int | None) -> Page | None:
    """The page after it was moved to ``node``, or None if there is no such node or the page does not follow."""
    place = page.places[0]
    if node is None:
        return None
    if numa.node_of(place.address, place.pid) == node:
        return page
    numa.move_pages(place.pid, [place.address], [node], numa.MPOL_MF_MOVE_ALL)
    before = observe(page.places)
    moved = page.moved_to(before)
    return None if moved is None else Page(moved, page.places, before)


class _Ballast:
    """Memory of one node that is filled and then riddled with free frames. A context manager that frees it."""

    def __init__(self, node: int) -> None:
        self.node = node
        self._chunks: list[Mapping] = []
        self._high_fraction = ""
        self._story = f"nothing done on node {node}"

    def __enter__(self) -> Self:
        # Freed frames would wait in per-CPU lists, where compaction does not see them.
        if _PCP.exists():
            self._high_fraction = _PCP.read_text()
            _PCP.write_text("1000000")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for chunk in self._chunks:
            chunk.unmap()
        if self._high_fraction:
            _PCP.write_text(self._high_fraction)

    def __str__(self) -> str:
        return self._story

    def grow(self) -> bool:
        """Fill some more memory; False when enough was spent."""
        if (len(self._chunks) + 1) * _CHUNK > _MOST_BALLAST:
            return False
        chunk = map_anonymous(_CHUNK)
        self._chunks.append(chunk)
        chunk.madvise(syscalls.MADV_NOHUGEPAGE)
        numa.mbind(chunk.address, chunk.length, numa.MPOL_BIND, [self.node])
        chunk.madvise(syscalls.MADV_POPULATE_WRITE)
        return True

    def make_room(self, zone: _Zone, pfn: int) -> bool:
        """Make more free frames in blocks above ``pfn`` than there are movable pages below it; whether that worked."""
        block = max(1, vmstat.meminfo().get("Hugepagesize", 2048) * 1024 // PAGE_SIZE)
        # Not the next block: once its own is scanned to the end the scanners count as having met there.
        above = range((pfn // block + 2) * block, zone.end)
        if not above:
            self._story = f"{pfn:#x} lies in the last blocks of {zone}"
            return False
        below = zone.movable_below(pfn) - sum(zone.start <= frame < pfn for _, frame in self._frames())
        wanted = below + below // 8 + 64
        holes: list[int] = []
        while wanted * 2 <= _MOST_BALLAST:
            holes = [address for address, frame in self._frames() if frame in above and frame % 2 == 0]
            if len(holes) >= wanted or not self.grow():
                break
        self._story = f"{below} movable frames below {pfn:#x} in {zone}, {len(holes)} free ones can be made above"
        if len(holes) < wanted:
            return False
        # What lies below would have to move first.
        lower = [address for address, frame in self._frames() if frame not in above]
        for address in [*lower, *holes[: 2 * wanted]]:
            syscalls.madvise(address, PAGE_SIZE, syscalls.MADV_DONTNEED)
        return True

    def _frames(self) -> Iterator[tuple[int, int]]:
        for chunk in self._chunks:
            for index, frame in enumerate(pagemap.pfns(chunk.address, chunk.pages)):
                if frame is not None:
                    yield chunk.page(index), frame


@dataclass(frozen=True)
class _Zone:
    node: int
    name: str
    start: int
    end: int

    def __str__(self) -> str:
        return f"zone {self.name} of node {self.node}"

    def movable_below(self, pfn: int) -> int:
        """How many frames before ``pfn`` are on an LRU list."""
        with open("/proc/kpageflags", "rb", buffering=0) as file:
            words = array.array("Q")
            position = self.start
            while position < pfn:
                data = os.pread(file.fileno(), min(pfn - position, 1 << 16) * 8, position * 8)
                if not data:
                    break
                words.frombytes(data)
                position += len(data) // 8
        # Few different words: counting them first leaves little to look at.
        return sum(count for word, count in Counter(words).items() if word & Flag.LRU)


def _zone_of(pfn: int) -> _Zone:
    node, name, spanned = 0, "", 0
    for line in Path("/proc/zoneinfo").read_text().splitlines():
        if match := re.match(r"Node (\d+), zone +(\w+)", line):
            node, name, spanned = int(match[1]), match[2], 0
        elif match := re.match(r" +spanned +(\d+)", line):
            spanned = int(match[1])
        elif match := re.match(r" +start_pfn: +(\d+)", line):
            start = int(match[1])
            if start <= pfn < start + spanned:
                return _Zone(node, name, start, start + spanned)
    raise LookupError(f"no zone of /proc/zoneinfo holds frame {pfn:#x}")
