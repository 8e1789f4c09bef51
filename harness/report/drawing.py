# SPDX-License-Identifier: GPL-2.0
"""Draws the memory under test before the first move and at the failure, from the text that the evidence has of it.

``guest_tests/support/evidence.py`` writes the text. A guest sent it, so nothing is drawn of lines in any other form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

#: The sections that are drawn, with what stands above each drawing.
SECTIONS = {
    "memory under test before the first move": "before the first move",
    "memory under test at the failure": "at the failure",
}

#: What lies between the two drawings.
MOVES = "moves"

#: Pages that are drawn of one carve-out. The text beside the drawing has more.
_MOST_PAGES = 64

_CARVE_OUT = re.compile(r"carve-out (0x[0-9a-f]{1,16})-0x[0-9a-f]{1,16}, \d{1,9} pages of \d{1,9} kB")
_MAPPING = re.compile(r"  from page (\d{1,9}): (0x[0-9a-f]{1,16})-(0x[0-9a-f]{1,16}) ([a-z-]{4})")
_PAGES = re.compile(r"    pages? (\d{1,9})(?: to (\d{1,9}))?: (\S.{0,199})")
_FRAME = re.compile(r"pfn (0x[0-9a-f]{1,16})")

#: The permissions of what is reserved and not mapped.
_RESERVED = "---s"

STYLE = """
.memory { display: grid; gap: 2px; overflow-x: auto; font: 11px/1.3 ui-monospace, monospace; margin: .3rem 0 .6rem; }
.memory > * { padding: .15rem .3rem; border-radius: 3px; white-space: nowrap; overflow: hidden; }
.memory .number { color: var(--dim); text-align: center; }
.memory .vma { background: var(--soft); border: 1px solid var(--line); }
.memory .page { border: 1px solid var(--line); text-align: center; }
.memory .frame { background: hsl(var(--hue) 70% 86%); }
.memory .swap { background: repeating-linear-gradient(45deg, var(--known), var(--known) 4px, var(--soft) 4px,
                var(--soft) 8px); }
@media (prefers-color-scheme: dark) { .memory .frame { background: hsl(var(--hue) 45% 26%); } }
"""


@dataclass(frozen=True)
class _Block:
    """Some pages that have one look."""

    first: int
    last: int
    text: str


@dataclass(frozen=True)
class _CarveOut:
    """A carve-out at one time."""

    address: str
    mappings: Sequence[_Block]
    pages: Sequence[_Block]


def drawing(sections: Mapping[str, str]) -> Iterator[str]:
    """The drawings of a test's memory, with the moves between them; nothing if there is nothing to draw.

    :param sections: text by title.
    """
    drawn = {title: _parsed(sections[title]) for title in SECTIONS if title in sections}
    columns = {
        address: _columns([each for areas in drawn.values() for each in areas if each.address == address])
        for address in dict.fromkeys(each.address for areas in drawn.values() for each in areas)
    }
    for title, areas in drawn.items():
        if title != next(iter(SECTIONS)) and sections.get(MOVES):
            yield f"<p><code>{'<br>'.join(escape(line) for line in sections[MOVES].splitlines())}</code></p>"
        for area in areas:
            yield f'<p class="dim">{escape(SECTIONS[title])}: carve-out at {escape(area.address)}</p>'
            yield from _grid(area, columns[area.address])


def _parsed(text: str) -> list[_CarveOut]:
    found: list[_CarveOut] = []
    mappings: list[_Block] = []
    pages: list[_Block] = []
    skipped = False
    for line in text.split("\n"):
        if match := _CARVE_OUT.match(line):
            mappings, pages = [], []
            found.append(_CarveOut(match[1], mappings, pages))
        elif found and (match := _MAPPING.match(line)):
            skipped = match[4] == _RESERVED
            if not skipped:
                mappings.append(_Block(int(match[1]), int(match[1]), match[4]))
        elif found and mappings and not skipped and (match := _PAGES.match(line)):
            block = _Block(int(match[1]), int(match[2] or match[1]), match[3])
            if mappings[-1].first <= block.first <= block.last:
                pages.append(block)
                mappings[-1] = _Block(mappings[-1].first, block.last, mappings[-1].text)
    return [each for each in found if each.pages]


def _columns(areas: Sequence[_CarveOut]) -> Mapping[int, int]:
    """Column by page, for each page that is mapped at any time. What is never mapped takes no room."""
    pages: set[int] = set()
    for block in (block for area in areas for block in area.pages):
        pages.update(range(block.first, min(block.last, block.first + _MOST_PAGES) + 1))
    return {page: column for column, page in enumerate(sorted(pages)[:_MOST_PAGES], 1)}


def _grid(area: _CarveOut, columns: Mapping[int, int]) -> Iterator[str]:
    yield f'<div class="memory" style="grid-template-columns: repeat({len(columns)}, minmax(4.2rem, max-content))">'
    for page, column in columns.items():
        yield f'<div class="number" style="grid-area: 1 / {column}">{page}</div>'
    for row, blocks in ((2, area.mappings), (3, area.pages)):
        for block in blocks:
            shown = [columns[page] for page in columns if block.first <= page <= block.last]
            if shown:
                yield _block(block, row, min(shown), max(shown) + 1)
    yield "</div>"


def _block(block: _Block, row: int, start: int, end: int) -> str:
    area = f"grid-area: {row} / {start} / {row + 1} / {end}"
    title = escape(f"page {block.first}: {block.text}" if block.first == block.last else block.text)
    if row == 2:
        return f'<div class="vma" style="{area}">{escape(block.text)}</div>'
    if match := _FRAME.match(block.text):
        # A hue for each frame: pages that share a frame look the same, and a page that migrated looks different.
        hue = int(match[1], 16) * 47 % 360
        return f'<div class="page frame" style="{area}; --hue: {hue}" title="{title}">{escape(match[1])}</div>'
    word = block.text.split()[0]
    kind = "page swap" if word == "swap" else "page"
    return f'<div class="{kind}" style="{area}" title="{title}">{escape(word)}</div>'
