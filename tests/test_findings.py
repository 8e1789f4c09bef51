# SPDX-License-Identifier: GPL-2.0
"""Findings: which kernels have them, and what is made of the tests that show them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from harness import paths
from harness.errors import UsageError
from harness.judging import findings
from harness.judging.findings import Expect, Finding, Range
from harness.judging.verdict import AS_WELL

SAYS = "the child got SIGBUS"
NAME = "some-name"


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding, of x86-64 kernels from 6.12 until 7.4."""
    finding = Finding(NAME, "A summary.", "A cause.", "An effect.", "-k a", (Range(("x86_64",), "6.12", ("7.4",)),))
    monkeypatch.setattr(findings, "known", lambda: {NAME: finding})


def judged(
    request: pytest.FixtureRequest,
    outcome: str,
    text: str | None,
    release: str = "7.3.4+deb13",
    arch: str = "x86_64",
    expected: Expect = Expect.AS_RECORDED,
) -> pytest.TestReport:
    """The report of a call that ended with ``outcome``, of a test marked as a finding, after the judgement."""
    item = request.node
    item.add_marker(pytest.mark.finding(NAME, match=SAYS))
    report = pytest.TestReport(item.nodeid, item.location, {}, outcome, text, "call")  # type: ignore[arg-type]
    findings.expect(item, [report], release, arch, expected)
    return report


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("expected", list(Expect))
def test_a_finding_that_shows_is_an_expected_failure(request: pytest.FixtureRequest, expected: Expect) -> None:
    report = judged(request, "failed", f"AssertionError: {SAYS} for 0x1000", expected=expected)
    assert report.outcome == "skipped"
    assert NAME in report.wasxfail


@pytest.mark.usefixtures("recorded")
def test_a_finding_that_no_longer_shows_fails_so_that_somebody_notices(request: pytest.FixtureRequest) -> None:
    report = judged(request, "passed", None)
    assert report.failed
    assert "does not show on 7.3.4+deb13" in report.longreprtext


@pytest.mark.usefixtures("recorded")
def test_where_a_finding_is_a_question_it_may_show_on_any_kernel_or_not(request: pytest.FixtureRequest) -> None:
    assert judged(request, "passed", None, expected=Expect.SHOWS_OR_NOT).passed
    assert judged(request, "failed", SAYS, "6.1.192", expected=Expect.SHOWS_OR_NOT).outcome == "skipped"


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("expected", list(Expect))
def test_a_finding_that_fails_for_another_reason_stays_a_failure(
    request: pytest.FixtureRequest, expected: Expect
) -> None:
    report = judged(request, "failed", "guest lost (panic): the kernel panicked", expected=expected)
    assert report.failed
    assert report.longreprtext.startswith("guest lost")


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(("message", "expected"), [(f"{SAYS} for 0x1000", True), ("something else", False)])
def test_what_the_source_in_a_traceback_says_does_not_count(
    request: pytest.FixtureRequest, message: str, expected: bool
) -> None:
    def fails() -> None:
        assert not message, message  # the child got SIGBUS, says this line

    with pytest.raises(AssertionError) as caught:
        fails()
    item = request.node
    item.add_marker(pytest.mark.finding(NAME, match=("no such words", SAYS)))
    longrepr = caught.getrepr(style="long")
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", longrepr, "call")
    assert SAYS in report.longreprtext
    findings.expect(item, [report], "7.3", "x86_64", Expect.AS_RECORDED)
    assert report.failed is not expected


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("release", "arch", "shows"),
    [
        ("6.11.9", "x86_64", False),
        ("6.12", "x86_64", True),
        ("6.12.117+deb13", "x86_64", True),
        ("6.12.117+deb13", "arm64", False),
        ("7.4.0-rc1", "x86_64", False),
    ],
)
def test_a_finding_is_expected_from_the_first_kernel_that_has_it_until_the_one_that_fixed_it(
    request: pytest.FixtureRequest, release: str, arch: str, shows: bool
) -> None:
    assert judged(request, "failed", SAYS, release, arch).failed is not shows


@pytest.mark.parametrize(
    ("release", "has_it"),
    [
        ("6.1.192", True),
        ("6.12.53", True),
        ("6.12.54+deb12", False),
        ("6.13.1", True),
        ("6.17.3", True),
        ("6.17.4", False),
        ("6.18", False),
        ("7.3.4", False),
    ],
)
def test_a_fix_may_have_gone_to_several_stable_series(release: str, has_it: bool) -> None:
    assert Range(("arm64",), "", ("6.12.54", "6.17.4", "6.18")).covers(release, "arm64") is has_it


def test_a_test_that_is_no_finding_is_left_alone(request: pytest.FixtureRequest) -> None:
    report = pytest.TestReport(request.node.nodeid, request.node.location, {}, "failed", "broken", "call")
    findings.expect(request.node, [report], "7.3", "x86_64", Expect.AS_RECORDED)
    assert report.failed


SHARED = "walk: map / write / fork / mergeable / scan"
NEW = "walk: map / write / move"


def explored(request: pytest.FixtureRequest, text: str, *programs: str, release: str = "7.3.4") -> pytest.TestReport:
    """The report of a test of the explorer's programs, after the judgement."""
    item = request.node
    report = pytest.TestReport(item.nodeid, item.location, {}, "failed", text, "call")
    report.user_properties += [("lacks", "flag 16"), *(("program", each) for each in programs)]
    findings.expect(item, [report], release, "x86_64", Expect.AS_RECORDED)
    return report


def test_programs_of_the_explorer_that_show_findings_are_expected_failures(request: pytest.FixtureRequest) -> None:
    report = explored(request, f"page 1 does not move\n{SHARED}\n", SHARED, SHARED)
    assert report.outcome == "skipped"
    assert "ksm-shared-by-fork, see" in report.wasxfail
    assert ("finding", "ksm-shared-by-fork") in report.user_properties


@pytest.mark.parametrize(
    ("text", "programs"),
    [
        (f"page 1 does not move\n{SHARED}\n{NEW}", [SHARED, NEW]),
        (f"page 1 does not move\n{SHARED}", []),
        ("guest lost (panic): the kernel panicked", [SHARED]),
    ],
)
def test_a_new_failure_of_a_program_stays_a_failure(
    request: pytest.FixtureRequest, text: str, programs: list[str]
) -> None:
    assert explored(request, text, *programs).failed


def test_a_program_shows_nothing_on_a_kernel_without_the_finding(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = replace(findings.known()["ksm-shared-by-fork"], ranges=(Range(("x86_64",), "6.1", ("7.3",)),))
    monkeypatch.setattr(findings, "known", lambda: {gone.name: gone})
    assert explored(request, SHARED, SHARED, release="7.2.12").outcome == "skipped"
    assert explored(request, SHARED, SHARED, release="7.3.4").failed


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("explorer", [True, False])
def test_a_complaint_of_the_kernel_is_not_hidden_by_a_finding(request: pytest.FixtureRequest, explorer: bool) -> None:
    text = f"the kernel complained during this test: BUG: Bad page state{AS_WELL}"
    report = explored(request, text + SHARED, SHARED) if explorer else judged(request, "failed", text + SAYS)
    assert report.failed


def test_a_marker_that_names_no_finding_is_told(request: pytest.FixtureRequest) -> None:
    request.node.add_marker(pytest.mark.finding("no-such-finding"))
    with pytest.raises(UsageError, match="no-such-finding"):
        findings.of(request.node)


def test_every_finding_is_shown_by_a_test_and_every_marker_names_a_finding() -> None:
    sources = "".join(path.read_text() for path in Path(paths.PROJECT / "guest_tests").rglob("test_*.py"))
    named = set(re.findall(r'mark\.finding\(\s*(?:#[^\n]*\n\s*)?"([^"]+)"', sources))
    assert named == set(findings.known())


def test_every_command_of_a_finding_names_a_file_that_is_there() -> None:
    for finding in findings.known().values():
        assert (paths.PROJECT / finding.command.split()[0]).is_file(), finding.name
        assert finding.summary.endswith("."), finding.name


def test_a_program_is_recognized_by_its_operations_and_by_nothing_less() -> None:
    shape = findings.Shape("walk", (("mergeable",), ("scan",), ("move",)))
    assert shape.covers("walk", ["mergeable", "scan", "move"])
    assert shape.covers("walk", ["mergeable", "scan", "move-grow"])
    assert not shape.covers("bytes", ["mergeable", "scan", "move"])
    assert not shape.covers("walk", ["mergeable", "scan", "move", "read"])
    assert not shape.covers("walk", ["mergeable", "move", "scan"])


def test_operations_of_a_group_come_in_any_order() -> None:
    shape = findings.Shape("marks", (("map",), ("write", "mergeable"), ("scan",)))
    assert shape.covers("marks", ["map", "write-same", "mergeable", "scan"])
    assert shape.covers("marks", ["map", "mergeable", "write", "scan"])
    assert not shape.covers("marks", ["write", "map", "mergeable", "scan"])
    assert not shape.covers("marks", ["map", "mergeable", "mergeable", "scan"])
    assert not shape.covers("marks", ["map", "mergeable", "write"])


def test_a_shape_may_allow_other_operations() -> None:
    shape = findings.Shape("accounts", (("uffd-register",), ("move",)), others=True)
    assert shape.covers("accounts", ["map", "uffd-register", "lock", "move-shrink", "unmap"])
    assert not shape.covers("accounts", ["map", "move", "uffd-register"])
    assert not shape.covers("marks", ["uffd-register", "move"])


def test_a_finding_that_shows_in_many_programs_is_known_on_kernels_that_have_it_only() -> None:
    operations = ["map", "lock", "move", "unlock", "move"]
    finding = findings.shown_by("walk", operations, "6.17.13", "x86_64")
    assert finding is not None
    assert finding.name == "merged-with-untouched"
    assert findings.shown_by("walk", operations[:4], "6.17.13", "x86_64") is None
    for release in ("6.12.118", "6.18.9", "7.3.4"):
        assert findings.shown_by("walk", operations, release, "x86_64") is None


def test_programs_of_the_file_may_have_groups() -> None:
    finding = findings.known()["ksm-uffd-unprotected"]
    for operations in (
        ["map", "uffd-register", "mergeable", "write-same", "uffd-protect", "scan"],
        ["map", "write-same", "uffd-register", "uffd-protect", "mergeable", "scan"],
        ["map", "lock", "uffd-register", "mergeable", "uffd-protect", "scan"],
    ):
        assert findings.shown_by("marks", operations, "7.3.4", "arm64") is finding
        assert findings.shown_by("bytes", operations, "7.3.4", "arm64") is None
