# SPDX-License-Identifier: GPL-2.0
"""What changed since a matrix that was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.matrix.outcome import OneTest, Report


@dataclass(frozen=True)
class Change:
    """A cell, or a test in one, whose outcome is another than in the recorded matrix."""

    #: the name of the cell
    cell: str
    #: the test's id; empty if it is about the cell as a whole
    test: str
    before: str
    after: str
    #: the first line of why it does not pass now
    message: str = ""

    def __str__(self) -> str:
        where = f"{self.cell}  {self.test}".rstrip()
        return f"{where}: {self.before} -> {self.after}" + (f"  {self.message}" if self.message else "")


def compare(base: Sequence[Report], now: Sequence[Report]) -> list[Change]:
    """The changes, in the order of the cells. A cell that one side has not run is one change, not one for each test."""
    before = {each.name: each for each in base}
    after = {each.name: each for each in now}
    found: list[Change] = []
    for name in dict.fromkeys((*after, *before)):
        old, new = before.get(name), after.get(name)
        if old is None or new is None or not old.tests or not new.tests:
            if _cell(old) != _cell(new):
                found.append(Change(name, "", _cell(old), _cell(new), new.trouble if new else ""))
            continue
        if old.trouble != new.trouble:
            found.append(Change(name, "", _cell(old), _cell(new), new.trouble))
        found += _tests(name, old, new)
    return found


def _tests(name: str, old: Report, new: Report) -> list[Change]:
    before = {each.test: each for each in old.tests}
    after = {each.test: each for each in new.tests}
    found = []
    for test in sorted(before.keys() | after.keys()):
        was, became = _outcome(before.get(test)), _outcome(after.get(test))
        if was != became:
            found.append(Change(name, test, was, became, after[test].message if test in after else ""))
    return found


def _cell(report: Report | None) -> str:
    if report is None:
        return "not in the matrix"
    return "broken" if report.trouble else f"{len(report.tests)} tests" if report.tests else "not run"


def _outcome(test: OneTest | None) -> str:
    if test is None:
        return "no result"
    # A finding that no longer shows has passed and yet counts as failed.
    return f"{test.outcome}, against the expectation" if test.failed and test.outcome == "passed" else test.outcome
