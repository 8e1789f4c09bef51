# SPDX-License-Identifier: GPL-2.0
"""Prints what moves cost. ``guest_tests/test_costs.py`` records the counts, and ``--icount`` turns the table on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.arch import Architecture
from harness.host import safe_text
from harness.report.results import Result

#: The report property in which the tests record what they counted.
PROPERTY = "cost"

#: The names of the flags in the table, in the order of the columns.
_FLAGS = {0: "plain", 8: "RELOCATE", 16: "MUST"}

#: The limit for numbers from a guest. No guest executes that many instructions, so a larger number is not a count.
_MOST = 1 << 53

#: The limit for words from a guest, in characters.
_WORD = 32


@dataclass(frozen=True)
class Memory:
    """The memory that was moved: a row of the table."""

    #: what the memory consists of, such as "small pages"
    kind: str
    #: its size in bytes
    size: int
    #: the alignment of both addresses, such as "PMD"
    alignment: str

    def __str__(self) -> str:
        return f"{self.kind}, {_size(self.size)}, {self.alignment}"


@dataclass(frozen=True)
class Cost:
    """The cost of one kind of move, in instructions of the guest."""

    memory: Memory
    #: the relocation flag given to mremap(): 0, 8 or 16
    flags: int
    #: the error, if the kernel does not know the flag; the values below are meaningless then
    missing: str = ""
    #: the number of pages present
    pages: int = 1
    #: the instructions of the cheapest move
    instructions: int = 0
    #: the instructions of the median move
    median: int = 0

    @property
    def per_page(self) -> float:
        """The instructions for each page present."""
        return self.instructions / self.pages


@dataclass(frozen=True)
class Clock:
    """How exactly instructions are counted."""

    #: the instructions in one tick of the clock
    resolution: int
    #: the instructions of a system call that does nothing; they are subtracted from each count
    overhead: int
    #: the share of interrupts in a long run, in millionths
    interrupts: int


@dataclass(frozen=True)
class Column:
    """The costs of one kernel's moves with one flag."""

    #: the kernel's label
    kernel: str
    flags: int
    costs: Mapping[Memory, Cost]


def records(results: Iterable[Result], label: str) -> list[Cost | Clock]:
    """The costs recorded on one kernel. The guest wrote them, so whatever is not a valid record is left out."""
    found = (
        _parsed(value)
        for result in results
        if result.facts.label == label
        for name, value in result.records
        if name == PROPERTY
    )
    return [each for each in found if each is not None]


def _parsed(record: object) -> Cost | Clock | None:
    if not isinstance(record, dict):
        return None
    try:
        if record["step"] == "clock":
            return Clock(*(_number(record, name) for name in ("resolution", "overhead", "interrupts")))
        memory = Memory(_word(record, "kind"), _number(record, "size"), _word(record, "alignment"))
        flags = _number(record, "flags")
        if record["step"] != "move" or flags not in _FLAGS:
            return None
        if "missing" in record:
            return Cost(memory, flags, missing=_word(record, "missing"))
        pages, instructions, median = (_number(record, name) for name in ("pages", "instructions", "median"))
        return Cost(memory, flags, "", pages, instructions, median) if pages else None
    except (KeyError, ValueError):
        return None


def _number(record: dict[str, Any], name: str) -> int:
    value = record[name]
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(name)
    return value


def _word(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str) or not 0 < len(value) <= _WORD or "\n" in value or "\t" in value:
        raise ValueError(name)
    return safe_text.escape(value)


def sections(results: Sequence[Result], kernels: Mapping[str, Architecture | None]) -> Iterator[tuple[str, list[str]]]:
    """Titles and lines for the terminal: one section for each architecture for which costs were recorded.

    :param kernels: the architecture of each kernel of the run, by label, in the order of the command line. Kernels
        are compared with the first one of their architecture.
    """
    for arch in dict.fromkeys(kernels.values()):
        seen = {label: records(results, label) for label, each in kernels.items() if each is arch}
        if any(seen.values()):
            yield f"What does a move cost on {arch}?", table(seen)


def table(seen: Mapping[str, Sequence[Cost | Clock]]) -> list[str]:
    """The table of costs for the kernels of one architecture, as lines.

    :param seen: the result of :func:`records` for each kernel, by label.
    """
    columns = [
        Column(label, flags, {cost.memory: cost for cost in costs if cost.flags == flags})
        for label, records in seen.items()
        if (costs := [each for each in records if isinstance(each, Cost)])
        for flags in _FLAGS
        if any(cost.flags == flags for cost in costs)
    ]
    shown = [column for column in columns if any(not cost.missing for cost in column.costs.values())]
    lines = []
    if shown:
        base = shown[0]
        lines += [f"Instructions for each page, and their ratio to a plain move on {base.kernel}.", ""]
        lines += _grid(shown, base if base.flags == 0 else None)
        lines += ["", *_spread(shown)]
    for column in columns:
        if column not in shown:
            errors = sorted({cost.missing for cost in column.costs.values()})
            lines.append(
                f"{column.kernel} does not know flag {column.flags} ({_FLAGS[column.flags]}): {', '.join(errors)}."
            )
    for label, records in seen.items():
        lines += [_about(label, each) for each in records if isinstance(each, Clock)]
    return lines


def _grid(columns: Sequence[Column], base: Column | None) -> list[str]:
    memories = _memories(columns)
    cells = [
        ["memory", *(memory.kind for memory in memories)],
        ["aligned to", *(memory.alignment for memory in memories)],
        ["size", *(_size(memory.size) for memory in memories)],
        *([_FLAGS[column.flags], *(_cell(column, base, memory) for memory in memories)] for column in columns),
    ]
    widths = [max(map(len, texts)) for texts in cells]
    kernels = ["", "", "", *(column.kernel for column in columns)]
    top = []
    for kernel, group in itertools.groupby(range(len(cells)), key=kernels.__getitem__):
        places = list(group)
        # The kernel's name is above its columns. The first of them is widened if the name needs more room.
        room = sum(widths[place] for place in places) + 2 * (len(places) - 1)
        widths[places[0]] += max(0, len(kernel) - room)
        top.append(kernel.rjust(room))
    return ["  ".join(top), *("  ".join(_justified(row, widths)) for row in zip(*cells, strict=True))]


def _justified(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Align words to the left and figures to the right."""
    words = [text.ljust(width) for text, width in zip(row[:2], widths[:2], strict=True)]
    return words + [text.rjust(width) for text, width in zip(row[2:], widths[2:], strict=True)]


def _memories(columns: Sequence[Column]) -> list[Memory]:
    """The rows in the order of the tests, also if a kernel has no value for some of them."""
    found = list(dict.fromkeys(memory for column in columns for memory in column.costs))
    kinds = list(dict.fromkeys(memory.kind for memory in found))
    alignments = list(dict.fromkeys(memory.alignment for memory in found))
    return sorted(found, key=lambda each: (kinds.index(each.kind), alignments.index(each.alignment), each.size))


def _cell(column: Column, base: Column | None, memory: Memory) -> str:
    cost = column.costs.get(memory)
    if cost is None:
        return "-"
    if cost.missing:
        return cost.missing
    plain = base.costs.get(memory) if base is not None else None
    text = _rounded(cost.per_page)
    return f"{text} {'x' + _rounded(cost.per_page / plain.per_page):>6}" if plain and plain.instructions else text


def _spread(columns: Sequence[Column]) -> list[str]:
    """A line that says how far the medians are above the figures."""
    costs = [cost for column in columns for cost in column.costs.values() if cost.instructions]
    if not costs:
        return []
    far = max(costs, key=lambda cost: cost.median / cost.instructions)
    return [
        "Each figure is that of the cheapest of several moves. The median is at most "
        f"{far.median / far.instructions - 1:.0%} above it ({far.memory})."
    ]


def _about(label: str, clock: Clock) -> str:
    exact = "exactly" if clock.resolution == 1 else f"in steps of {clock.resolution}"
    return (
        f"{label}: instructions are counted {exact}. The {clock.overhead} instructions of a call that is refused at "
        f"once are subtracted. Interrupts add {clock.interrupts / 10_000:.1f} % in the long run."
    )


def _rounded(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _size(size: int) -> str:
    return next(
        (f"{size >> shift} {unit}" for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")) if size >> shift),
        f"{size} B",
    )
