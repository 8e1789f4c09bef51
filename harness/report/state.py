# SPDX-License-Identifier: GPL-2.0
"""What one kernel says in a bisect: it is good, it is bad, or it has no verdict.

The verdict comes from the record of results. pytest's exit status is 1 also for a test that could not be run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

from harness.errors import BuildError, FetchError, HarnessError, HostError, UsageError
from harness.judging.verdict import Verdict
from harness.report.record import Item
from harness.report.results import Outcome


class State(StrEnum):
    """What a kernel is."""

    GOOD = "good"
    BAD = "bad"
    #: nothing can be said: it does not build or boot, or its tests skip or could not be run
    NONE = "no verdict"


#: The exit status of each, for ``git bisect run``. It skips a commit for 125.
STATUS = {State.GOOD: 0, State.BAD: 1, State.NONE: 125}

#: The exit statuses that make ``git bisect run`` stop: trouble of the host, a wrong request, and Ctrl-C.
TROUBLE, WRONG_REQUEST, INTERRUPTED = 128, 129, 130

#: Errors that are no property of the kernel: a bisect stops.
STOPS = (HostError, FetchError, UsageError)


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


def why_not_ready(error: HarnessError) -> str:
    """Why a kernel has no verdict, if it could not be made or booted: one line."""
    what = "" if isinstance(error, BuildError | FetchError) else "it does not boot: "
    return what + _line(str(error))


def _line(text: str) -> str:
    return text.partition("\n")[0]
