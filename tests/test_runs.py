# SPDX-License-Identifier: GPL-2.0
"""Several records are put together by kernel, and nothing gets lost without a word."""

from __future__ import annotations

from dataclasses import replace

from harness.report import runs
from tests.recorded import HEADER, NEW, OLD, line, recording


def names(run: runs.Run) -> list[tuple[str, list[str]]]:
    return [(each.label, [item.test.partition("::")[2] for item in each.items]) for each in run.kernels]


def test_the_tests_of_one_kernel_may_be_in_several_records() -> None:
    run = runs.merge([recording(line("test_b")), recording(line("test_a"))])
    assert names(run) == [(OLD.label, ["test_a", "test_b"])]
    assert (run.missing, run.notes) == ([], [])


def test_tests_are_sorted_so_that_their_order_in_the_run_does_not_matter() -> None:
    one, other = [line("test_b"), line("test_a")], [line("test_a"), line("test_b")]
    assert runs.merge([recording(*one)]) == runs.merge([recording(*other)])


def test_of_a_test_in_two_records_the_last_counts_and_that_is_said() -> None:
    run = runs.merge([recording(line("test_a", "failed")), recording(line("test_a"))])
    assert [item.outcome for item in run.items] == ["passed"]
    assert run.notes == ["tests that are in several records: 1; the last of each counts"]


def test_kernels_stay_in_the_order_in_which_they_were_given() -> None:
    run = runs.merge([recording(line("test_a", kernel=NEW), kernels=(NEW,)), recording(line("test_a"))])
    assert [each.label for each in run.kernels] == [NEW.label, OLD.label]


def test_another_kernel_of_the_same_label_gets_a_label_of_its_own() -> None:
    rebuilt = replace(OLD, release="6.12.2-cloud-amd64")
    third = replace(OLD, release="6.12.3-cloud-amd64")
    run = runs.merge([recording(line("test_a"), kernels=(each,)) for each in (OLD, rebuilt, third, rebuilt)])
    assert names(run) == [(OLD.label, ["test_a"]), (f"{OLD.label}-2", ["test_a"]), (f"{OLD.label}-3", ["test_a"])]
    assert [item.label for item in run.items] == [each.label for each in run.kernels]


def test_a_test_of_a_kernel_that_the_first_line_does_not_name_is_kept() -> None:
    stray = replace(line("test_a"), label="elsewhere")
    assert ("elsewhere", ["test_a"]) in names(runs.merge([recording(stray)]))


def test_a_run_that_did_not_end_is_told() -> None:
    assert runs.merge([recording(status=None)]).missing
    (why,) = runs.merge([recording(line("test_a"), status=2)]).missing
    assert why == "a run ended early, with status 2 of pytest after 1 tests"
    assert not runs.merge([recording(status=status) for status in (0, 1, 5)]).missing


def test_the_first_record_says_when_the_run_began() -> None:
    later = replace(recording(), header=replace(HEADER, started=HEADER.started + 60))
    assert runs.merge([later, recording()]).started == HEADER.started
