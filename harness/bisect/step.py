# SPDX-License-Identifier: GPL-2.0
"""What one kernel says in a bisect: it is good, it is bad, or it has no verdict.

The verdict comes from the record of results. pytest's exit status is 1 also for a test that could not be run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from harness.errors import HostError, UsageError
from harness.judging.verdict import Verdict
from harness.matrix import job
from harness.matrix.job import Ended
from harness.report.record import Item
from harness.report.results import Outcome

#: pytest's statuses for a wrong command line, and for one that selects no test.
_WRONG_REQUEST, _NO_TESTS = 4, 5


class State(StrEnum):
    """What a kernel is."""

    GOOD = "good"
    BAD = "bad"
    #: nothing can be said: it does not build or boot, or its tests skip or could not be run
    NONE = "no verdict"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One kernel, and what it said."""

    #: the version, or the ID of the commit
    name: str
    state: State
    #: why, in one line
    message: str
    #: how long it took, with building and booting
    seconds: float = 0.0
    #: the text of the record of the run that decided; empty if none ran
    results: str = ""


def judge(ended: Ended) -> tuple[State, str]:
    """What one run of the tests says, and why.

    :raises UsageError: if the tests that were asked for cannot be run on any kernel.
    :raises HostError: if the run left no complete results.
    """
    if ended["late"]:
        return State.NONE, "its tests did not end in time: give them more with --minutes"
    if ended["status"] in (_WRONG_REQUEST, _NO_TESTS):
        raise UsageError(f"pytest cannot run these tests: {_complaint(ended)}")
    seen = job.recording(ended)
    if ended["trouble"] or seen is None:
        raise HostError(f"the tests left no results: {ended['trouble'] or 'the record cannot be read'}")
    return judge_items(seen.items)


def judge_items(items: Sequence[Item]) -> tuple[State, str]:
    """What the tests of one run say together: a kernel is bad if one test shows it, whatever the others say."""
    for verdict, state, what in (
        (Verdict.FAIL, State.BAD, ""),
        (Verdict.MISS, State.NONE, "could not be run: "),
        (Verdict.ERROR, State.NONE, "broke outside of the test itself: "),
    ):
        found = [each for each in items if each.failed and each.verdict == verdict]
        if found:
            others = f" (and {len(found) - 1} more)" if found[1:] else ""
            return state, f"{found[0].test} {what}{_line(found[0].message)}{others}"
    if failed := [each for each in items if each.failed]:
        return State.NONE, f"{failed[0].test} passed against its expectation: {_line(failed[0].message)}"
    if items and all(each.outcome == Outcome.SKIPPED for each in items):
        return State.NONE, f"all of its tests skip: {_line(items[0].message)}"
    if not items:
        return State.NONE, "no test has run"
    counts = Counter(each.outcome for each in items)
    return State.GOOD, ", ".join(f"{number} {outcome}" for outcome, number in counts.items())


def _line(text: str) -> str:
    return text.partition("\n")[0]


def _complaint(ended: Ended) -> str:
    """What pytest says is wrong: not its last line, which counts the tests."""
    lines = ended["output"].splitlines()
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it says nothing")
