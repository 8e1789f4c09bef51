# SPDX-License-Identifier: GPL-2.0
"""Evidence for the report of a failed test: its memory before the first move and at the failure, and its moves."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from guest_tests.mm import maps, pagemap
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut
from guest_tests.support.observer import Observed, Observer

#: limits on what a report shows: more would not be read
_MOST_MOVES: Final = 40
_MOST_LINES: Final = 120
_MOST_PAGES: Final = 4096


class Evidence(Observer):
    """Notes the carve-outs and moves of one test, in this process, from construction on."""

    def __init__(self, observed: Observed) -> None:
        self._observed = observed
        self._moves: list[str] = []
        self._count = 0
        self._before: _Memory = []
        self._after: _Memory = []
        observed.subscribe(self)

    def sections(self) -> list[tuple[str, str]]:
        """Titles and texts for the report; none if the test had no carve-out."""
        after = self._after or _read(self._observed.areas)
        moves = "\n".join(self._moves)
        if self._count > len(self._moves):
            moves += f"\n… and {self._count - len(self._moves)} more"
        named = {
            "memory under test before the first move": _tell(self._before),
            "moves": moves,
            "memory under test at the failure": _tell(after),
        }
        return [(title, text) for title, text in named.items() if text]

    def area_failing(self, area: CarveOut) -> None:
        """See :meth:`Observer.area_failing`."""
        if not self._after:
            self._after = _read(self._observed.areas)

    def moving(self, call: str) -> None:
        """See :meth:`Observer.moving`."""
        self._count += 1
        if self._count == 1:
            self._before = _read(self._observed.areas)

    def moved(self, call: str, result: int | OSError) -> None:
        """See :meth:`Observer.moved`."""
        if len(self._moves) < _MOST_MOVES:
            outcome = hex(result) if isinstance(result, int) else errno.errorcode.get(result.errno or 0, str(result))
            self._moves.append(f"{call} = {outcome}")


@dataclass(frozen=True)
class _Part:
    """The part of a mapping that lies in a carve-out, as it was at one instant."""

    vma: maps.Vma
    #: the number of its first page in the carve-out
    first: int
    #: pagemap's 64 bits for each page
    words: Sequence[int]


_Memory = list[tuple[CarveOut, list[_Part]]]


def _read(areas: Iterable[CarveOut]) -> _Memory:
    """Read what :func:`_tell` needs. Text is made of it only if the test fails."""
    memory: _Memory = []
    for area in areas:
        parts = []
        for vma in maps.vmas_between(area.address, area.end, detailed=True):
            start, end = max(vma.start, area.address), min(vma.end, area.end)
            pages = min((end - start) // PAGE_SIZE, _MOST_PAGES) if vma.perms != "---s" else 0
            parts.append(_Part(vma, (start - area.address) // PAGE_SIZE, pagemap.words(start, pages)))
        memory.append((area, parts))
    return memory


def describe(areas: Iterable[CarveOut]) -> str:
    """The mappings and pages of carve-outs as text, at most some hundred lines."""
    return _tell(_read(areas))


def _tell(memory: _Memory) -> str:
    lines = []
    for area, parts in memory:
        lines.append(f"carve-out {area.address:#x}-{area.end:#x}, {area.pages} pages of {PAGE_SIZE >> 10} kB")
        for part in parts:
            vma = part.vma
            sizes = ", ".join(f"{name} {size}" for name, size in vma.sizes.items() if size and "PageSize" not in name)
            lines.append(f"  from page {part.first}: {vma}: {sizes} kB; {' '.join(sorted(vma.vm_flags))}")
            lines += [f"    {line}" for line in _pages(part)]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"… and {len(lines) - _MOST_LINES} more lines"]
    return "\n".join(lines)


def _pages(part: _Part) -> Iterator[str]:
    for text, run in itertools.groupby(enumerate(part.words, part.first), key=lambda pair: _entry(pair[1])):
        numbers = [number for number, _ in run]
        which = f"page {numbers[0]}" if len(numbers) == 1 else f"pages {numbers[0]} to {numbers[-1]}"
        yield f"{which}: {text}"


def _entry(word: int) -> str:
    entry = pagemap.Entry(word)
    marks = [name for name in ("exclusive", "file", "guard", "uffd_wp", "soft_dirty") if getattr(entry, name)]
    return " ".join([str(entry), *marks])
