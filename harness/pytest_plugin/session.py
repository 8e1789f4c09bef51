# SPDX-License-Identifier: GPL-2.0
"""The plug-in of a run with ``--kernel``: it multiplies guest tests by kernels and runs them in guests.

To pytest a guest test is an ordinary item. Its set-up runs the whole test in a guest and keeps the reports that come
back. Each phase then reports what the guest reported of it. So pytest's own protocol stays in place, and plug-ins that
build on it, such as pytest-rerunfailures or Allure, see guest tests like any other.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
from _pytest.skipping import xfailed_key

import harness
from harness.errors import UsageError
from harness.judging import findings
from harness.machine import payload
from harness.pytest_plugin import defaults
from harness.pytest_plugin.progress import TerminalProgress
from harness.pytest_plugin.target import Target
from harness.pytest_plugin.testrun import Policy, Ran, TestRunner
from harness.report import results
from harness.report.results import Result, kernel_label

_RAN = pytest.StashKey[Ran]()


class GuestTests:
    """The guest tests of a run.

    :param targets: the kernels, by label.
    :param tests: the directory of guest tests.
    :param args: pytest's command line in the guests.
    :param progress: shows what takes long.
    """

    def __init__(
        self, targets: dict[str, Target], tests: Path, args: list[str], policy: Policy, progress: TerminalProgress
    ) -> None:
        self.targets = targets
        self._tests = tests
        self._runners = {label: TestRunner(target, tests, args, policy) for label, target in targets.items()}
        self._progress = progress
        self._next: pytest.Item | None = None

    def results(self, terminalreporter: pytest.TerminalReporter) -> Sequence[Result]:
        """What became of the tests, from all workers."""
        return results.decode(report for reports in terminalreporter.stats.values() for report in reports)

    # --- the run -----------------------------------------------------------------------------------------------------

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Fetch the kernels before anything runs, so that a wrong name is a usage error."""
        if session.config.getoption("collectonly", default=False):
            return
        try:
            payload.check_tests(self._tests)
            for target in self.targets.values():
                target.prepare()
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        self._progress.clear()

    def pytest_sessionfinish(self) -> None:
        """End all guests."""
        self._progress.clear()
        for runner in self._runners.values():
            runner.close()

    def pytest_report_header(self) -> list[str]:
        """Say which kernels run, and how."""
        lines = [f"mremap-harness {harness.__version__}"]
        for target in self.targets.values():
            if target.kernel is not None and target.machine is not None:
                accelerator = target.machine.accelerator
                lines.append(f"kernel {target.label}: {target.kernel.release}, {target.kernel.provenance}")
                lines.append(f"  under {accelerator.name}: {accelerator.reason}")
        return lines

    def pytest_report_teststatus(self, report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
        """Count the tests of a kernel that cannot be had, and list only the first of them as an error."""
        if isinstance(report, pytest.TestReport) and results.is_told(report):
            return "not run", "E", "NOT RUN"
        return None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say what could not be done as asked."""
        seen = self.results(terminalreporter)
        for obstacle in dict.fromkeys(obstacle for result in seen for obstacle in result.facts.obstacles):
            terminalreporter.write_line(f"harness: {obstacle}")

    # --- items -------------------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Multiply guest tests by kernels."""
        if metafunc.definition.path.is_relative_to(self._tests):
            metafunc.fixturenames.append(results.KERNEL_PARAMETER)
            labels = list(self.targets)
            metafunc.parametrize(results.KERNEL_PARAMETER, labels, ids=labels, scope="session")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Set up no fixture of a guest test on the host: they belong to the guest. Check its marker."""
        for item in items:
            if isinstance(item, pytest.Function) and kernel_label(item):
                item.fixturenames = []
                try:
                    findings.of(item)
                except UsageError as error:
                    raise pytest.UsageError(str(error)) from error

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Refuse a run in which nothing is a guest test: its tests would run on the host, with its kernel.

        :raises pytest.UsageError: if there are tests, and none of them is below the directory of guest tests.
        """
        if defaults.kernels_from_file(session.config):
            return  # tests of the host were named, or the whole project was
        if session.items and not any(kernel_label(item) for item in session.items):
            raise pytest.UsageError(
                f"--kernel is given, but none of these tests is below {self._tests}, so none would run in a guest. "
                "Name tests below that directory. In a project of your own, set guest_tests in its pytest "
                "configuration. In another checkout of this one, use the pytest that its `make setup` installs."
            )

    # --- the phases of one item --------------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """Get a guest, remember what comes next, and tell the features when a test is over."""
        label = kernel_label(item)
        self._next = nextitem if nextitem is not None and kernel_label(nextitem) == label else None
        if label:
            self._runners[label].prepare(item)
            self._progress.clear()
        result = yield
        if label and (ran := item.stash.get(_RAN, None)) is not None:
            item.ihook.pytest_guest_test_finished(item=item, target=self.targets[label], ran=ran)
            if ran.kept is not None:
                self._runners[label].end_guests()
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Run the whole test in a guest."""
        if not (label := kernel_label(item)):
            return
        ran = self._runners[label].run(item, self._next)
        item.ihook.pytest_guest_test_judged(item=item, target=self.targets[label], ran=ran)
        results.encode(ran.judgement, ran.facts, told=ran.told)
        item.stash[_RAN] = ran

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        """Report the subtests that ran in the guest; the call itself is over."""
        if not kernel_label(pyfuncitem):
            return None
        for report in pyfuncitem.stash[_RAN].judgement.subtests:
            pyfuncitem.ihook.pytest_runtest_logreport(report=report)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> pytest.TestReport | None:
        """Report a phase as the guest did, or as it was judged."""
        ran = item.stash.get(_RAN, None) if kernel_label(item) else None
        if ran is None:
            return None
        # The guest has evaluated the item's xfail marks. pytest would evaluate them again, against this report.
        item.stash[xfailed_key] = None
        return next((report for report in ran.judgement.reports if report.when == call.when), None)
