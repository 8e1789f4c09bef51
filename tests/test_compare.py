# SPDX-License-Identifier: GPL-2.0
"""Kernels are compared test by test: regressions stand out, and harness errors are not compared. No test here boots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from harness.arch import ARM64, X86_64, Architecture
from harness.judging import findings
from harness.judging.findings import Expect, Finding, Range
from harness.judging.verdict import Judgement, Observation, Verdict, judge
from harness.report import compare, results
from harness.report.compare import Change, Row, Section
from harness.report.results import LACKS, Facts, Outcome, Result

OLD, NEW = "debian:6.12-x86_64", "debian:7.3-x86_64"
BOTH: Mapping[str, Architecture | None] = {OLD: X86_64, NEW: X86_64}

Phase = Literal["setup", "call", "teardown"]

#: The phases that did not pass, by how a test ends.
ENDS: Mapping[Verdict, Mapping[Phase, Literal["failed", "skipped"]]] = {
    Verdict.PASS: {},
    Verdict.FAIL: {"call": "failed"},
    Verdict.ERROR: {"setup": "failed"},
    Verdict.SKIP: {"setup": "skipped"},
    Verdict.MISS: {"setup": "failed"},
}


def ran(
    label: str,
    test: str,
    verdict: Verdict,
    text: str = "",
    *,
    parameters: str = "",
    module: str = "guest_tests/test_a.py",
    recorded: Sequence[tuple[str, object]] = (),
) -> list[pytest.TestReport]:
    """The reports of one test on one kernel, as the plug-in hands them to pytest."""
    brackets = f"{label}-{parameters}" if parameters else label
    ends = ENDS[verdict]
    phases: list[Phase] = ["setup", "teardown"] if "setup" in ends else ["setup", "call", "teardown"]
    reports = [
        pytest.TestReport(
            f"{module}::{test}[{brackets}]",
            (module, 1, test),
            {},
            ends.get(phase, "passed"),
            None if phase not in ends else (module, 1, f"Skipped: {text}") if ends[phase] == "skipped" else text,
            phase,
            user_properties=recorded,
        )
        for phase in phases
    ]
    own = f"[{parameters}]" if parameters else ""
    results.encode(Judgement(verdict, reports), Facts(label=label, test=f"{module}::{test}{own}"))
    return reports


def result(outcome: Outcome, message: str = "") -> Result:
    """What became of some test on some kernel."""
    return Result(Facts(label="k", test="a.py::test_a"), outcome, message)


def decoded(reports: Sequence[pytest.TestReport], label: str) -> dict[str, tuple[Outcome, str]]:
    """Outcome and message by test, of one kernel."""
    return {
        each.facts.test: (each.outcome, each.message) for each in results.decode(reports) if each.facts.label == label
    }


def said(sections: Sequence[Section]) -> str:
    return "\n".join(line for each in sections for line in (f"== {each.title} ==", *(each.text for each in each.lines)))


def compared(
    reports: Sequence[pytest.TestReport],
    kernels: Mapping[str, Architecture | None] = BOTH,
    width: int = 100,
    *,
    verbose: bool = False,
) -> str:
    return said(compare.sections(results.decode(reports), kernels, width, verbose=verbose))


# --- the class of a test ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("baseline", "other", "change"),
    [
        (Outcome.PASSED, Outcome.PASSED, Change.SAME),
        (Outcome.PASSED, Outcome.FAILED, Change.REGRESSED),
        (Outcome.PASSED, Outcome.ERROR, Change.REGRESSED),
        (Outcome.PASSED, Outcome.XFAILED, Change.REGRESSED),
        (Outcome.PASSED, Outcome.SKIPPED, Change.REGRESSED),
        (Outcome.FAILED, Outcome.PASSED, Change.FIXED),
        (Outcome.ERROR, Outcome.PASSED, Change.FIXED),
        (Outcome.XFAILED, Outcome.PASSED, Change.FIXED),
        (Outcome.FAILED, Outcome.FAILED, Change.SAME),
        (Outcome.XFAILED, Outcome.FAILED, Change.SAME),
        (Outcome.ERROR, Outcome.FAILED, Change.SAME),
        (Outcome.FAILED, Outcome.SKIPPED, Change.REGRESSED),
        (Outcome.SKIPPED, Outcome.PASSED, Change.NEW),
        (Outcome.SKIPPED, Outcome.FAILED, Change.REGRESSED),
        (Outcome.SKIPPED, Outcome.SKIPPED, Change.SAME),
        (Outcome.LACKING, Outcome.PASSED, Change.NEW),
        (Outcome.LACKING, Outcome.FAILED, Change.REGRESSED),
        (Outcome.LACKING, Outcome.LACKING, Change.SAME),
        (Outcome.PASSED, Outcome.LACKING, Change.REGRESSED),
    ],
)
def test_the_class_of_a_test_follows_from_both_outcomes(baseline: Outcome, other: Outcome, change: Change) -> None:
    assert Row("a.py::test_a", result(baseline), result(other)).change is change


@pytest.mark.parametrize("trouble", [Outcome.MISS, Outcome.NONE])
@pytest.mark.parametrize("outcome", list(Outcome))
def test_without_a_verdict_on_both_sides_nothing_is_compared(trouble: Outcome, outcome: Outcome) -> None:
    for pair in ((trouble, outcome), (outcome, trouble)):
        assert Row("a.py::test_a", *map(result, pair)).change is Change.NOT_COMPARED


@pytest.mark.parametrize(
    ("baseline", "other", "why"),
    [
        (result(Outcome.PASSED), result(Outcome.FAILED, "lost"), "lost"),
        (result(Outcome.FAILED, "was lost"), result(Outcome.PASSED), "was lost"),
        (result(Outcome.FAILED, "was lost"), result(Outcome.FAILED, "is lost"), "is lost"),
        (result(Outcome.PASSED), result(Outcome.SKIPPED, "needs CONFIG_KSM"), "no longer runs: needs CONFIG_KSM"),
        (result(Outcome.FAILED, "lost"), result(Outcome.SKIPPED, "needs swap"), "no longer runs: needs swap"),
        (result(Outcome.SKIPPED, "needs 7.3"), result(Outcome.FAILED, "lost"), "new, but broken: lost"),
        (result(Outcome.PASSED), result(Outcome.PASSED), ""),
    ],
)
def test_the_new_trouble_is_told_or_else_the_old(baseline: Result, other: Result, why: str) -> None:
    assert Row("a.py::test_a", baseline, other).why == why


# --- what became of a test on one kernel -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "outcome"),
    [
        (Verdict.PASS, Outcome.PASSED),
        (Verdict.FAIL, Outcome.FAILED),
        (Verdict.ERROR, Outcome.ERROR),
        (Verdict.SKIP, Outcome.SKIPPED),
        (Verdict.MISS, Outcome.MISS),
    ],
)
def test_the_outcome_is_the_verdict_of_all_phases_in_whatever_order(verdict: Verdict, outcome: Outcome) -> None:
    reports = ran(OLD, "test_a", verdict, "it broke")
    expected = {"guest_tests/test_a.py::test_a": (outcome, "" if verdict is Verdict.PASS else "it broke")}
    assert decoded(reports, OLD) == expected
    assert decoded(reports[::-1], OLD) == expected


def test_a_test_that_passes_because_the_kernel_refuses_shows_no_ability() -> None:
    reports = ran(OLD, "test_a", Verdict.PASS, recorded=[(LACKS, "MREMAP_RELOCATE_ANON")])
    assert decoded(reports, OLD) == {"guest_tests/test_a.py::test_a": (Outcome.LACKING, "")}


def test_the_failure_of_a_call_is_told_before_that_of_its_teardown() -> None:
    reports = ran(OLD, "test_a", Verdict.FAIL, "the call")
    reports[2].outcome, reports[2].longrepr = "failed", "the teardown"
    assert decoded(reports[::-1], OLD)["guest_tests/test_a.py::test_a"] == (Outcome.FAILED, "the call")


def test_of_a_test_that_was_run_again_the_last_run_counts() -> None:
    """pytest-rerunfailures calls the report of a run that it repeats "rerun"."""
    first, last = ran(OLD, "test_a", Verdict.FAIL, "at first"), ran(OLD, "test_a", Verdict.PASS)
    first[1].outcome = "rerun"  # type: ignore[assignment]
    assert decoded([*first, *last], OLD) == {"guest_tests/test_a.py::test_a": (Outcome.PASSED, "")}


def test_a_real_failure_is_told_by_its_exception(request: pytest.FixtureRequest) -> None:
    """As a guest sends it: what pytest makes of an exception, by way of JSON."""
    with pytest.raises(AssertionError) as caught:
        raise AssertionError("PFN 0x10 was lost\nand more")
    item, hook = request.node, request.config.hook
    sent = [pytest.TestReport(item.nodeid, item.location, {}, "passed", None, when) for when in ("setup", "teardown")]
    call: pytest.CallInfo[None] = pytest.CallInfo(None, caught, 0, 0, 0, "call", _ispytest=True)
    sent.insert(1, pytest.TestReport.from_item_and_call(item, call))
    data = [json.loads(json.dumps(hook.pytest_report_to_serializable(config=request.config, report=r))) for r in sent]
    judgement = judge(item, Observation(data, None, "", (0, 0), []))
    results.encode(judgement, Facts(label="k", test="a.py::test_a"))
    assert decoded(judgement.reports, "k") == {"a.py::test_a": (Outcome.FAILED, "AssertionError: PFN 0x10 was lost")}


@pytest.mark.parametrize("audits", [None, 0, 3])
def test_the_facts_come_back_as_they_went(audits: int | None) -> None:
    facts = Facts(
        label=OLD,
        test="a.py::test_a",
        guest="clone",
        release="6.12.118",
        arch="x86_64",
        accelerator="tcg",
        obstacles=("cannot clone guests", "cannot audit"),
        audits=audits,
        audit_seconds=0.25 if audits else 0.0,
        audit_errors=1 if audits else 0,
    )
    report = pytest.TestReport("a.py::test_a", ("a.py", 1, "test_a"), {}, "passed", None, "call")
    results.encode(Judgement(Verdict.PASS, [report]), facts)
    (result,) = results.decode([report])
    assert result.facts == facts
    assert result.records == []


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One finding, of x86-64 kernels before 7.3."""
    bug = Finding("some-name", "A summary.", "A cause.", "An effect.", "-k a", (Range(("x86_64",), "", ("7.3",)),))
    monkeypatch.setattr(findings, "known", lambda: {"some-name": bug})


def finding(request: pytest.FixtureRequest, label: str, verdict: Verdict, release: str) -> list[pytest.TestReport]:
    """The reports of a test that --expect-findings expects to fail before 7.3."""
    request.node.add_marker(pytest.mark.finding("some-name", match="lost"))
    reports = ran(label, "test_a", verdict, "a page was lost")
    findings.expect(request.node, reports, release, "x86_64", Expect.AS_RECORDED)
    return reports


@pytest.mark.usefixtures("recorded")
def test_an_expected_finding_is_broken_until_it_is_gone(request: pytest.FixtureRequest) -> None:
    reports = finding(request, OLD, Verdict.FAIL, "6.12") + finding(request, NEW, Verdict.PASS, "7.3")
    text = compared(reports)
    assert "xfailed -> passed  guest_tests/test_a.py::test_a\n      a page was lost" in text.partition("fixed:")[2]


@pytest.mark.usefixtures("recorded")
def test_a_finding_that_is_gone_is_fixed_although_it_fails_the_run(request: pytest.FixtureRequest) -> None:
    """The list of findings is wrong then, the kernel is not."""
    reports = finding(request, OLD, Verdict.FAIL, "6.12") + finding(request, NEW, Verdict.PASS, "6.13")
    assert reports[-2].failed
    assert "xfailed -> passed" in compared(reports).partition("fixed:")[2]


# --- which test it is ------------------------------------------------------------------------------------------------


def test_a_kernel_whose_label_another_begins_with_keeps_its_own_results() -> None:
    """Two trees called linux: their tests' ids alone do not tell which is whose."""
    reports = ran("linux-x86_64", "test_a", Verdict.PASS, parameters="2")
    reports += ran("linux-x86_64-2", "test_a", Verdict.FAIL, "of the second")
    assert reports[0].nodeid == reports[-1].nodeid
    assert decoded(reports, "linux-x86_64") == {"guest_tests/test_a.py::test_a[2]": (Outcome.PASSED, "")}
    assert decoded(reports, "linux-x86_64-2") == {"guest_tests/test_a.py::test_a": (Outcome.FAILED, "of the second")}


def test_what_a_guest_recorded_under_our_names_is_not_believed() -> None:
    forged = [("verdict", "PASS"), ("label", NEW), ("test", "a.py::test_other"), ("audits", "many")]
    reports = ran(OLD, "test_a", Verdict.FAIL, recorded=forged)
    assert not decoded(reports, NEW)
    assert decoded(reports, OLD) == {"guest_tests/test_a.py::test_a": (Outcome.FAILED, "")}


def test_reports_that_are_not_of_a_kernel_are_left_out() -> None:
    """A test of the host, or one whose xdist worker crashed."""
    crashed: Any = "???"
    reports = [
        pytest.TestReport("tests/test_a.py::test_a", ("tests/test_a.py", 1, "test_a"), {}, "passed", None, "call"),
        pytest.TestReport(f"a.py::test_a[{OLD}]", ("a.py", None, "a.py"), {}, "failed", "crashed", crashed),
    ]
    assert compared(reports) == ""


# --- what is printed -------------------------------------------------------------------------------------------------

MANY = [
    *ran(OLD, "test_whole", Verdict.PASS),
    *ran(NEW, "test_whole", Verdict.PASS),
    *ran(OLD, "test_hole", Verdict.FAIL, "AssertionError: PFN 0x10 was lost\nassert 1 == 2", parameters="3-4"),
    *ran(NEW, "test_hole", Verdict.PASS, parameters="3-4"),
    *ran(OLD, "test_walk", Verdict.PASS, module="guest_tests/test_walks.py"),
    *ran(NEW, "test_walk", Verdict.FAIL, "the kernel complained: BUG: \x1b[2J", module="guest_tests/test_walks.py"),
    *ran(OLD, "test_idle", Verdict.PASS, module="guest_tests/test_walks.py"),
    *ran(NEW, "test_idle", Verdict.SKIP, "needs CONFIG_IDLE_PAGE_TRACKING", module="guest_tests/test_walks.py"),
    *ran(OLD, "test_relocates", Verdict.SKIP, "needs MREMAP_RELOCATE_ANON", module="guest_tests/test_zeal.py"),
    *ran(NEW, "test_relocates", Verdict.PASS, module="guest_tests/test_zeal.py"),
    *ran(OLD, "test_undoes", Verdict.SKIP, "needs MREMAP_RELOCATE_ANON", module="guest_tests/test_zeal.py"),
    *ran(NEW, "test_undoes", Verdict.FAIL, "AssertionError: 2 VMAs", module="guest_tests/test_zeal.py"),
    *ran(OLD, "test_network", Verdict.MISS, "infrastructure: no network", module="guest_tests/test_zeal.py"),
    *ran(NEW, "test_network", Verdict.FAIL, "AssertionError: 2 VMAs", module="guest_tests/test_zeal.py"),
    *ran(OLD, "test_cut_short", Verdict.PASS, module="guest_tests/test_zeal.py"),
]

TABLE = """\
== debian:7.3-x86_64 compared with debian:6.12-x86_64 ==
               fixed  regressed  new ability  same  not compared
test_a.py          1          -            -     1             -
test_walks.py      -          2            -     -             -
test_zeal.py       -          1            1     -             2
all                1          3            1     1             2

fixed:
  failed -> passed  guest_tests/test_a.py::test_hole[3-4]
      AssertionError: PFN 0x10 was lost

regressed:
  passed -> skipped  guest_tests/test_walks.py::test_idle
      no longer runs: needs CONFIG_IDLE_PAGE_TRACKING
  passed -> failed   guest_tests/test_walks.py::test_walk
      the kernel complained: BUG: \\x1b[2J
  skipped -> failed  guest_tests/test_zeal.py::test_undoes
      new, but broken: AssertionError: 2 VMAs"""

THE_REST = """

new ability:
  skipped -> passed  guest_tests/test_zeal.py::test_relocates
      needs MREMAP_RELOCATE_ANON

same:
  passed -> passed  guest_tests/test_a.py::test_whole

not compared:
  passed -> no result  guest_tests/test_zeal.py::test_cut_short
  MISS -> failed       guest_tests/test_zeal.py::test_network
      AssertionError: 2 VMAs"""


def test_the_table_counts_by_module_and_names_what_was_fixed_and_what_regressed() -> None:
    assert compared(MANY) == TABLE


def test_verbose_names_every_test() -> None:
    assert compared(MANY, verbose=True) == TABLE + THE_REST


def test_the_order_in_which_reports_arrive_does_not_matter() -> None:
    """xdist's workers report as they like, and pytest sorts by outcome."""
    assert compared(MANY[::-1]) == TABLE


def test_each_kernel_is_compared_with_the_first_of_its_architecture() -> None:
    kernels: dict[str, Architecture | None] = {"a-x86_64": X86_64, "a-arm64": ARM64, "b-x86_64": X86_64}
    kernels |= {"b-arm64": ARM64, "c-x86_64": X86_64}
    reports = [report for label in kernels for report in ran(label, "test_a", Verdict.PASS)]
    assert [each.title for each in compare.sections(results.decode(reports), kernels, 100, verbose=False)] == [
        "b-x86_64 compared with a-x86_64",
        "b-arm64 compared with a-arm64",
        "c-x86_64 compared with a-x86_64",
    ]


def test_a_kernel_alone_on_its_architecture_is_compared_with_nothing() -> None:
    reports = ran(OLD, "test_a", Verdict.PASS) + ran(NEW, "test_a", Verdict.PASS)
    assert compared(reports, {OLD: X86_64}) == ""
    assert compared(reports, {OLD: X86_64, NEW: ARM64}) == ""


def test_a_machine_whose_architecture_is_unknown_says_what_would_help() -> None:
    reports = ran(OLD, "test_a", Verdict.PASS) + ran("ssh-board", "test_a", Verdict.PASS)
    assert compared(reports, {"ssh-board": None}) == ""
    text = compared(reports, {OLD: X86_64, "ssh-board": None})
    assert text.startswith("== ssh-board compared with nothing ==")
    assert "give --arch" in text


def test_nothing_is_said_of_a_run_without_tests() -> None:
    assert compared([]) == ""


def test_messages_are_cut_to_the_terminals_width_and_ids_are_not() -> None:
    test = "test_" + "long_" * 30 + "name"
    reports = ran(OLD, test, Verdict.FAIL, "word\t " * 1000) + ran(NEW, test, Verdict.PASS)
    *_, name, message = compared(reports, width=70).splitlines()
    assert name.endswith(test)
    assert len(message) == 70
    assert message.startswith("      word word")
    assert message.endswith("…")


def test_a_name_that_leaves_no_room_for_the_columns_is_cut_in_front() -> None:
    module = "guest_tests/test_a_module_with_quite_a_long_name.py"
    reports = ran(OLD, "test_a", Verdict.PASS, module=module) + ran(NEW, "test_a", Verdict.PASS, module=module)
    _, head, row, _ = compared(reports, width=80).splitlines()
    assert len(row) == len(head) == 80
    assert row.startswith("…")
    assert "_long_name.py  " in row


def test_modules_below_several_directories_keep_what_tells_them_apart() -> None:
    reports = [
        report
        for module in ("guest_tests/test_a.py", "guest_tests/mm/test_a.py")
        for label in (OLD, NEW)
        for report in ran(label, "test_a", Verdict.PASS, module=module)
    ]
    assert [line.split()[0] for line in compared(reports).splitlines()[2:]] == ["mm/test_a.py", "test_a.py", "all"]


def test_a_module_has_the_colour_of_its_worst_test() -> None:
    (section,) = compare.sections(results.decode(MANY), BOTH, 100, verbose=False)
    colours = {line.text.split()[0]: dict(line.markup) for line in section.lines[1:5]}
    assert colours["test_a.py"] == {"green": True}
    assert colours["test_walks.py"] == colours["test_zeal.py"] == colours["all"] == {"red": True}
