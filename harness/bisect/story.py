# SPDX-License-Identifier: GPL-2.0
"""Says at the end of a bisect what was found, with the evidence of the two runs that prove it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from harness.bisect.search import Direction, Found
from harness.bisect.step import Step
from harness.errors import UsageError
from harness.matrix.table import clipped, clock
from harness.report import record
from harness.report.record import Item

#: Failed tests that are shown of one run. The log has all.
_SHOWN = 3

#: Lines of the failure that are shown of one test.
_LINES = 12

#: Columns of a line that is shown.
_COLUMNS = 240

#: The titles of sections, as :mod:`harness.pytest_plugin.testrun` writes them.
_AGAIN = "run it again"


def conclusion(found: Found, direction: Direction, what: str, name: str) -> Iterator[str]:
    """The first lines: which one it is.

    :param what: "version" or "commit".
    :param name: the first changed one, as a person names it.
    """
    if not found.between:
        yield f"{name} is the first {direction.word} {what}."
        return
    yield f"The first {direction.word} {what} is one of these, because some have no verdict:"
    yield from (f"  {each}" for each in (*found.between, name))


def evidence(found: Found, direction: Direction, log: Path) -> Iterator[str]:
    """The two runs, and where all of it is."""
    for title, step in ((f"Last {direction.old}", found.before), (f"First {direction.new}", found.after)):
        yield ""
        yield f"{title}: {step.name} ({clock(step.seconds)})"
        yield from (f"  {clipped(each, _COLUMNS)}" for each in _run(step))
    yield ""
    yield f"All results are in {log}."


def _run(step: Step) -> Iterator[str]:
    try:
        seen = record.parse(step.results, step.name)
    except UsageError:
        yield step.message  # its record was cut, or written by another version
        return
    for kernel in seen.header.kernels:
        yield f"kernel: {kernel.release}, {kernel.provenance}"
    failed = [each for each in seen.items if each.failed]
    if not failed:
        yield step.message
    for item in failed[:_SHOWN]:
        yield from _failure(item)
    if failed[_SHOWN:]:
        yield f"and {len(failed) - _SHOWN} more failed"


def _failure(item: Item) -> Iterator[str]:
    yield item.test
    sections = dict(item.sections)
    lines = next((text for title, text in item.sections if title.startswith("failure in")), item.message).splitlines()
    # A traceback says at its end what happened, in lines that begin with E.
    errors = [line for line in lines if line.startswith("E ")] or lines
    yield from (f"  {line}" for line in errors[:_LINES])
    if _AGAIN in sections:
        yield f"see it again: {sections[_AGAIN]}"
