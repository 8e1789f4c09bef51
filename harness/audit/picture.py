# SPDX-License-Identifier: GPL-2.0
"""Draws audited memory as one HTML page, which loads nothing else.

Each panel shows one audit, and each strip in it one process. Bars are VMAs, with their bounds and page offset. Cells
are pages, coloured by frame number. Curves join the KSM pages that share a frame. The rows below the pages show whether
rmap walks find each page there, as the audit and each probe saw it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path

from harness.audit.result import Audit, Page, Region

#: pages drawn of one process; the number of the others is shown
_MOST_PAGES = 160
#: discrepancies listed below the drawing
_MOST_LISTED = 100

_CELL, _GAP, _LEFT = 38, 14, 150
_BAR, _PAGE, _ROW = 40, 26, 18
_FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"

#: what the audit or a probe found: process ID and address to whether the page is found there
Witness = Mapping[tuple[int, int], bool]


@dataclass(frozen=True)
class Panel:
    """One audit.

    :param title: says when it happened.
    :param audit: its result; only the pages listed in it are drawn.
    :param witnesses: what probes found, by their name.
    """

    title: str
    audit: Audit
    witnesses: Mapping[str, Witness] = field(default_factory=dict)


def html(title: str, panels: Sequence[Panel]) -> str:
    """The HTML page."""
    listed = [
        f"<li>{escape(panel.title)}: <b>{escape(each.kind)}</b> ({escape(each.severity)}): {escape(each.sentence)}</li>"
        for panel in panels
        for each in panel.audit.discrepancies
    ]
    more = f"<p>… and {len(listed) - _MOST_LISTED} more</p>" if len(listed) > _MOST_LISTED else ""
    text = f"<ul>{''.join(listed[:_MOST_LISTED])}</ul>{more}" if listed else "<p>None.</p>"
    return (
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
        f"<title>{escape(title)}</title><style>body{{font:14px/1.5 'DejaVu Sans',Verdana,sans-serif;margin:24px;"
        "color:#222;background:#fff}svg{max-width:none}div{overflow-x:auto}</style></head><body>"
        f"<h1>{escape(title)}</h1><div>{svg(panels)}</div><h2>Discrepancies</h2>{text}</body></html>\n"
    )


def svg(panels: Sequence[Panel]) -> str:
    """The drawing without the list of discrepancies."""
    parts: list[str] = []
    top, width = 12, 760
    for panel in panels:
        drawn, height, reach = _panel(panel, top)
        parts += drawn
        top += height
        width = max(width, reach)
    parts += _legend(top)
    top += 56
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{top}' viewBox='0 0 {width} {top}'>"
        f"<rect width='{width}' height='{top}' fill='#fff'/>{''.join(parts)}</svg>"
    )


def _panel(panel: Panel, top: int) -> tuple[list[str], int, int]:
    wrong = len(panel.audit.errors)
    verdict = f"{wrong} error{'s' * (wrong > 1)}" if wrong else "no errors"
    parts = [
        _text(12, top + 16, panel.title, size=15, weight="bold"),
        _text(
            12, top + 34, f"{panel.audit.release} ({panel.audit.arch}), {verdict}", colour="#b00" if wrong else "#060"
        ),
    ]
    y, reach = top + 48, 0
    centres: dict[int, list[tuple[float, int]]] = {}
    for pid in sorted({page.pid for page in panel.audit.pages}):
        strip = _Strip(panel, pid)
        drawn, height = strip.draw(y, centres)
        parts += drawn
        y += height
        reach = max(reach, strip.width)
    if not panel.audit.pages:
        parts.append(_text(_LEFT, y + 12, "no anonymous page is present here", colour="#777"))
        y += 24
    return [*_joins(centres), *parts], y - top + 16, reach


class _Strip:
    """The pages of one process in one panel."""

    def __init__(self, panel: Panel, pid: int) -> None:
        self._panel = panel
        self._size = panel.audit.page_size
        self._pages = {page.address: page for page in panel.audit.pages if page.pid == pid}
        self._pid = pid
        regions = [each for each in panel.audit.regions if each.pid == pid]
        wanted = sorted(self._pages)
        #: the first page: bounds and page offsets in the strip are relative to it
        self._base = min(self._pages, default=0)
        self._regions = [each for each in regions if any(each.start <= at < each.end for at in wanted)]
        self._slots: dict[int, int] = {}
        self.width = _LEFT
        self.hidden = 0
        self._lay_out()

    def _lay_out(self) -> None:
        """Give each page a place in the drawing; holes between VMAs and between pages shrink to a small gap."""
        x, before = _LEFT, None
        for region in self._regions:
            if before is not None and before != region.start:
                x += _GAP
            inside = [at for at in self._pages if region.start <= at < region.end]
            # Two pages on each side of a present page are drawn too, so that empty pages beside it show.
            near = {at + step * self._size for at in inside for step in range(-2, 3)}
            last = None
            for at in sorted(each for each in near if region.start <= each < region.end):
                if len(self._slots) >= _MOST_PAGES:
                    self.hidden += at in self._pages
                    continue
                if last is not None and last + self._size != at:
                    x += _GAP
                self._slots[at] = x
                x += _CELL
                last = at
            before = region.end
        self.width = x + 24

    def draw(self, top: int, centres: dict[int, list[tuple[float, int]]]) -> tuple[list[str], int]:
        name = next((each.process for each in self._regions), f"process {self._pid}")
        parts = [_text(12, top + 16, name, weight="bold", width=_LEFT - 20)]
        parts.append(_text(12, top + 32, f"from {self._base:#x}", size=10, colour="#555"))
        for region in self._regions:
            parts += self._bar(region, top)
        cells = top + _BAR + 14
        for at, x in self._slots.items():
            page = self._pages.get(at)
            parts += self._cell(page, x, cells)
            if page is not None and page.ksm:
                centres.setdefault(page.pfn, []).append((x + _CELL / 2, cells + _PAGE))
        y = cells + _PAGE + 18
        audited: Witness = {(page.pid, page.address): page.reached for page in self._pages.values()}
        for witness, answers in {"the audit": audited, **self._panel.witnesses}.items():
            if not any(pid == self._pid for pid, _ in answers):
                continue
            parts.append(_text(12, y + 13, witness, width=_LEFT - 20))
            for at, x in self._slots.items():
                if (self._pid, at) in answers:
                    parts.append(_mark(answers[self._pid, at], x + _CELL / 2, y + 8))
            y += _ROW
        if self.hidden:
            parts.append(_text(12, y + 13, f"… and {self.hidden} more pages of this process", colour="#777"))
            y += _ROW
        return parts, y - top + 14

    def _bar(self, region: Region, top: int) -> list[str]:
        places = [x for at, x in self._slots.items() if region.start <= at < region.end]
        if not places:
            return []
        left, right = min(places), max(places) + _CELL
        moved = region.pgoff - region.start // self._size
        what = f"moved: pgoff {'+' if moved > 0 else '−'}{abs(moved)}" if moved else "pgoff of this address"
        facts = [f"{region.start:#x} to {region.end:#x}", f"pgoff {region.pgoff:#x}", what]
        fill = "#ffe9c7" if moved else "#e6ecf5"
        tip = "; ".join([*facts, f"anon_vma {region.anon_vma:#x}", *region.apart])
        room = right - left
        base = self._base // self._size
        first, last = region.start // self._size - base, region.end // self._size - base
        lines = [f"{first}–{last}", f"off {region.pgoff - base}"]
        clip = f"v{self._pid}-{region.start:x}-{top}"
        return [
            f"<g><title>{escape(tip)}</title><clipPath id='{clip}'><rect x='{left}' y='{top}' width='{room - 2}' "
            f"height='{_BAR}'/></clipPath><rect x='{left}' y='{top}' width='{room - 2}' height='{_BAR}' rx='3' "
            f"fill='{fill}' stroke='#8a94a6'/><g clip-path='url(#{clip})'>",
            *(_text(left + 4, top + 16 + 15 * row, line, size=10) for row, line in enumerate(lines)),
            "</g></g>",
        ]

    def _cell(self, page: Page | None, x: int, y: int) -> list[str]:
        box = f"x='{x}' y='{y}' width='{_CELL - 2}' height='{_PAGE}' rx='2'"
        if page is None:
            return [f"<rect {box} fill='none' stroke='#c8cdd6' stroke-dasharray='3 3'/>"]
        edge = "stroke='#222' stroke-width='2'" if page.ksm else "stroke='#555'"
        if not page.reached:
            edge = "stroke='#d00000' stroke-width='3'"
        tip = (
            f"{page.address:#x}: pfn {page.pfn:#x}, index {page.index:#x}" if page.index >= 0 else f"{page.address:#x}"
        )
        kind = " (KSM)" if page.ksm else f" ({page.pages} pages)" if page.pages > 1 else ""
        return [
            f"<g><title>{escape(tip + kind)}</title><rect {box} fill='{_colour(page.pfn)}' {edge}/>",
            _text(x + _CELL / 2 - 1, y + 17, f"{page.pfn & 0xFFF:03x}", size=11, anchor="middle"),
            "</g>",
        ]


def _joins(centres: Mapping[int, Sequence[tuple[float, int]]]) -> list[str]:
    """Curves between the KSM pages that share a frame."""
    parts = []
    for pfn, points in centres.items():
        for (x, y), (to, below) in pairwise(points):
            dip = max(y, below) + 16
            parts.append(
                f"<path d='M{x},{y} C{x},{dip} {to},{dip} {to},{below}' fill='none' stroke='{_colour(pfn, 38)}' "
                f"stroke-width='3' stroke-opacity='0.55'><title>KSM: pfn {pfn:#x}</title></path>"
            )
    return parts


def _mark(found: bool, x: float, y: float) -> str:
    if found:
        return f"<path d='M{x - 5},{y} l3.5,4 l7,-9' fill='none' stroke='#0a7a20' stroke-width='2.5'/>"
    return f"<path d='M{x - 5},{y - 5} l10,10 m0,-10 l-10,10' fill='none' stroke='#d00000' stroke-width='3'/>"


def _legend(top: int) -> list[str]:
    y = top + 12
    words = (
        "Bars are VMAs: bounds and page offset (off), in pages from the strip's first page. "
        "Cells are pages: last digits of the PFN."
    )
    return [
        _text(12, y + 26, words, size=11, colour="#555"),
        f"<rect x='12' y='{y - 10}' width='26' height='14' fill='#e6ecf5' stroke='#8a94a6'/>",
        _text(44, y + 1, "VMA", size=11),
        f"<rect x='84' y='{y - 10}' width='26' height='14' fill='#ffe9c7' stroke='#8a94a6'/>",
        _text(116, y + 1, "moved VMA: page offset of another address", size=11),
        f"<rect x='412' y='{y - 10}' width='14' height='14' fill='{_colour(5)}' stroke='#222' stroke-width='2'/>",
        _text(432, y + 1, "KSM page", size=11),
        _mark(True, 540, y - 3),
        _text(552, y + 1, "rmap walks find it", size=11),
        _mark(False, 676, y - 3),
        _text(690, y + 1, "not found", size=11),
    ]


def _colour(pfn: int, light: int = 78) -> str:
    # Steps by the golden angle give neighbouring frames different colours.
    return f"hsl({pfn * 137.508 % 360:.0f},65%,{light}%)"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: float = 12,
    weight: str = "normal",
    colour: str = "#222",
    anchor: str = "start",
    width: int = 0,
) -> str:
    if width:
        text = text[: max(4, int(width / (size * 0.62)))]
    return (
        f"<text x='{x}' y='{y}' {_FONT} font-size='{size}' font-weight='{weight}' fill='{colour}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )


def interesting(audit: Audit, margin: int = 4) -> list[tuple[int, int, int]]:
    """The address ranges to draw by default: around errors, and moved VMAs; each as (process ID, start, end).

    :param margin: pages to draw on each side of an error.
    """
    pids = {region.process: region.pid for region in audit.regions}
    size = audit.page_size
    spans = [
        (pids[each.process], each.address - margin * size, each.address + margin * size)
        for each in audit.errors[:50]
        if each.process in pids and each.pfn is not None
    ]
    spans += [
        (each.pid, each.start, each.end) for each in audit.regions if each.anon_vma and each.pgoff != each.start // size
    ]
    return spans


def save(path: Path, title: str, panels: Iterable[Panel]) -> None:
    """Write the HTML page, or only the drawing if the name of the file ends in ``.svg``."""
    chosen = list(panels)
    path.write_text(svg(chosen) if path.suffix == ".svg" else html(title, chosen))
