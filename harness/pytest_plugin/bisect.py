# SPDX-License-Identifier: GPL-2.0
"""``--bisect``: pytest ends with the statuses that ``git bisect run`` wants. ``docs/bisect.md`` lists them."""

from __future__ import annotations

import sys

import pytest

from harness.errors import HarnessError
from harness.guests import template_store
from harness.pytest_plugin.record import Record
from harness.pytest_plugin.session import GuestTests
from harness.pytest_plugin.target import Target
from harness.report import state
from harness.report.state import STATUS, State

#: Options under which the exit status would not say what the kernel is.
_REFUSED = {
    "expect_findings": "--expect-findings",
    "keep": "--keep",
    "answer": "--answer",
    "collectonly": "--collect-only",
}

#: What takes the place of pytest's statuses for runs that say nothing.
_STOPPING: dict[int, int] = {
    pytest.ExitCode.INTERRUPTED: state.INTERRUPTED,  # also if tests cannot be collected
    pytest.ExitCode.INTERNAL_ERROR: state.TROUBLE,
    pytest.ExitCode.USAGE_ERROR: state.WRONG_REQUEST,
    pytest.ExitCode.NO_TESTS_COLLECTED: state.WRONG_REQUEST,
}

#: pytest's statuses after which its results say what the kernel is.
_RAN = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)


def check(config: pytest.Config, kernels: int) -> None:
    """Check that the run asks one kernel one question.

    :param kernels: how many kernels the run has.
    :raises pytest.UsageError: if not.
    """
    if kernels != 1:
        raise pytest.UsageError("--bisect asks one kernel: give one --kernel, and one --arch at most")
    for name, option in _REFUSED.items():
        if config.getoption(name, default=False):
            raise pytest.UsageError(f"{option} has no place beside --bisect: leave it out")
    if config.getoption("fail_on") == "regressed":
        raise pytest.UsageError("--fail-on=regressed has no place beside --bisect: leave it out")


def stopping(status: int) -> int:
    """The status that stops ``git bisect run``, in place of one of pytest's own, which would mean a bad kernel."""
    return _STOPPING.get(status, status)


def refuse(error: pytest.UsageError) -> int:
    """Say what is wrong with the command line, as pytest does; returns the exit status."""
    for message in error.args:
        print(f"ERROR: {message}", file=sys.stderr)
    return state.WRONG_REQUEST


class Bisect:
    """The plug-in; not in a worker of pytest-xdist.

    :param record: has the results.
    """

    def __init__(self, guests: GuestTests, record: Record) -> None:
        self._guests = guests
        self._record = record
        self._said = ""

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Boot the kernel before its tests run: the error says whose fault it is, a test that was missed does not.

        The tests then clone the guest that was booted here.
        """
        for target in self._guests.targets.values():
            if (error := _boot(target)) is None:
                continue
            if isinstance(error, state.STOPS):
                pytest.exit(str(error), returncode=state.TROUBLE)
            pytest.exit(f"{State.NONE}: {state.why_not_ready(error)}", returncode=STATUS[State.NONE])

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Make the exit status of the results."""
        recording = self._record.recording(None)
        if session.exitstatus in _RAN and recording is not None:
            found, message = state.judge_items(recording.items)
            if found is State.GOOD and self._record.others_failed:
                found, message = State.NONE, "something failed that is no guest test"
            self._said = f"{found}: {message}"
            session.exitstatus = STATUS[found]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what the kernel is."""
        if self._said:
            terminalreporter.write_line(f"harness: {self._said}")


def _boot(target: Target) -> HarnessError | None:
    """Why a kernel cannot be asked; None if it can. A board runs already."""
    if target.broken is None and target.machine is not None:
        try:
            template_store.boot(target.machine, target.progress)
        except HarnessError as error:
            return error
    return target.broken
