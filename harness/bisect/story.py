# SPDX-License-Identifier: GPL-2.0
"""Says at the end of a bisect what was found, with the evidence of the two runs that prove it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
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
_LINES = 6

#: Columns of a line of it.
_COLUMNS = 160

#: The titles of sections, as :mod:`harness.pytest_plugin.testrun` writes them.
_AGAIN = "run it again"


def ending(found: Found, direction: Direction, what: str, log: Path, name: Callable[[str], str] = str) -> Iterator[str]:
    """Which kernel it is, the two runs, and where all results are.

    :param what: "version" or "commit".
    :param name: names one for a person.
    """
    if found.between:
        yield f"The first {direction.word} {what} is one of these, because some have no verdict:"
        yield from (f"  {name(each)}" for each in (*found.between, found.after.name))
    else:
        yield f"The first {direction.word} {what} is {name(found.after.name)}"
    for title, step in ((f"Last {direction.old}", found.before), (f"First {direction.new}", found.after)):
        yield ""
        yield f"{title}: {name(step.name)} ({clock(step.seconds)})"
        yield from (f"  {each}" for each in _run(step))
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
    # A traceback says at its end what happened, in lines that begin with E. pytest's own words follow the message.
    errors = [line for line in lines if line.startswith("E ")] or lines
    own = next((number for number, line in enumerate(errors) if number and re.match(r"E +assert ", line)), None)
    errors = errors[:own]
    yield from (clipped(f"  {line}", _COLUMNS) for line in errors[:_LINES])
    if _AGAIN in sections:
        yield f"see it again: {sections[_AGAIN]}"
