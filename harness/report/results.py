# SPDX-License-Identifier: GPL-2.0
"""One result per test and kernel, and the only code that writes it into pytest's reports and reads it back.

A result travels as properties of a test's reports: pytest-xdist brings these from its workers, and JUnit files show
them. A guest may have recorded properties of any name. Ours are added last, and the last of a name counts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pytest

from harness.host import safe_text
from harness.judging.verdict import Judgement, Verdict

#: The name of the parameter that multiplies guest tests by kernels.
KERNEL_PARAMETER = "_kernel"

#: A test records this property to say what the kernel lacks, and that passing means no more than that.
LACKS = "lacks"

#: The title of the evidence that holds a test's audits.
AUDIT_SECTION = "audit of memory"


class Outcome(StrEnum):
    """What became of a test on one kernel."""

    PASSED = "passed"
    #: passed because the kernel lacks the ability that the test is about
    LACKING = "lacking"
    FAILED = "failed"
    #: failed in set-up or teardown
    ERROR = "error"
    #: failed, as --expect-findings or the test expected
    XFAILED = "xfailed"
    SKIPPED = "skipped"
    #: the harness broke
    MISS = "MISS"
    #: was not run: deselected, or the run was cut short
    NONE = "no result"


_OUTCOMES = {
    Verdict.FAIL: Outcome.FAILED,
    Verdict.ERROR: Outcome.ERROR,
    Verdict.PASS: Outcome.PASSED,
    Verdict.SKIP: Outcome.SKIPPED,
}


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Under which conditions a test ran."""

    #: the label of its kernel; unique among the kernels of a run
    label: str
    #: the test's id without the kernel's label, as in the guest
    test: str
    #: where it ran: "clone", "cold boot" or "board"; empty if no guest could be had
    guest: str = ""
    #: the kernel's release; empty while it is not known
    release: str = ""
    #: the kernel's architecture; empty while it is not known
    arch: str = ""
    #: "kvm" or "tcg"; empty for a board
    accelerator: str = ""
    #: what the harness could not do as asked, in sentences
    obstacles: tuple[str, ...] = ()
    #: the finding that the test shows; empty for an ordinary test
    finding: str = ""
    #: audits of the guest's memory, seconds they took, and errors they found; None without --audit
    audits: int | None = None
    audit_seconds: float = 0.0
    audit_errors: int = 0


#: Property by field, in the order in which JUnit files show them.
_PROPERTIES = {
    "guest": "guest",
    "release": "kernel",
    "arch": "arch",
    "accelerator": "accelerator",
    "finding": "finding",
    "audits": "audits",
    "audit_seconds": "audit seconds",
    "audit_errors": "audit errors",
    "label": "label",
    "test": "test",
}
_OBSTACLE = "obstacle"
_VERDICT = "verdict"
#: whether another test has told already why this one could not be run
_TOLD = "told"
_OURS = frozenset({*_PROPERTIES.values(), _OBSTACLE, _VERDICT, _TOLD})

_PHASES = ("setup", "call", "teardown")


@dataclass(frozen=True)
class Result:
    """One test on one kernel."""

    facts: Facts
    outcome: Outcome
    #: why it did not pass: one line, escaped
    message: str = ""
    #: what the test itself recorded. A guest wrote it: check it before use.
    records: Sequence[tuple[str, Any]] = ()


def encode(judgement: Judgement, facts: Facts, *, told: bool = False) -> None:
    """Write a judgement and its facts into its reports, on every phase: JUnit files take them from the last one.

    :param told: another test has told already why this one could not be run.
    """
    properties: list[tuple[str, object]] = [
        (name, value)
        for field, name in _PROPERTIES.items()
        if (value := getattr(facts, field)) not in ("", None)
        if not field.startswith("audit_") or facts.audits is not None
    ]
    properties += [(_OBSTACLE, each) for each in facts.obstacles]
    properties.append((_VERDICT, str(judgement.verdict)))
    properties += [(_TOLD, True)] * told
    for report in judgement.all_reports:
        report.user_properties += properties


def is_told(report: pytest.TestReport) -> bool:
    """Whether a report says what that of another test has said: that there is no kernel to run it on."""
    return report.failed and (_TOLD, True) in report.user_properties


def decode(reports: Iterable[object]) -> list[Result]:
    """The results of a run, in the order in which its first reports came; reports of other tests are left out."""
    phases: defaultdict[tuple[str, str], dict[str, pytest.TestReport]] = defaultdict(dict)
    for report in reports:
        if isinstance(report, pytest.TestReport) and not hasattr(report, "context") and str(report.outcome) != "rerun":
            properties = dict(report.user_properties)
            if _VERDICT in properties and "label" in properties:
                # After a rerun the last report of each phase counts.
                phases[str(properties["label"]), str(properties.get("test", ""))][str(report.when)] = report
    return [_result([each[when] for when in _PHASES if when in each]) for each in phases.values()]


def verdict(reports: Iterable[pytest.TestReport]) -> str:
    """The verdict that the reports of one test carry; empty if they carry none."""
    return next(
        (str(value) for report in reports for name, value in report.user_properties[::-1] if name == _VERDICT), ""
    )


def test_id(item: pytest.Item, root: str) -> str:
    """A test's id inside the guest: its path starts at the guest tests' directory, and no parameter names the kernel.

    :param root: the parent of that directory.
    """
    path = item.path.relative_to(root).as_posix()
    head, bracket, parameters = item.nodeid.partition("::")[2].partition("[")
    rest = parameters.removesuffix("]").removeprefix(kernel_label(item)).removeprefix("-")
    return f"{path}::{head}[{rest}]" if bracket and rest else f"{path}::{head}"


def kernel_label(item: pytest.Item) -> str:
    """The label of the kernel that an item is for; empty if it is no guest test."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get(KERNEL_PARAMETER, "")) if callspec else ""


def _result(reports: Sequence[pytest.TestReport]) -> Result:
    """From the reports of one test, in the order of their phases."""
    properties = dict(reports[0].user_properties)
    records = [(name, value) for report in reports[-1:] for name, value in report.user_properties if name not in _OURS]
    given: dict[str, Any] = {field: properties[name] for field, name in _PROPERTIES.items() if name in properties}
    obstacles = tuple(str(value) for name, value in reports[0].user_properties if name == _OBSTACLE)
    facts = Facts(**given, obstacles=obstacles)
    # The verdict is about the kernel; --expect-findings may have changed the reports since.
    outcome = _OUTCOMES.get(Verdict(str(properties[_VERDICT])), Outcome.MISS)
    if any(report.skipped and hasattr(report, "wasxfail") for report in reports):
        outcome = Outcome.XFAILED
    if outcome is Outcome.PASSED:
        return Result(facts, Outcome.LACKING if any(name == LACKS for name, _ in records) else outcome, "", records)
    ordered = sorted(reports, key=lambda report: not report.failed)
    return Result(facts, outcome, next((message(each) for each in ordered if not each.passed), ""), records)


def message(report: pytest.TestReport) -> str:
    """The first line of what a report says, escaped."""
    crash = getattr(report.longrepr, "reprcrash", None)
    if isinstance(report.longrepr, tuple):
        text = report.longrepr[2].removeprefix("Skipped: ")
    else:
        # Not longreprtext: with pytest-xdist it begins with a line about the worker.
        text = crash.message if crash else str(report.longrepr or "")
    first = next((line for line in text.splitlines() if line.strip()), "")
    return safe_text.escape(" ".join(first.split()))
