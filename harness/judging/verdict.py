# SPDX-License-Identifier: GPL-2.0
"""Turns what a guest reported of a test, and what was seen of the guest, into one judgement.

The test's own outcome is not enough: a kernel that complains on the console, taints itself or dies during a test fails
that test. Harness errors are never reported as kernel failures: they become an error in set-up, with the verdict MISS.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import pytest

from harness.errors import GuestLost, HarnessError, LostCondition, ProtocolError
from harness.host import safe_text
from harness.judging import console, taint

#: Where the agent unpacks the tests, in a guest or on a board; host paths are shown instead.
_GUEST_TESTS = re.compile(r"(/harness|/tmp/mremap-board-\w+)/tests/")

#: What a report of the agent may hold; anything else in it is dropped.
_FIELDS = ("outcome", "longrepr", "when", "sections", "duration", "start", "stop", "user_properties", "wasxfail")

#: What marks the report of a subtest, and what it holds besides (_pytest/subtests.py, pytest 9).
_SUBTEST_TYPE, _SUBTEST = ("_report_type", "SubTestReport"), "_subtest.context"

#: stands between what the kernel did during a test and what the test itself says
AS_WELL = "\n\nThe test itself failed as well:\n"

_OUTCOMES = ("passed", "failed", "skipped")
_PHASES = ("setup", "call", "teardown")

#: Ways to lose a guest that say nothing about its kernel.
_OURS = (LostCondition.QEMU_DIED, LostCondition.CONNECTION_LOST)


class Verdict(StrEnum):
    """KCIDB's status words, worst first (schema v5.3)."""

    #: the kernel is at fault
    FAIL = "FAIL"
    #: the test broke
    ERROR = "ERROR"
    #: the harness broke: the test never ran, or its result is lost
    MISS = "MISS"
    PASS = "PASS"
    #: ran and has no verdict
    DONE = "DONE"
    SKIP = "SKIP"


@dataclass(frozen=True)
class Observation:
    """All that was seen of one test in a guest."""

    #: the agent's serialised reports
    reports: Sequence[dict[str, Any]]
    #: how the guest was lost during the test, or None
    lost: HarnessError | None
    #: the console during the test
    console: str
    #: /proc/sys/kernel/tainted before and after; equal if unknown
    taint: tuple[int, int]
    #: report sections to add when the test did not pass
    evidence: Sequence[tuple[str, str]]

    @property
    def unharmed(self) -> bool:
        """Whether this guest may run another test: it was not lost, did not complain, and has no new taint."""
        return self.lost is None and not console.splats(self.console) and self.taint[0] == self.taint[1]


@dataclass
class Judgement:
    """What a test means for its kernel, with the reports that say so."""

    verdict: Verdict
    #: for set-up, call and teardown, in this order; without the call if set-up did not pass
    reports: list[pytest.TestReport]
    #: one for each of the test's subtests that pytest reports by itself
    subtests: list[pytest.TestReport] = field(default_factory=list)

    @property
    def all_reports(self) -> list[pytest.TestReport]:
        """Those of the phases and of the subtests."""
        return [*self.subtests, *self.reports]

    @property
    def failed(self) -> bool:
        """Whether any phase failed."""
        return any(report.failed for report in self.reports)


def judge(item: pytest.Item, seen: Observation) -> Judgement:
    """The judgement of one test."""
    if seen.lost is not None and not (isinstance(seen.lost, GuestLost) and seen.lost.condition not in _OURS):
        return missed(item, str(seen.lost), seen.evidence)
    try:
        restored = [_restore(item, data) for data in seen.reports]
        subtests = [report for report in restored if _is_subtest(report)]
        reports = [report for report in restored if not _is_subtest(report)]
        _check_phases(reports, complete=seen.lost is None)
        complaints = _complaints(seen)
    except ProtocolError as error:
        return missed(item, str(error), seen.evidence)
    if complaints:
        _fail(item, reports, "\n\n".join(complaints))
    _fail_for_subtests(reports, sum(each.failed for each in subtests))
    for report in reports:
        if report.failed:
            report.sections.extend(seen.evidence)
    return Judgement(_verdict(reports, bool(complaints)), reports, subtests)


def missed(item: pytest.Item, why: str, evidence: Sequence[tuple[str, str]] = ()) -> Judgement:
    """The judgement of a test that could not be run, or whose result was lost, because of a harness error."""
    report = _made(item, "setup", "failed", f"infrastructure: {why}")
    report.sections.extend(evidence)
    return Judgement(Verdict.MISS, [report, _made(item, "teardown", "passed", None)])


def _is_subtest(report: pytest.TestReport) -> bool:
    """Whether pytest made this report for a part of a test (the ``subtests`` fixture, pytest 9)."""
    return hasattr(report, "context")


def _fail_for_subtests(reports: Sequence[pytest.TestReport], failed: int) -> None:
    """A test with failed subtests fails, as on pytest's own terminal."""
    for report in reports:
        if failed and report.when == "call" and report.passed:
            report.outcome = "failed"
            report.longrepr = f"contains {failed} failed subtest{'s' if failed > 1 else ''}"


def _complaints(seen: Observation) -> list[str]:
    complaints = []
    if isinstance(seen.lost, GuestLost):
        complaints.append(f"guest lost ({seen.lost.condition}): {seen.lost}")
    splats = console.splats(seen.console)
    complaints += [
        f"the kernel complained during this test: {each.title}\n{safe_text.escape(each.text)}" for each in splats
    ]
    damage = [bit for bit in taint.new(*seen.taint) if bit.damage]
    if damage and not splats:
        names = ", ".join(map(str, damage))
        complaints.append(f"the kernel tainted itself during this test, without a word on the console: {names}")
    return complaints


def _fail(item: pytest.Item, reports: list[pytest.TestReport], why: str) -> None:
    """Make the report of the test's call say ``why``, in front of what it says already."""
    by_phase = {report.when: report for report in reports}
    recorded = reports[-1].user_properties if reports else []  # not to be lost with the guest
    if "setup" not in by_phase:
        reports.insert(0, _made(item, "setup", "passed", None))
    elif by_phase["setup"].skipped:
        by_phase["setup"].outcome, by_phase["setup"].longrepr = "passed", None  # or it would count twice
    call = by_phase.get("call")
    if call is None:
        call = _made(item, "call", "failed", None)
        reports.insert(1, call)
    own = f"{AS_WELL}{call.longreprtext}" if call.failed and call.longrepr else ""
    call.outcome = "failed"
    call.longrepr = why + own
    if hasattr(call, "wasxfail"):
        del call.wasxfail  # expected to fail, but not to break the kernel
    if "teardown" not in by_phase:
        reports.append(_made(item, "teardown", "passed", None))
        reports[-1].user_properties += recorded


def _verdict(reports: Sequence[pytest.TestReport], kernel_complained: bool) -> Verdict:
    failed = [report.when for report in reports if report.failed]
    if kernel_complained or "call" in failed:
        return Verdict.FAIL
    if failed:
        return Verdict.ERROR
    return Verdict.SKIP if any(report.skipped for report in reports) else Verdict.PASS


def _made(
    item: pytest.Item,
    when: Literal["setup", "call", "teardown"],
    outcome: Literal["passed", "failed"],
    text: str | None,
) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {item.name: 1}, outcome, text, when)


def _restore(item: pytest.Item, data: dict[str, Any]) -> pytest.TestReport:
    """The report a guest sent, as ours: its text made safe, its identity taken from the host's own item.

    :raises ProtocolError: if it is no report.
    """
    try:
        clean = {name: _clean(data[name]) for name in _FIELDS if name in data}
        clean |= {"nodeid": item.nodeid, "location": item.location, "keywords": {item.name: 1}}
        clean |= {name: _finite(clean[name]) for name in ("duration", "start", "stop")}
        if data.get(_SUBTEST_TYPE[0]) == _SUBTEST_TYPE[1]:
            clean |= {_SUBTEST_TYPE[0]: _SUBTEST_TYPE[1], _SUBTEST: _subtest(data[_SUBTEST])}
        else:
            clean["$report_type"] = "TestReport"
        if clean["outcome"] not in _OUTCOMES or clean["when"] not in (_PHASES if _SUBTEST not in clean else ("call",)):
            raise ValueError("unknown outcome or phase")
        if isinstance(clean["longrepr"], list):
            path, line, reason = clean["longrepr"]
            clean["longrepr"] = (str(path), int(line), str(reason))
        clean["sections"] = [(str(name), str(text)) for name, text in clean["sections"]]
        clean["user_properties"] = [(str(name), value) for name, value in clean["user_properties"]]
        if "wasxfail" in clean:
            clean["wasxfail"] = str(clean["wasxfail"])
        elif clean["outcome"] == "skipped" and not isinstance(clean["longrepr"], tuple):
            raise ValueError("a skip without a place and a reason")
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=clean)
        assert isinstance(report, pytest.TestReport)
        if report.failed and not report.longreprtext:
            raise ValueError("a failure without a reason")
        _check_crash(getattr(report.longrepr, "reprcrash", None))
    except Exception as error:  # pytest trusts its own format, and trips over anything else in its own ways
        raise ProtocolError(f"the agent sent something that is not a report: {str(error)[:200]!r}") from error
    return report


def _subtest(data: Any) -> dict[str, Any]:
    """What a subtest's report says of its place in the test."""
    message, values = data["msg"], data["kwargs"]
    return {
        "msg": None if message is None else _clean(str(message)),
        "kwargs": {_clean(str(name)): _clean(str(value)) for name, value in values.items()},
    }


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError("a time that is no number")
    return float(value)


def _check_crash(crash: Any) -> None:
    """The one part of a failure that pytest shows without rendering the whole."""
    if crash is not None and not (
        isinstance(crash.path, str) and isinstance(crash.lineno, int) and isinstance(crash.message, str)
    ):
        raise ValueError("a failure whose place is none")


def _check_phases(reports: Sequence[pytest.TestReport], *, complete: bool) -> None:
    """A test that is over has told of all its phases, once each and in order; one that was cut short, of the first.

    :raises ProtocolError: if not. Silence must never pass for success.
    """
    phases = [report.when for report in reports]
    expected = list(_PHASES) if reports and reports[0].passed else ["setup", "teardown"]
    if phases != (expected if complete else expected[: len(phases)]):
        told = ", ".join(map(str, phases)) or "nothing"
        raise ProtocolError(f"the agent reported {told} of a test, where {', '.join(expected)} were due")


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return safe_text.escape(_GUEST_TESTS.sub("", value))
    if isinstance(value, list):
        return [_clean(each) for each in value]
    if isinstance(value, dict):
        return {str(name): _clean(each) for name, each in value.items()}
    return value
