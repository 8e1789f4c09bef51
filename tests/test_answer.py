# SPDX-License-Identifier: GPL-2.0
"""The answer is yes only if every walk found every mapping. If nothing was observed, there is no answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from harness.judging.findings import known
from harness.report.answer import PROPERTY, answer, records
from harness.report.results import Facts, Outcome, Result

UNMERGE = {"step": "unmerge", "unmerged": True, "from": 0x1000, "to": 0x2000, "pfn": [0x10, 0x20]}


def walk(probe: str = "move_pages", lost: int = 0, inconclusive: str = "") -> dict[str, Any]:
    told = {"step": "walk", "probe": probe, "places": 3, "found": 3 - lost, "lost": list(range(lost))}
    return told | {"inconclusive": inconclusive, "evidence": "PFN 0x20 is now 0x30"}


MISSING = {"step": "walk", "probe": "damon", "missing": "needs CONFIG_DAMON_PADDR"}


def text(*seen: dict[str, Any], findings: Sequence[Result] = ()) -> str:
    results = [result("k", question=each) for each in seen]
    return "\n".join(answer("6.12 (x86_64, tcg)", [*results, *findings], "k", "pytest --kernel=debian:6.12"))


def result(kernel: str, **recorded: Any) -> Result:
    """What a test that recorded these properties leaves."""
    return Result(Facts(label=kernel, test="a.py::test_a"), Outcome.PASSED, "", list(recorded.items()))


def shown(outcome: Outcome, message: str = "", kernel: str = "k", name: str = "ksm-swapcache-move") -> Result:
    """What a test for a finding leaves."""
    return Result(Facts(label=kernel, test="a.py::test_a", finding=name), outcome, message)


def test_all_walks_that_could_be_forced_found_all() -> None:
    said = text(UNMERGE, walk(), walk("reclaim"), MISSING)
    assert "1. Does a move un-merge KSM pages first?  Yes." in said
    assert "has PFN 0x20 and is a page of its own" in said
    assert "Yes: all 2 kinds of walk that can be forced here found all mappings." in said
    assert "needs CONFIG_DAMON_PADDR" in said
    assert "3 of 3" in said


def test_one_lost_mapping_makes_it_no() -> None:
    said = text(UNMERGE, walk(), walk("reclaim", lost=1))
    assert "NO: 1 of 2 kinds of walk lost a mapping." in said
    assert "2 of 3" in said


def test_pages_that_stayed_merged_are_said_loudly() -> None:
    said = text(UNMERGE | {"unmerged": False, "pfn": [0x10, None]}, walk())
    assert "NO: it stayed merged." in said
    assert "has PFN none and is still KSM" in said


def test_what_could_not_be_told_is_no_yes() -> None:
    said = text(UNMERGE, walk(inconclusive="the page was pinned"))
    assert "No answer: no walk could be forced." in said
    assert "the page was pinned" in said
    assert "Yes: all" not in said


def test_silence_is_no_answer() -> None:
    said = text()
    assert "No answer: the test did not get that far." in said
    assert "No answer: no walk could be forced." in said
    assert "Yes" not in said


def test_the_command_that_shows_it_again_is_the_last_line() -> None:
    assert text(UNMERGE).splitlines()[-2:] == ["See it again:", "  pytest --kernel=debian:6.12"]


def test_long_evidence_is_wrapped_below_itself() -> None:
    said = text(walk() | {"evidence": "word " * 60})
    assert all(len(line) <= 118 for line in said.splitlines())


@pytest.mark.parametrize(
    ("outcomes", "line", "evidence"),
    [
        ([Outcome.XFAILED, Outcome.PASSED, Outcome.SKIPPED], "YES: 1 of 2 tests show it.", "because xfailed"),
        ([Outcome.XFAILED, Outcome.FAILED], "YES: 1 of 2 tests show it.", "because xfailed"),
        ([Outcome.PASSED, Outcome.FAILED], "Cannot tell: a test failed in another way.", "because failed"),
        ([Outcome.MISS], "Cannot tell: a test failed in another way.", "because MISS"),
        ([Outcome.PASSED, Outcome.PASSED, Outcome.SKIPPED], "No: 2 tests ran, and none shows it.", ""),
        ([Outcome.PASSED], "No: its test does not show it.", ""),
        ([Outcome.SKIPPED, Outcome.SKIPPED], "Cannot tell: no test for it can run here.", "because skipped"),
    ],
)
def test_each_finding_is_answered_by_its_own_tests(outcomes: list[Outcome], line: str, evidence: str) -> None:
    said = text(findings=[shown(each, f"because {each}") for each in outcomes])
    (row,) = [each for each in said.splitlines() if each.startswith("   ksm-swapcache-move ")]
    assert row.removeprefix("   ksm-swapcache-move").strip() == line
    assert [each.strip() for each in said.splitlines() if "because" in each] == ([evidence] if evidence else [])


def test_a_finding_is_not_answered_by_another_kernel_or_for_another_finding() -> None:
    said = text(findings=[shown(Outcome.XFAILED, kernel="other"), shown(Outcome.PASSED, name="ksm-poison-bystander")])
    assert "YES" not in said
    assert said.count("Cannot tell: no test for it can run here.") == len(known()) - 1


def test_without_a_test_for_any_finding_there_is_no_answer_about_them() -> None:
    assert "3. Which of the known bugs does this kernel have?  No answer" in text(UNMERGE, walk())


def test_records_are_those_of_one_kernel() -> None:
    seen = [
        result("debian:6.12-x86_64", **{PROPERTY: walk()}),
        result("debian:6.12-x86_64", **{PROPERTY: MISSING}),
        result("debian:7.3-x86_64", **{PROPERTY: walk("other")}),
        result("debian:6.12-x86_64", other="not ours"),
        result("debian:6.12-x86_64", **{PROPERTY: "not a record"}),
    ]
    assert records(seen, "debian:6.12-x86_64") == [walk(), MISSING]


def test_a_kernel_whose_name_another_begins_with_keeps_its_own_records() -> None:
    seen = [
        result("debian:6.12", **{PROPERTY: walk("mine")}),
        result("debian:6.12-2", **{PROPERTY: walk("other")}),
    ]
    assert [each["probe"] for each in records(seen, "debian:6.12")] == ["mine"]


@pytest.mark.parametrize(
    "junk", [{}, {"step": "walk"}, {"step": "walk", "probe": 7, "found": "x"}, {"step": "unmerge"}, {"step": ["walk"]}]
)
def test_what_is_no_record_is_left_out(junk: dict[str, Any]) -> None:
    """They were written by the guest, like everything in a report."""
    assert records([result("k", **{PROPERTY: junk})], "k") == []
