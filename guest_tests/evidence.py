# SPDX-License-Identifier: GPL-2.0
"""Evidence for a test that fails: the mappings and page tables of its carve-outs before it moved anything and at the
failure, and the moves in between."""

from __future__ import annotations

import errno
import itertools
import re
from collections.abc import Callable, Iterable
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut

#: more than a person reads
_MOST_MOVES: Final = 40
_MOST_LINES: Final = 120
_MOST_PAGES: Final = 4096
_HEAD: Final = re.compile(rb"([0-9a-f]+)-[0-9a-f]+ ")


class Evidence:
    """Watches the carve-outs and moves of one test, in this process, from construction on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._areas: list[CarveOut] = []
        self._moves: list[str] = []
        self._count = 0
        self._before = ""
        self._after = ""
        # The library has no hooks, and needs none but these: every carve-out begins and ends in one of the first
        # three, and every move is looked up in the module of system calls when it is made.
        self._wrap_areas(patch)
        patch.setattr(syscalls, "mremap", self._watched(syscalls.mremap))

    def sections(self) -> list[tuple[str, str]]:
        """Titles and texts for the report; none if the test had no carve-out."""
        after = self._after or describe(self._areas)
        moves = "\n".join(self._moves)
        if self._count > len(self._moves):
            moves += f"\n… and {self._count - len(self._moves)} more"
        named = {
            "memory under test before the first move": self._before,
            "moves": moves,
            "memory under test at the failure": after,
        }
        return [(title, text) for title, text in named.items() if text]

    def _wrap_areas(self, patch: pytest.MonkeyPatch) -> None:
        begin, leave, close = CarveOut.__init__, CarveOut.__exit__, CarveOut.close

        def watched_begin(area: CarveOut, pages: int) -> None:
            begin(area, pages)
            self._areas.append(area)

        def watched_leave(
            area: CarveOut, kind: type[BaseException] | None, error: BaseException | None, at: object
        ) -> None:
            # An assertion that fails in a `with` block is reported only when the area is gone.
            if kind is not None and not self._after:
                self._after = describe(self._areas)
            leave(area, kind, error, None)

        def watched_close(area: CarveOut) -> None:
            close(area)
            if area in self._areas:
                self._areas.remove(area)

        patch.setattr(CarveOut, "__init__", watched_begin)
        patch.setattr(CarveOut, "__exit__", watched_leave)
        patch.setattr(CarveOut, "close", watched_close)

    def _watched(self, mremap: Callable[..., int]) -> Callable[..., int]:
        def watched_mremap(old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
            self._count += 1
            if self._count == 1:
                self._before = describe(self._areas)
            text = f"mremap({old:#x}, {old_length:#x}, {new_length:#x}, {flags:#x}, {new:#x}) = "
            try:
                address = mremap(old, old_length, new_length, flags, new)
            except OSError as error:
                self._note(text + errno.errorcode.get(error.errno or 0, str(error)))
                raise
            self._note(text + hex(address))
            return address

        return watched_mremap

    def _note(self, text: str) -> None:
        if len(self._moves) < _MOST_MOVES:
            self._moves.append(text)


def describe(areas: Iterable[CarveOut]) -> str:
    """Mappings and pages of carve-outs in words, at most a hundred lines or so."""
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
    # smaps is slow, and carve-outs lie below all else that is mapped: stop behind them.
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
