# SPDX-License-Identifier: GPL-2.0
"""Writes the results of a matrix for a terminal or a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from harness.matrix.outcome import SURPRISES, Kind, Report, State, modules

#: Surprises that are listed for one cell. The JSON file and the HTML page have all.
_LISTED = 20

#: What stands behind a number in the table.
MARKS = {Kind.PASSED: "", Kind.SKIPPED: "s", Kind.FINDING: "f", Kind.FAILED: "!", Kind.MISSED: "?"}

LEGEND = "N passed, Ns skipped, Nf expected findings, N! failed, N? missed because the harness failed"


@dataclass(frozen=True)
class Paint:
    """Colours, if a person reads them."""

    on: bool

    def red(self, text: str) -> str:
        """What nobody expected."""
        return f"\033[31m{text}\033[0m" if self.on else text

    def bold(self, text: str) -> str:
        """A heading."""
        return f"\033[1m{text}\033[0m" if self.on else text


def lines(reports: Sequence[Report], width: int, paint: Paint) -> Iterator[str]:
    """The table, what was run again, and the surprises by name.

    :param width: the terminal's, in columns.
    """
    names = modules(reports)
    first = max((len(name) for name in (*names, "kernel", "all")), default=0)
    columns = [_column(each, names) for each in reports]
    for block in _blocks(columns, width - first):
        yield ""
        for row, name in enumerate(("kernel", "", *names, "all")):
            yield _row(name, row, block, first, paint).rstrip()
    yield ""
    yield LEGEND
    yield from _reruns(reports)
    yield from _surprises(reports, width, paint)
    yield ""
    yield total(reports)


def cell_line(report: Report) -> str:
    """One line about one cell."""
    if report.state is State.NOT_RUN:
        return f"{report.name}: not run"
    kept = ", kept from an earlier run" if report.state is State.KEPT else f", {clock(report.seconds)}"
    broken = f"{report.trouble}; " if report.trouble else ""
    return f"{report.name}: {broken}{words(report.counts())}{kept}"


def total(reports: Sequence[Report]) -> str:
    """One line about all cells."""
    states = Counter(each.state for each in reports)
    cells = ", ".join(f"{states[state]} {state}" for state in State if states[state])
    counts = sum((each.counts() for each in reports), Counter[Kind]())
    surprises = sum(each.surprises for each in reports)
    return f"{plural(len(reports), 'cell')} ({cells}), {words(counts)}; {plural(surprises, 'surprise')}"


def words(counts: Counter[Kind]) -> str:
    """Numbers of tests, in words."""
    said = [f"{counts[kind]} {kind}{'s' if kind is Kind.FINDING and counts[kind] > 1 else ''}" for kind in Kind]
    return ", ".join(each for each, kind in zip(said, Kind, strict=True) if counts[kind]) or "no tests"


def numbers(counts: Counter[Kind]) -> str:
    """Numbers of tests, for a table."""
    return " ".join(f"{counts[kind]}{MARKS[kind]}" for kind in Kind if counts[kind]) or "-"


def plural(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def clock(seconds: float) -> str:
    """A time that a person can read: minutes and seconds, and hours if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _column(report: Report, names: Sequence[str]) -> list[tuple[str, bool]]:
    """Texts from top to bottom, and whether each is a surprise."""
    kernel = f"{report.kernel}:{report.preset}" if report.preset else report.kernel
    counts = [report.counts(name) for name in names]
    cells = [(numbers(each), any(each[kind] for kind in SURPRISES)) for each in counts]
    whole = (f"{numbers(report.counts())}{' broken' if report.trouble else ''}", bool(report.surprises))
    return [(kernel, False), (f"{report.arch} {report.options}".rstrip(), False), *cells, whole]


def _blocks(columns: Sequence[list[tuple[str, bool]]], room: int) -> Iterator[list[list[tuple[str, bool]]]]:
    """As many columns at a time as fit side by side."""
    block: list[list[tuple[str, bool]]] = []
    used = 0
    for column in columns:
        needed = 2 + _width(column)
        if block and used + needed > room:
            yield block
            block, used = [], 0
        block.append(column)
        used += needed
    if block:
        yield block


def _width(column: Sequence[tuple[str, bool]]) -> int:
    return max(len(text) for text, _ in column)


def _row(name: str, row: int, block: Sequence[list[tuple[str, bool]]], first: int, paint: Paint) -> str:
    cells = []
    for column in block:
        text, surprise = column[row]
        padded = f"  {text:>{_width(column)}}"
        cells.append(paint.red(padded) if surprise else paint.bold(padded) if row < 2 else padded)
    return f"{name:{first}}{''.join(cells)}"


def _reruns(reports: Sequence[Report]) -> Iterator[str]:
    told = [f"  {each.name}: {why}" for each in reports for why in each.reruns]
    if told:
        yield from ("", "Run more than once:", *told)


def _surprises(reports: Sequence[Report], width: int, paint: Paint) -> Iterator[str]:
    for each in reports:
        if not each.surprises:
            continue
        yield ""
        yield paint.red(f"{each.name}: {plural(each.surprises, 'surprise')}")
        if each.trouble:
            yield f"  {each.trouble}"
        tests = [test for test in each.tests if test.kind in SURPRISES]
        for test in tests[:_LISTED]:
            yield f"  {test.outcome:8} {test.test}"
            yield clipped(f"           {test.message}", width)
        if len(tests) > _LISTED:
            yield f"  and {len(tests) - _LISTED} more: see --html or --json"


def clipped(text: str, width: int) -> str:
    """``text`` in one line of the terminal."""
    return text if len(text) <= width else f"{text[: max(width, 20) - 1]}…"
