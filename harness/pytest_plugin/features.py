# SPDX-License-Identifier: GPL-2.0
"""The features of a run that only read its results, each a plug-in of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from harness import options
from harness.judging import findings
from harness.judging.findings import Expect
from harness.pytest_plugin.session import GuestTests
from harness.pytest_plugin.target import Target
from harness.pytest_plugin.testrun import Ran

if TYPE_CHECKING:
    from harness.pytest_plugin.record import Record


class ExpectedFindings:
    """``--expect-findings`` and ``--answer``: what is made of the tests that show findings."""

    def __init__(self, expected: Expect) -> None:
        self._expected = expected

    def pytest_guest_test_judged(self, item: pytest.Item, target: Target, ran: Ran) -> None:
        """Change the reports of a test that shows a finding."""
        if target.kernel is not None:
            version, arch = target.kernel.version, str(target.kernel.arch)
            findings.expect(item, ran.judgement.reports, version, arch, self._expected)


class Comparison:
    """With several kernels: each compared with the first of its architecture."""

    def __init__(self, guests: GuestTests, config: pytest.Config) -> None:
        self._guests = guests
        self._config = config

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write a section for each kernel that is compared."""
        from harness.report import compare

        kernels = {label: target.arch for label, target in self._guests.targets.items()}
        width, verbose = self._config.get_terminal_writer().fullwidth, self._config.getoption("verbose") > 0
        seen = self._guests.results(terminalreporter)
        for section in compare.sections(seen, kernels, width, verbose=verbose):
            terminalreporter.section(section.title)
            for each in section.lines:
                terminalreporter.write_line(each.text, **each.markup)


class Gate:
    """``--fail-on=regressed``: the exit status says whether a kernel is worse than the one it is compared with.

    :param record: has the results.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._said: list[str] = []

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Change the exit status of a run whose tests have run."""
        from harness.report import compare, runs

        recording = self._record.recording(None)
        if recording is None or session.exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        self._said = compare.objections(runs.merge([recording]).compared)
        if self._record.others_failed:
            self._said.append("something failed that is no guest test")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED if self._said else pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say why the exit status is what it is."""
        for each in self._said:
            terminalreporter.write_line(f"harness: {each}", red=True)
        if not self._said and any(terminalreporter.stats.get(each) for each in ("failed", "error")):
            terminalreporter.write_line("harness: tests failed, and nothing has regressed: the exit status is 0")


class Costs:
    """``--icount``: the table of what moves cost."""

    def __init__(self, guests: GuestTests) -> None:
        self._guests = guests

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write a section for each architecture."""
        from harness.report import costs

        kernels = {label: target.arch for label, target in self._guests.targets.items()}
        for title, lines in costs.sections(self._guests.results(terminalreporter), kernels):
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)


class Answer:
    """``--answer``: the answer to the project's question, in words."""

    def __init__(self, guests: GuestTests, config: pytest.Config) -> None:
        self._guests = guests
        self._all = config.args_source is not config.ArgsSource.ARGS

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Run the tests that the answer needs, unless others are named."""
        needed = [item for item in items if any(item.get_closest_marker(name) for name in ("question", "finding"))]
        if self._all and len(needed) < len(items):
            config.hook.pytest_deselected(items=[item for item in items if item not in needed])
            items[:] = needed

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Write a section for each kernel that is known."""
        from harness.report import answer

        seen = self._guests.results(terminalreporter)
        for target in self._guests.targets.values():
            if target.kernel is None or target.machine is None:
                continue
            about = f"{target.kernel.release} ({target.kernel.arch}, {target.machine.accelerator.name})"
            terminalreporter.section("Does mremap() break KSM's reverse map?")
            again = f"{target.again}{options.again(terminalreporter.config.getoption)} --answer"
            for line in answer.answer(about, seen, target.label, again):
                terminalreporter.write_line(line)
