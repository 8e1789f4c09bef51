# SPDX-License-Identifier: GPL-2.0
"""Evidence for the report of a failed test: its memory before the first move and at the failure, and its moves."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Iterable
from typing import Final

from guest_tests.mm import maps, pagemap
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut
from guest_tests.support.observer import Observed, Observer

#: limits on what a report shows: more would not be read
_MOST_MOVES: Final = 40
_MOST_LINES: Final = 120
_MOST_PAGES: Final = 4096
_HEAD: Final = re.compile(rb"([0-9a-f]+)-[0-9a-f]+ ")


class Evidence(Observer):
    """Notes the carve-outs and moves of one test, in this process, from construction on."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._moves: list[str] = []
        self._count = 0
        self._before = ""
        self._after = ""
        observed.subscribe(self)

    def sections(self) -> list[tuple[str, str]]:
        """Titles and texts for the report; none if the test had no carve-out."""
        after = self._after or describe(self._observed.areas)
        moves = "\n".join(self._moves)
        if self._count > len(self._moves):
            moves += f"\n… and {self._count - len(self._moves)} more"
        named = {
            "memory under test before the first move": self._before,
            "moves": moves,
            "memory under test at the failure": after,
        }
        return [(title, text) for title, text in named.items() if text]

    def area_failing(self, area: CarveOut) -> None:
        """See :meth:`Observer.area_failing`."""
        if not self._after:
            self._after = describe(self._observed.areas)

    def moving(self, call: str) -> None:
        """See :meth:`Observer.moving`."""
        self._count += 1
        if self._count == 1:
            self._before = describe(self._observed.areas)

    def moved(self, call: str, result: int | OSError) -> None:
        """See :meth:`Observer.moved`."""
        if len(self._moves) < _MOST_MOVES:
            outcome = hex(result) if isinstance(result, int) else errno.errorcode.get(result.errno or 0, str(result))
            self._moves.append(f"{call} = {outcome}")


def describe(areas: Iterable[CarveOut]) -> str:
    """The mappings and pages of carve-outs as text, at most some hundred lines."""
    lines = []
    for area in areas:
        lines.append(f"carve-out {area.address:#x}-{area.end:#x}, {area.pages} pages of {PAGE_SIZE >> 10} kB")
        for vma in _smaps(area):
            sizes = ", ".join(f"{name} {size}" for name, size in vma.sizes.items() if size and "PageSize" not in name)
            first = (max(vma.start, area.address) - area.address) // PAGE_SIZE
            lines.append(f"  from page {first}: {vma}: {sizes} kB; {' '.join(sorted(vma.vm_flags))}")
            if vma.perms != "---s":
                lines += [f"    {line}" for line in _pages(area, vma)]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"… and {len(lines) - _MOST_LINES} more lines"]
    return "\n".join(lines)


def _smaps(area: CarveOut) -> list[maps.Vma]:
    # smaps is slow. Carve-outs lie below everything else that is mapped, so the reading stops behind them.
    text = bytearray()
    inside = False
    with open("/proc/self/smaps", "rb") as file:
        for line in file:
            head = _HEAD.match(line)
            if head is not None:
                start = int(head[1], 16)
                if start >= area.end:
                    break
                inside = start >= area.address - (1 << 24)
            if inside:
                text += line
    return [vma for vma in maps.parse_smaps(text.decode(errors="replace")) if vma.end > area.address]


def _pages(area: CarveOut, vma: maps.Vma) -> Iterable[str]:
    start, end = max(vma.start, area.address), min(vma.end, area.end)
    entries = pagemap.entries(start, min((end - start) // PAGE_SIZE, _MOST_PAGES))
    first = (start - area.address) // PAGE_SIZE
    for text, run in itertools.groupby(enumerate(entries, first), key=lambda pair: _entry(pair[1])):
        numbers = [number for number, _ in run]
        which = f"page {numbers[0]}" if len(numbers) == 1 else f"pages {numbers[0]} to {numbers[-1]}"
        yield f"{which}: {text}"


def _entry(entry: pagemap.Entry) -> str:
    marks = [name for name in ("exclusive", "file", "guard", "uffd_wp", "soft_dirty") if getattr(entry, name)]
    return " ".join([str(entry), *marks])
