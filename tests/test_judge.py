# SPDX-License-Identifier: GPL-2.0
"""Console, taint and a lost guest override the test's own result. Harness errors are no kernel failures.

Reports from a guest are not trusted.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

from harness.errors import GuestLost, LostCondition, ProtocolError
from harness.judging.verdict import Observation, Verdict, judge, missed

WARN = 1 << 9
OUT_OF_TREE = 1 << 12
SPLAT = "[    1.000000] BUG: Bad page state in process python3  pfn:12345\n"


@pytest.fixture
def item(request: pytest.FixtureRequest) -> pytest.Item:
    return request.node


def report(when: str, outcome: str = "passed", longrepr: Any = None, **more: Any) -> dict[str, Any]:
    """What an agent sends for one phase."""
    told = {"when": when, "outcome": outcome, "longrepr": longrepr, "sections": [], "user_properties": []}
    return told | {"duration": 0.1, "start": 1.0, "stop": 1.1, "nodeid": "guest's", "location": ["a", 1, "b"]} | more


def phases(call: dict[str, Any]) -> list[dict[str, Any]]:
    return [report("setup"), call, report("teardown")]


def reports_of(item: pytest.Item, seen: Observation) -> list[pytest.TestReport]:
    """The reports of the phases."""
    return judge(item, seen).reports


PASSED = phases(report("call"))
FAILED = phases(report("call", "failed", "assert 1 == 2"))
SKIPPED = [report("setup", "skipped", ["test_a.py", 3, "Skipped: no CONFIG_KSM"]), report("teardown")]


def observation(
    reports: list[dict[str, Any]],
    *,
    lost: LostCondition | None = None,
    console: str = "",
    taint: tuple[int, int] = (0, 0),
) -> Observation:
    trouble = None if lost is None else GuestLost(lost, "it is gone")
    return Observation(reports, trouble, console, taint, [("evidence", "of it")])


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        (observation(PASSED), Verdict.PASS),
        (observation(FAILED), Verdict.FAIL),
        (observation(SKIPPED), Verdict.SKIP),
        (observation([report("setup", "failed", "no fixture"), report("teardown")]), Verdict.ERROR),
        (observation([report("setup"), report("call"), report("teardown", "failed", "left")]), Verdict.ERROR),
        (observation(PASSED, console=SPLAT), Verdict.FAIL),
        (observation(SKIPPED, console=SPLAT), Verdict.FAIL),
        (observation(PASSED, taint=(0, WARN)), Verdict.FAIL),
        (observation(PASSED, taint=(WARN, WARN)), Verdict.PASS),
        (observation(PASSED, taint=(0, OUT_OF_TREE)), Verdict.PASS),
        (observation([report("setup")], lost=LostCondition.PANIC), Verdict.FAIL),
        (observation([], lost=LostCondition.HANG), Verdict.FAIL),
        (observation([], lost=LostCondition.QEMU_DIED), Verdict.MISS),
        (observation(PASSED[:2], lost=LostCondition.QEMU_DIED), Verdict.MISS),
    ],
)
def test_the_verdict_follows_from_all_that_was_seen(item: pytest.Item, seen: Observation, word: Verdict) -> None:
    judgement = judge(item, seen)
    reports = judgement.reports
    assert judgement.verdict == word
    assert [each.when for each in reports] in (["setup", "call", "teardown"], ["setup", "teardown"])
    assert any(each.failed for each in reports) == (word in (Verdict.FAIL, Verdict.ERROR, Verdict.MISS))
    assert all(each.nodeid == item.nodeid for each in reports)


def test_evidence_comes_with_what_failed_and_with_nothing_else(item: pytest.Item) -> None:
    for reports in (reports_of(item, observation(FAILED)), reports_of(item, observation(PASSED))):
        assert all((("evidence", "of it") in each.sections) == each.failed for each in reports)


def test_an_expected_failure_does_not_excuse_the_kernel(item: pytest.Item) -> None:
    expected = phases(report("call", "skipped", "assert 0", wasxfail="reason: known"))
    assert [each.outcome for each in reports_of(item, observation(expected))] == ["passed", "skipped", "passed"]
    _, call, _ = reports_of(item, observation(expected, console=SPLAT))
    assert call.failed
    assert not hasattr(call, "wasxfail")


def test_a_test_that_skipped_and_broke_the_kernel_is_counted_once_as_failed(item: pytest.Item) -> None:
    reports = reports_of(item, observation(SKIPPED, console=SPLAT))
    assert [(each.when, each.outcome) for each in reports] == [
        ("setup", "passed"),
        ("call", "failed"),
        ("teardown", "passed"),
    ]


def test_the_kernels_complaint_comes_first_and_the_tests_own_words_stay(item: pytest.Item) -> None:
    _, call, _ = reports_of(item, observation(FAILED, console=SPLAT))
    assert call.longreprtext.startswith("the kernel complained during this test: BUG: Bad page state")
    assert "assert 1 == 2" in call.longreprtext


def test_a_skip_keeps_the_guests_reason(item: pytest.Item) -> None:
    setup, _ = reports_of(item, observation(SKIPPED))
    assert setup.longrepr == ("test_a.py", 3, "Skipped: no CONFIG_KSM")


def test_what_was_missed_is_an_error_that_says_it_is_ours(item: pytest.Item) -> None:
    judgement = missed(item, "QEMU is not installed")
    setup, teardown = judgement.reports
    assert (setup.when, setup.outcome, teardown.outcome) == ("setup", "failed", "passed")
    assert setup.longreprtext == "infrastructure: QEMU is not installed"
    assert judgement.verdict == Verdict.MISS


def test_the_guests_paths_are_shown_as_ours(item: pytest.Item) -> None:
    text = "/harness/tests/guest_tests/test_a.py:3: AssertionError"
    _, call, _ = reports_of(item, observation(phases(report("call", "failed", text))))
    assert call.longreprtext == "guest_tests/test_a.py:3: AssertionError"


def test_an_unharmed_guest_may_run_another_test() -> None:
    assert observation(FAILED).unharmed
    assert not observation(PASSED, console=SPLAT).unharmed
    assert not observation(PASSED, taint=(0, OUT_OF_TREE)).unharmed
    assert not observation(PASSED, lost=LostCondition.HANG).unharmed


# ----------------------------------------------------------------------------------------------------------------------
# An agent that is broken or lies


@pytest.mark.parametrize(
    "reports",
    [
        [],
        PASSED[:2],
        PASSED[1:],
        [PASSED[0], PASSED[2]],
        [*PASSED, PASSED[1]],
        [PASSED[1], PASSED[0], PASSED[2]],
        [report("setup", "failed", "x"), report("call"), report("teardown")],
    ],
    ids=lambda reports: "-".join(each["when"] for each in reports) or "nothing",
)
def test_silence_and_disorder_are_never_success(item: pytest.Item, reports: list[dict[str, Any]]) -> None:
    assert judge(item, observation(reports)).verdict == Verdict.MISS


def test_an_impossible_taint_is_no_verdict_about_the_kernel(item: pytest.Item) -> None:
    assert judge(item, observation(PASSED, taint=(0, 1 << 4000))).verdict == Verdict.MISS
    assert judge(item, observation(PASSED, taint=(0, -1))).verdict == Verdict.MISS


@pytest.mark.parametrize(
    "change",
    [
        {"outcome": "rerun"},
        {"outcome": ["passed"]},
        {"when": "collect"},
        {"duration": "long"},
        {"duration": float("nan")},
        {"stop": float("inf")},
        {"sections": 7},
        {"sections": [["only a name"]]},
        {"user_properties": None},
        {"longrepr": ["a", "not a line", "c"]},
        {"longrepr": ["a", 1]},
        {"outcome": "failed", "longrepr": None},
        {"outcome": "failed", "longrepr": ""},
        {"outcome": "skipped", "longrepr": "no place"},
        {"outcome": "failed", "longrepr": {"reprcrash": 1, "reprtraceback": 2}},
    ],
    ids=str,
)
def test_what_is_no_report_is_our_trouble(item: pytest.Item, change: dict[str, Any]) -> None:
    seen = observation(phases(report("call") | change))
    judgement = judge(item, seen)
    assert judgement.verdict == Verdict.MISS
    assert judgement.reports[0].longreprtext.startswith("infrastructure: the agent sent something that is not a report")


def test_a_missing_field_is_our_trouble(item: pytest.Item) -> None:
    for name in ("outcome", "when", "longrepr", "sections", "user_properties", "duration", "start", "stop"):
        broken = report("call")
        del broken[name]
        assert judge(item, observation(phases(broken))).verdict == Verdict.MISS, name


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from leaves(child, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], by: Any) -> Any:
    result = copy.deepcopy(value)
    at = result
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = by
    return result


@pytest.fixture
def traceback(item: pytest.Item) -> dict[str, Any]:
    """A failure as pytest really serialises it."""
    try:
        raise ValueError("inner") from KeyError("cause")
    except ValueError:
        excinfo = pytest.ExceptionInfo.from_current()
    real = pytest.TestReport(item.nodeid, item.location, {}, "failed", item.repr_failure(excinfo), "call")
    data = item.config.hook.pytest_report_to_serializable(config=item.config, report=real)
    return {name: data[name] for name in report("call") if name in data}


def test_a_real_traceback_survives_the_way(item: pytest.Item, traceback: dict[str, Any]) -> None:
    _, call, _ = reports_of(item, observation(phases(traceback)))
    assert "KeyError: 'cause'" in call.longreprtext
    assert "ValueError: inner" in call.longreprtext


@pytest.mark.parametrize("by", [None, 7, "text", [], {}, [[1]], {"a": 1}, True, "\x1b[2J"], ids=repr)
def test_a_traceback_with_any_part_replaced_is_shown_or_refused_and_never_obeyed(
    item: pytest.Item, traceback: dict[str, Any], by: Any
) -> None:
    """Whatever pytest's reporters do with a failure must work on every report that was let through."""
    for path in leaves(traceback["longrepr"], ("longrepr",)):
        judgement = judge(item, observation(phases(replaced(traceback, path, by))))
        assert judgement.verdict in (Verdict.FAIL, Verdict.MISS), path
        for each in judgement.reports:
            assert "\x1b" not in each.longreprtext
            crash = getattr(each.longrepr, "reprcrash", None)
            assert crash is None or str(crash).partition(":")[0]
            assert isinstance(each.head_line, str)
            each.count_towards_summary  # noqa: B018 - a property that a reporter reads


def test_a_deeply_nested_report_is_refused(item: pytest.Item) -> None:
    nested: Any = []
    for _ in range(900):
        nested = [nested]
    seen = observation(phases(report("call", user_properties=[["deep", nested]])))
    assert judge(item, seen).verdict in (Verdict.MISS, Verdict.PASS)


def test_guest_text_is_escaped_wherever_it_goes(item: pytest.Item) -> None:
    evil = "\x1b]0;owned\x07\u202e\x00"
    call = report("call", "failed", evil, sections=[[evil, evil]], user_properties=[[evil, evil]], wasxfail=evil)
    skipped = [report("setup", "skipped", [evil, 1, evil]), report("teardown")]
    for reports in (reports_of(item, observation(phases(call))), reports_of(item, observation(skipped))):
        for each in reports:
            shown = [each.longreprtext, str(each.longrepr), str(each.sections), str(each.user_properties)]
            shown.append(str(getattr(each, "wasxfail", "")))
            assert not set("\x1b\x07\x00\u202e") & set("".join(shown))


def test_a_protocol_error_during_a_test_is_no_verdict_about_the_kernel(item: pytest.Item) -> None:
    seen = Observation([], ProtocolError("gibberish"), SPLAT, (0, WARN), [("evidence", "of it")])
    judgement = judge(item, seen)
    setup, _ = judgement.reports
    assert judgement.verdict == Verdict.MISS
    assert setup.longreprtext == "infrastructure: gibberish"
    assert ("evidence", "of it") in setup.sections


def part(outcome: str, longrepr: Any = None, **more: Any) -> dict[str, Any]:
    """What an agent sends for one subtest."""
    told = report("call", outcome, longrepr) | {"_report_type": "SubTestReport"}
    return told | {"_subtest.context": {"msg": "part", "kwargs": {"number": "1"}}} | more


def test_subtests_are_reports_of_their_own_and_a_failed_one_fails_its_test(item: pytest.Item) -> None:
    sent = [report("setup"), part("passed"), part("failed", "assert 1 == 2"), *PASSED[1:]]
    judgement = judge(item, observation(sent))
    assert judgement.verdict == Verdict.FAIL
    assert [each.outcome for each in judgement.subtests] == ["passed", "failed"]
    assert [each.when for each in judgement.reports] == ["setup", "call", "teardown"]
    assert judgement.reports[1].longreprtext == "contains 1 failed subtest"
    assert judge(item, observation([report("setup"), part("passed"), *PASSED[1:]])).verdict == Verdict.PASS


@pytest.mark.parametrize(
    "damage",
    [
        {"_subtest.context": None},
        {"_subtest.context": {"msg": "part"}},
        {"_subtest.context": {"msg": "part", "kwargs": 7}},
        {"when": "setup"},
    ],
)
def test_what_is_no_subtest_is_a_harness_error(item: pytest.Item, damage: dict[str, Any]) -> None:
    sent = [report("setup"), part("passed", **damage), *PASSED[1:]]
    assert judge(item, observation(sent)).verdict == Verdict.MISS


def test_the_name_of_a_subtest_is_escaped(item: pytest.Item) -> None:
    context = {"msg": "\x1b[2J", "kwargs": {"\x1b": "\x1b"}}
    (subtest,) = judge(
        item, observation([report("setup"), part("passed", **{"_subtest.context": context}), *PASSED[1:]])
    ).subtests
    assert "\x1b" not in f"{subtest.context}"
