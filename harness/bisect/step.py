# SPDX-License-Identifier: GPL-2.0
"""One step of a bisect: a kernel, and what the run of its tests says of it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.errors import HostError, UsageError
from harness.matrix import job
from harness.matrix.job import Ended
from harness.report.state import State, judge_items

#: pytest's statuses for a wrong command line, and for one that selects no test.
_WRONG_REQUEST, _NO_TESTS = 4, 5


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


def _complaint(ended: Ended) -> str:
    """What pytest says is wrong: not its last line, which counts the tests."""
    lines = ended["output"].splitlines()
    return next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "it says nothing")
