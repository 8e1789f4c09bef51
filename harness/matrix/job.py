# SPDX-License-Identifier: GPL-2.0
"""Runs one cell as a child process, here or on a machine of a cluster.

What goes to another machine and comes back is a plain dictionary, so that both sides may be looked at in Dask's own
tools, and nothing depends on how a class is pickled.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from harness import paths
from harness.deadline import Deadline
from harness.errors import HarnessError, UsageError
from harness.host import safe_text
from harness.host.process import Child
from harness.host.rundir import RunDirectory
from harness.matrix import keys
from harness.report import record
from harness.report.record import Recording
from harness.report.results import Outcome

#: Seconds between two looks at the child.
_TICK = 0.1

#: Seconds that pytest gets to end its guests after SIGINT. A person who presses Ctrl-C waits for them.
_GRACE = 0.4

#: The limit for the record of a cell in bytes. The suite of 720 tests makes 2 MB.
_RESULTS_LIMIT = 128 << 20


class Job(TypedDict):
    """A cell to run."""

    #: unique in a run
    name: str
    #: the arguments of Python; ``--results=FILE`` is added
    python: list[str]
    #: after how many seconds it is ended
    seconds: float
    #: :func:`content` of the machine that sends it; empty for any
    content: str
    #: what the machine that runs it has to offer
    resources: list[str]


class Ended(TypedDict):
    """A cell that has ended in whatever way."""

    name: str
    #: pytest's exit status; None if it did not end by itself
    status: int | None
    #: why its results are not complete; empty if they are
    trouble: str
    #: whether it was ended because its time was over
    late: bool
    seconds: float
    #: the text of its record; empty if there is none
    results: str
    #: the end of what pytest printed
    output: str
    #: where it ran
    host: str
    #: why it was run more than once, in sentences
    reruns: list[str]


def content() -> str:
    """Which harness and which tests this machine has now."""
    return f"{keys.source_digest()} {keys.tests_digest()}"


def run(job: Job, stopped: Callable[[], bool], watch: Callable[[Path], None]) -> Ended:
    """Run a cell to its end, its deadline, or until it is stopped.

    :param stopped: says whether nobody wants its results any more.
    :param watch: told the path of its record, which grows while it runs.
    """
    if job["content"] and job["content"] != content():
        return failed(
            job,
            "the harness or the tests here are not those that the matrix began with: "
            "start it again, or update this machine",
        )
    try:
        return _run(job, stopped, watch)
    except HarnessError as error:
        return failed(job, str(error).partition("\n")[0])


def _run(job: Job, stopped: Callable[[], bool], watch: Callable[[Path], None]) -> Ended:
    began = time.monotonic()
    directory = RunDirectory()
    try:
        path = directory.path / "results.jsonl"
        watch(path)
        argv = ["env", f"--chdir={paths.PROJECT}", sys.executable, *job["python"], f"--results={path}"]
        child = Child(argv, directory.path / "output")
        try:
            status, late = _wait(child, Deadline.after(job["seconds"]), stopped)
        finally:
            _end(child)
        ended = Ended(
            name=job["name"],
            status=status,
            trouble="",
            late=late,
            seconds=round(time.monotonic() - began, 1),
            results=_text(path),
            output=safe_text.escape(child.said()),
            host=socket.gethostname(),
            reruns=[],
        )
        return {**ended, "trouble": _trouble(ended, job)}
    finally:
        directory.remove()


def failed(job: Job, trouble: str) -> Ended:
    """A cell that could not be run."""
    return Ended(
        name=job["name"],
        status=None,
        trouble=trouble,
        late=False,
        seconds=0.0,
        results="",
        output="",
        host=socket.gethostname(),
        reruns=[],
    )


def recording(ended: Ended) -> Recording | None:
    """What was recorded, as far as it can be read."""
    with contextlib.suppress(UsageError):
        return record.parse(ended["results"], ended["name"])
    return None


def unsettled(ended: Ended) -> str:
    """Why a run of the same cell may end in another way: the harness failed, or a machine did. Empty if none did."""
    if ended["trouble"]:
        return ended["trouble"]
    seen = recording(ended)
    missed = [item for item in seen.items if item.outcome == Outcome.MISS] if seen else []
    return f"could not run {len(missed)} of its tests: {missed[0].message}" if missed else ""


def _wait(child: Child, deadline: Deadline, stopped: Callable[[], bool]) -> tuple[int | None, bool]:
    """The exit status, None if it had to be ended, and whether its time was over."""
    while not deadline.passed:
        if (status := child.wait(Deadline.after(_TICK))) is not None:
            return status, False
        if stopped():
            return None, False
    return None, True


def _end(child: Child) -> None:
    """End pytest and its workers, if they still run. Guests end with the process that started them."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if child.status is None:
            os.killpg(child.pid, number)
            child.wait(Deadline.after(_GRACE))
    child.kill()


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.stat().st_size <= _RESULTS_LIMIT:
            return path.read_text(errors="replace")
    return ""


def _trouble(ended: Ended, job: Job) -> str:
    """Why the results are not complete; empty if they are."""
    if ended["late"]:
        return f"it was ended after {job['seconds'] / 60:g} minutes; give it more with the key minutes"
    status = ended["status"]
    if status is None:
        return "it was stopped"
    said = ended["output"].splitlines()
    last = f": {said[-1]}" if said else ""
    if job["content"] and job["content"] != content():
        return "the harness or the tests were changed while it ran: run the matrix again"
    if status not in (0, 1):
        return f"pytest ended with status {status}{last}"
    try:
        seen = record.parse(ended["results"], "its record")
    except UsageError as error:
        return f"it left no record of its results ({error}){last}"
    return "" if seen.status is not None else f"its record of results is not complete{last}"
