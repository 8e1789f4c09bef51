# SPDX-License-Identifier: GPL-2.0
"""The answer says yes only where every walk found every mapping, and no answer where nothing was seen."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from harness.report import compare
from harness.report.answer import PROPERTY, answer, records

UNMERGE = {"step": "unmerge", "unmerged": True, "from": 0x1000, "to": 0x2000, "pfn": [0x10, 0x20]}


def walk(probe: str = "move_pages", lost: int = 0, inconclusive: str = "") -> dict[str, Any]:
    told = {"step": "walk", "probe": probe, "places": 3, "found": 3 - lost, "lost": list(range(lost))}
    return told | {"inconclusive": inconclusive, "evidence": "PFN 0x20 is now 0x30"}


MISSING = {"step": "walk", "probe": "damon", "missing": "needs CONFIG_DAMON_PADDR"}


def text(*seen: dict[str, Any]) -> str:
    return "\n".join(answer("6.12 (x86_64, tcg)", seen, "pytest --kernel=debian:6.12"))


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


def report(
    kernel: str, when: Literal["setup", "call", "teardown"], outcome: Literal["passed", "skipped"], **properties: Any
) -> pytest.TestReport:
    properties[compare.PROPERTY] = kernel
    return pytest.TestReport(
        f"test_a[{kernel}]", ("a.py", 1, "a"), {}, outcome, None, when, user_properties=properties.items()
    )


def test_records_are_those_of_one_kernel_and_each_is_taken_once() -> None:
    seen = [
        report("debian:6.12-x86_64", "call", "passed", **{PROPERTY: walk()}),
        report("debian:6.12-x86_64", "teardown", "passed", **{PROPERTY: walk()}),
        report("debian:6.12-x86_64", "setup", "skipped", **{PROPERTY: MISSING}),
        report("debian:7.3-x86_64", "call", "passed", **{PROPERTY: walk("other")}),
        report("debian:6.12-x86_64", "call", "passed", other="not ours"),
        report("debian:6.12-x86_64", "call", "passed", **{PROPERTY: "not a record"}),
    ]
    assert records(seen, "debian:6.12-x86_64") == [walk(), MISSING]


def test_a_kernel_whose_name_another_begins_with_keeps_its_own_records() -> None:
    seen = [
        report("debian:6.12", "call", "passed", **{PROPERTY: walk("mine")}),
        report("debian:6.12-2", "call", "passed", **{PROPERTY: walk("other")}),
    ]
    assert [each["probe"] for each in records(seen, "debian:6.12")] == ["mine"]


@pytest.mark.parametrize(
    "junk", [{}, {"step": "walk"}, {"step": "walk", "probe": 7, "found": "x"}, {"step": "unmerge"}, {"step": ["walk"]}]
)
def test_what_is_no_record_is_left_out(junk: dict[str, Any]) -> None:
    """They were written by the guest, like everything in a report."""
    assert records([report("k", "call", "passed", **{PROPERTY: junk})], "k") == []
