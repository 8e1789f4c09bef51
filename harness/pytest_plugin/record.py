# SPDX-License-Identifier: GPL-2.0
"""``--results=FILE``: writes one line for each guest test as it ends, so that a crash loses one test at most.

With pytest-xdist the controller writes the file: the reports of all workers pass through it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import pytest

from harness.pytest_plugin.session import GuestTests
from harness.pytest_plugin.target import Target
from harness.report import record
from harness.report.record import KernelFacts

#: The phase in the report that pytest-xdist makes of a test whose worker died.
_CRASHED = "???"


class Record:
    """The plug-in.

    :param path: the file; an old one is replaced.
    :raises pytest.UsageError: if it cannot be written.
    """

    def __init__(self, path: Path, guests: GuestTests, config: pytest.Config) -> None:
        self._guests = guests
        self._command = ("pytest", *config.invocation_params.args)
        self._began = time.time()
        self._reports: defaultdict[str, list[pytest.TestReport]] = defaultdict(list)
        #: wall clock and monotonic clock when a test began, by node id
        self._starts: dict[str, tuple[float, float]] = {}
        try:
            self._file = path.open("w")
        except OSError as error:
            raise pytest.UsageError(f"cannot write the results to {path}: {error.strerror}") from error

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Write the first line, when the kernels are known."""
        kernels = [_facts(each) for each in self._guests.targets.values()]
        self._write(record.header_line(record.header(self._command, self._began, kernels)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Remember when a test began."""
        self._starts[nodeid] = time.time(), time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write the line of a test with its last report."""
        if hasattr(report, "context"):
            return  # of a subtest
        self._reports[report.nodeid].append(report)
        if report.when not in ("teardown", _CRASHED):
            return
        reports = self._reports.pop(report.nodeid)
        start, began = self._starts.pop(report.nodeid, (0.0, time.monotonic()))
        duration = time.monotonic() - began
        if report.when == _CRASHED:
            self._write_lost(report, start, duration)
        elif all(str(each.outcome) != "rerun" for each in reports):  # one that pytest-rerunfailures runs again
            item = record.item(reports, start, duration)
            if item is not None:
                self._write(record.item_line(item))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Write the last line."""
        self._write(record.end_line(int(exitstatus)))
        self._file.close()

    def _write_lost(self, report: pytest.TestReport, start: float, duration: float) -> None:
        labels = [each for each in self._guests.targets if f"[{each}]" in report.nodeid or f"[{each}-" in report.nodeid]
        if not labels:
            return  # no guest test
        label = max(labels, key=len)
        message = str(report.longrepr).partition("\n")[0]
        test = report.nodeid.replace(f"[{label}]", "").replace(f"[{label}-", "[")
        lost = record.lost_item(label, test, f"infrastructure: {message}", start, duration)
        self._write(record.item_line(lost))

    def _write(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()


def _facts(target: Target) -> KernelFacts:
    kernel, machine = target.kernel, target.machine
    return KernelFacts(
        label=target.label,
        spec=target.spec.text,
        release=kernel.release if kernel else "",
        version=kernel.version if kernel else "",
        arch=str(target.arch or ""),
        provenance=str(kernel.provenance) if kernel else "",
        accelerator=machine.accelerator.name if machine else "",
    )
