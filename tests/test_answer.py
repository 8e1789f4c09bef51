# SPDX-License-Identifier: GPL-2.0
"""The answer is yes only if every walk found every mapping. If nothing was observed, there is no answer."""

from __future__ import annotations

from typing import Any

import pytest

from harness.report.answer import PROPERTY, answer, records
from harness.report.results import Facts, Outcome, Result

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


def result(kernel: str, **recorded: Any) -> Result:
    """What a test that recorded these properties leaves."""
    return Result(Facts(label=kernel, test="a.py::test_a"), Outcome.PASSED, "", list(recorded.items()))


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
