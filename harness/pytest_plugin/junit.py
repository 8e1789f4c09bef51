# SPDX-License-Identifier: GPL-2.0
"""``--junitxml``: pytest writes the file, and gets the evidence of failures and the kernels' provenance for it.

pytest's ``junit_logging`` takes captured output only, and ``record_property`` has one line for each value. So the other
sections of a failed test become its ``system-out``.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict

import pytest
from _pytest.junitxml import xml_key

from harness.host import safe_text
from harness.pytest_plugin.session import GuestTests
from harness.report import results


class JUnitEvidence:
    """The plug-in."""

    def __init__(self, config: pytest.Config, guests: GuestTests) -> None:
        self._config = config
        self._guests = guests
        self._sections: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Add what is known of the kernels to the test suite."""
        file = self._config.stash.get(xml_key, None)
        for target in self._guests.targets.values():
            if file is not None and target.kernel is not None:
                file.add_global_property(f"kernel {target.label}", target.kernel.release)
                file.add_global_property(f"provenance {target.label}", str(target.kernel.provenance))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add the evidence of a failed test, before pytest closes the element of the test with its last report."""
        if hasattr(report, "context"):
            return  # of a subtest
        # Only of guest tests: what others capture may not be XML, and belongs to junit_logging.
        if report.failed and results.verdict([report]):
            self._sections[report.nodeid].update(dict.fromkeys(report.sections))
        sections = self._sections.pop(report.nodeid, None) if report.when == "teardown" else None
        file = self._config.stash.get(xml_key, None)
        if sections and file is not None:
            element = ET.Element("system-out")
            shown = "\n".join(f"--- {title} ---\n{text}\n" for title, text in sections)
            element.text = safe_text.escape(shown)
            file.node_reporter(report).append(element)
