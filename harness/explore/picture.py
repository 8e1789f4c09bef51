# SPDX-License-Identifier: GPL-2.0
"""Draws what a program does to its memory, as the pictures of the written tests do."""

from __future__ import annotations

from harness.explore.story import Story
from harness.programs.language import Kind

#: what the letters mean, for a line below the picture
LEGEND = "A letter is what a page holds, A is the same for all pages that have it, - is zeros, . is nothing."


def picture(story: Story) -> list[str]:
    """The lines of the picture: a row for each operation, and a column for each page that is ever mapped."""
    segments = _segments(story)
    head = "  ".join(str(start).ljust(2 * (end - start) + 3) for start, end in segments)
    rows = [("page", head.rstrip())]
    for event in story.events:
        label = event.kind.value
        if event.error:
            label += " (refused)"
        for process, row in enumerate(event.rows):
            if not row or (process != event.process and event.kind is not Kind.FORK):
                continue
            who = f"process {process}: " if story.forks else ""
            rows.append((f"{who}{label}", "  ".join(_cell(row[start:end]) for start, end in segments)))
    width = max(len(label) for label, _ in rows)
    return [f"{label.ljust(width)}  {text}".rstrip() for label, text in rows]


def _cell(row: str) -> str:
    return f"| {' '.join(row)} |"


def _segments(story: Story) -> list[tuple[int, int]]:
    """The ranges of pages that are mapped at any time."""
    ever = [False] * story.pages
    for event in story.events:
        for row in event.rows:
            for page, shown in enumerate(row):
                ever[page] = ever[page] or shown != "."
    found: list[tuple[int, int]] = []
    for page, mapped in enumerate(ever):
        if mapped and found and found[-1][1] == page:
            found[-1] = (found[-1][0], page + 1)
        elif mapped:
            found.append((page, page + 1))
    return found
