# SPDX-License-Identifier: GPL-2.0
"""Findings: tests that fail because a released kernel misbehaves.

Such a test is marked ``finding(name, match=…, fixed=…)`` and fails like any other: that is its verdict on the kernel.
Continuous integration asks for ``--expect-findings``, which turns the failure into an expected one, and turns a pass
into a failure, so that a fix is noticed and the list in ``docs/findings.md`` stays true.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest


def expect(item: pytest.Item, reports: Sequence[pytest.TestReport], release: str) -> None:
    """Judge a test that is a finding as one that must fail in its call, for CI.

    Skips stay skips, and a failure that does not say what the finding says (its ``match``, or one of several) stays a
    failure. Its message counts, not the traceback: that shows the source of other messages too.
    """
    call = next((report for report in reports if report.when == "call"), None)
    marker = item.get_closest_marker("finding")
    if call is None or marker is None or not _concerns(marker, release):
        return
    name, match = str(marker.args[0]), marker.kwargs.get("match", "")
    wanted = (match,) if isinstance(match, str) else match
    if call.failed and any(each in _message(call) for each in wanted):
        call.outcome = "skipped"
        call.wasxfail = f"finding {name}, see docs/findings.md"
    elif call.passed:
        call.outcome = "failed"
        call.longrepr = (
            f"finding {name} does not show on {release}: say where it was fixed, in its marker and in docs/findings.md"
        )


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return report.longreprtext if crash is None else str(crash.message)


def _concerns(marker: pytest.Mark, release: str) -> bool:
    first, fixed = str(marker.kwargs.get("first", "")), str(marker.kwargs.get("fixed", ""))
    return _version(first) <= _version(release) and (not fixed or _version(release) < _version(fixed))


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a release: "6.12.117+deb13" is (6, 12, 117)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
