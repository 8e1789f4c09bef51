# SPDX-License-Identifier: GPL-2.0
"""docs/findings.md says of a kernel what was measured on it, and says so where nothing was."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.judging.findings import Finding, Range
from tests.findings_page import Measured, load, merged, of_matrix, page, record

FINDING = Finding("a-bug", "It breaks.", "A cause.", "An effect.", "-k a", (Range(("x86_64",), "", ("6.18",)),))


def measured(version: str, arch: str, **outcomes: int) -> Measured:
    return Measured(version, arch, "2026-11-25", {"a-bug": outcomes})


def rows(*seen: Measured) -> list[str]:
    return [line for line in page([FINDING], seen).splitlines() if line.startswith("| ")][1:]


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        ({"xfailed": 6, "skipped": 2}, "**shows** (6 of 6)"),
        ({"xfailed": 1, "passed": 2}, "**shows** (1 of 3)"),
        ({"passed": 3}, "does not show (0 of 3)"),
        ({"skipped": 3}, "cannot tell: its tests skip"),
        ({"xfailed": 1, "failed": 1}, "failed in another way (1 tests)"),
        ({"MISS": 2}, "failed in another way (2 tests)"),
        ({}, "not measured"),
    ],
)
def test_a_cell_says_what_its_tests_said(outcomes: dict[str, int], said: str) -> None:
    assert rows(measured("6.12.118", "x86_64", **outcomes)) == [f"| 6.12.118 | {said} |"]


def test_kernels_stand_in_the_order_of_their_versions_and_a_hole_is_a_hole() -> None:
    seen = [
        measured("6.12.118", "arm64", passed=1),
        measured("6.12.118", "x86_64", xfailed=1),
        measured("6.1.192", "x86_64", passed=1),
    ]
    assert rows(*seen) == [
        "| 6.1.192 | does not show (0 of 1) | not measured |",
        "| 6.12.118 | **shows** (1 of 1) | does not show (0 of 1) |",
    ]


def test_the_command_names_a_kernel_that_was_seen_with_the_finding() -> None:
    seen = [measured("6.1.192", "x86_64", xfailed=1), measured("6.17.13", "arm64", xfailed=1)]
    text = page([FINDING], [*seen, measured("7.3.4", "x86_64", passed=1)])
    assert "pytest --kernel=debian:6.17 -k a" in text


def test_without_measurements_nothing_is_claimed() -> None:
    text = page([FINDING], [])
    assert "Not measured." in text
    assert "| " not in text


def test_what_is_recorded_of_a_matrix_is_read_again(tmp_path: Path) -> None:
    tests = [{"test": "a", "outcome": "xfailed", "finding": "a-bug"}]
    cell = {"version": "6.18.15", "arch": "x86_64", "tests": tests}
    taken = of_matrix({"started": 1795600000, "cells": [cell]})
    record(taken, tmp_path / "measured.json")
    assert load(tmp_path / "measured.json") == taken


def test_a_matrix_of_some_kernels_replaces_their_measurements_and_keeps_the_others() -> None:
    old = [measured("6.12.118", "x86_64", xfailed=1), measured("6.18.15", "x86_64", xfailed=1)]
    new = [measured("7.3.4", "arm64", xfailed=1), measured("6.18.15", "x86_64", passed=1)]
    assert merged(old, new) == [old[0], new[1], new[0]]


def test_a_matrix_of_some_tests_keeps_what_was_measured_of_other_findings() -> None:
    old = Measured("7.3.4", "arm64", "2026-11-25", {"a-bug": {"passed": 1}})
    new = Measured("7.3.4", "arm64", "2026-11-28", {"another-bug": {"xfailed": 2}})
    both = Measured("7.3.4", "arm64", "2026-11-28", {"a-bug": {"passed": 1}, "another-bug": {"xfailed": 2}})
    assert merged([old], [new]) == [both]


def test_a_run_that_could_not_tell_replaces_no_measurement() -> None:
    old = Measured("7.3.4", "x86_64", "2026-11-24", {"a-bug": {"xfailed": 1}, "a-hole": {"skipped": 2}})
    new = Measured("7.3.4", "x86_64", "2026-11-25", {"a-bug": {"skipped": 1}, "a-hole": {"skipped": 1}})
    (only,) = merged([old], [new])
    assert only.outcomes == {"a-bug": {"xfailed": 1}, "a-hole": {"skipped": 2}}


def test_the_measurements_of_a_matrix_are_taken_by_finding_and_outcome() -> None:
    tests = [
        {"test": "a", "outcome": "xfailed", "finding": "a-bug"},
        {"test": "b", "outcome": "xfailed", "finding": "a-bug"},
        {"test": "c", "outcome": "passed", "finding": ""},
    ]
    cells = [
        {"version": "6.12.118", "arch": "x86_64", "tests": tests},
        {"version": "", "arch": "arm64", "tests": []},
    ]
    assert of_matrix({"started": 1790000000.0, "cells": cells}) == [
        Measured("6.12.118", "x86_64", "2026-09-21", {"a-bug": {"xfailed": 2}})
    ]
