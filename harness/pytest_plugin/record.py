# SPDX-License-Identifier: GPL-2.0
"""Makes the lines of the record of results while tests end, and hands them to whatever writes files of them.

With pytest-xdist the controller does so: the reports of all workers pass through it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from harness.errors import HarnessError
from harness.pytest_plugin.session import GuestTests
from harness.pytest_plugin.sinks import Sink
from harness.pytest_plugin.target import Target
from harness.report import record, state
from harness.report.record import Header, Item, KernelFacts, Recording

#: The phase in the report that pytest-xdist makes of a test whose worker died.
_CRASHED = "???"


class Record:
    """The plug-in.

    :param sinks: what gets the lines.
    """

    def __init__(self, guests: GuestTests, config: pytest.Config, sinks: Sequence[Sink]) -> None:
        self._guests = guests
        self._command = ("pytest", *config.invocation_params.args)
        self._bisects = config.getoption("bisect")
        self._began = time.time()
        self._sinks = list(sinks)
        self._header: Header | None = None
        self._items: list[Item] = []
        #: whether something failed that is no guest test, and so has no line
        self.others_failed = False
        self._said: list[str] = []
        self._trouble: list[str] = []
        self._reports: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
        #: wall clock and monotonic clock when a test began, by node id
        self._starts: dict[str, tuple[float, float]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Begin, when the kernels are known."""
        kernels = [_facts(each) for each in self._guests.targets.values()]
        self._header = record.header(self._command, self._began, kernels)
        for sink in list(self._sinks):
            with self._kept(sink):
                sink.begin(self._header)

    def recording(self, status: int | None) -> Recording | None:
        """What was recorded up to now; None if the run did not begin.

        :param status: pytest's exit status; None while it is not known.
        """
        return Recording(self._header, self._items, status) if self._header is not None else None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember that tests could not be collected."""
        self.others_failed |= report.failed

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember when a test began."""
        self._starts[nodeid] = time.time(), time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Make the line of a test with its last report."""
        if hasattr(report, "context"):
            return  # of a subtest
        self._reports[report.nodeid].append(report)
        if report.when not in ("teardown", _CRASHED):
            return
        reports = self._reports.pop(report.nodeid)
        start, began = self._starts.pop(report.nodeid, (0.0, time.monotonic()))
        duration = time.monotonic() - began
        if report.when == _CRASHED:
            self._lost(report, start, duration)
        elif all(str(each.outcome) != "rerun" for each in reports):  # one that pytest-rerunfailures runs again
            item = record.item(reports, start, duration)
            if item is not None:
                self._add(item)
            else:
                self.others_failed |= any(each.failed for each in reports)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """End, with the exit status that other plug-ins may have changed."""
        recording = self.recording(int(session.exitstatus))
        if recording is None:
            return
        for sink in list(self._sinks):
            with self._kept(sink):
                self._said.append(sink.end(recording))
        if self._trouble and session.exitstatus == pytest.ExitCode.OK:
            # To git bisect run, the status of failed tests would say that the kernel is bad.
            session.exitstatus = state.TROUBLE if self._bisects else pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say where files are, and which could not be written."""
        for each in filter(None, self._said):
            terminalreporter.write_line(f"harness: {each}")
        for each in self._trouble:
            terminalreporter.write_line(f"harness: {each}", red=True)

    @contextmanager
    def _kept(self, sink: Sink) -> Iterator[None]:
        """Give up a file that cannot be written, instead of the run; the run fails for it."""
        try:
            yield
        except HarnessError as error:
            self._sinks.remove(sink)
            self._trouble.append(f"{error}; the rest of it is missing")

    def _lost(self, report: pytest.TestReport, start: float, duration: float) -> None:
        labels = [each for each in self._guests.targets if f"[{each}]" in report.nodeid or f"[{each}-" in report.nodeid]
        if not labels:
            self.others_failed = True
            return  # no guest test
        label = max(labels, key=len)
        message = str(report.longrepr).partition("\n")[0]
        test = report.nodeid.replace(f"[{label}]", "").replace(f"[{label}-", "[")
        lost = record.lost_item(label, test, f"infrastructure: {message}", start, duration)
        self._add(lost)

    def _add(self, item: Item) -> None:
        self._items.append(item)
        for sink in list(self._sinks):
            with self._kept(sink):
                sink.add(item)


def _facts(target: Target) -> KernelFacts:
    kernel, machine = target.kernel, target.machine
    build = kernel.provenance.build if kernel else None
    return KernelFacts(
        label=target.label,
        spec=target.spec.text,
        release=kernel.release if kernel else "",
        version=kernel.version if kernel else "",
        arch=str(target.arch or ""),
        provenance=str(kernel.provenance) if kernel else "",
        accelerator=machine.accelerator.name if machine else "",
        compiler=build.compiler if build else "",
        configuration=build.configuration if build else "",
        patchset_hash=build.patchset_hash if build else "",
    )
