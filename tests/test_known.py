# SPDX-License-Identifier: GPL-2.0
"""Findings: how --expect-findings judges tests that fail because of a kernel bug."""

from __future__ import annotations

import pytest

from harness.judging import findings

SAYS = "the child got SIGBUS"


def judged(
    request: pytest.FixtureRequest, outcome: str, text: str | None, release: str, **limits: str
) -> pytest.TestReport:
    """The report of a call that ended with ``outcome``, of a test marked as a finding, after the judgement."""
    item = request.node
    item.add_marker(pytest.mark.finding("some-name", match=SAYS, **limits))
    report = pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")  # type: ignore[arg-type]
    findings.expect(item, [report], release)
    return report


def test_a_finding_that_shows_is_an_expected_failure(request: pytest.FixtureRequest) -> None:
    report = judged(request, "failed", f"AssertionError: {SAYS} for 0x1000", "7.3.4+deb13")
    assert report.outcome == "skipped"
    assert "some-name" in report.wasxfail


def test_a_finding_that_no_longer_shows_fails_so_that_somebody_notices(request: pytest.FixtureRequest) -> None:
    report = judged(request, "passed", None, "7.3.4+deb13")
    assert report.failed
    assert "does not show on 7.3.4+deb13" in report.longreprtext


def test_a_finding_that_fails_for_another_reason_stays_a_failure(request: pytest.FixtureRequest) -> None:
    report = judged(request, "failed", "guest lost (panic): the kernel panicked", "7.3.4+deb13")
    assert report.failed
    assert report.longreprtext.startswith("guest lost")


@pytest.mark.parametrize(("message", "expected"), [(f"{SAYS} for 0x1000", True), ("something else", False)])
def test_what_the_source_in_a_traceback_says_does_not_count(
    request: pytest.FixtureRequest, message: str, expected: bool
) -> None:
    def fails() -> None:
        assert not message, message  # the child got SIGBUS, says this line

    with pytest.raises(AssertionError) as caught:
        fails()
    item = request.node
    item.add_marker(pytest.mark.finding("some-name", match=("no such words", SAYS)))
    longrepr = caught.getrepr(style="long")
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", longrepr, "call")
    assert SAYS in report.longreprtext
    findings.expect(item, [report], "7.3")
    assert report.failed is not expected


@pytest.mark.parametrize(
    ("release", "shows"), [("6.11.9", False), ("6.12", True), ("6.12.117+deb13", True), ("7.4.0-rc1", False)]
)
def test_a_finding_is_expected_from_the_first_kernel_that_has_it_until_the_one_that_fixed_it(
    request: pytest.FixtureRequest, release: str, shows: bool
) -> None:
    report = judged(request, "failed", SAYS, release, first="6.12", fixed="7.4")
    assert report.failed is not shows


def test_a_test_that_is_no_finding_is_left_alone(request: pytest.FixtureRequest) -> None:
    report = pytest.TestReport(request.node.nodeid, request.node.location, {}, "failed", "broken", "call")
    findings.expect(request.node, [report], "7.3")
    assert report.failed
