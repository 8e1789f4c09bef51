# SPDX-License-Identifier: GPL-2.0
"""What the soak test runs, and what it calls a surprise. Nothing is run here."""

from __future__ import annotations

from pathlib import Path

from harness.report import record
from harness.report.record import Item
from tests.soak import Suite, suites, surprises


def test_each_kernel_and_architecture_runs_in_each_round_in_an_order_of_its_own() -> None:
    planned = list(suites(2, 100))
    assert [each.seed for each in planned] == list(range(100, 108))
    assert {(each.kernel, each.arch) for each in planned[:4]} == {(each.kernel, each.arch) for each in planned[4:]}
    assert "--random-order-seed=107" in planned[-1].command(Path("a"), [])


def test_failures_and_runs_that_were_cut_short_are_surprises(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert surprises(path), "there is no record"
    sound = Item(label="k", test="a.py::test_a", outcome="passed", verdict="PASS", failed=False)
    broken = Item(label="k", test="a.py::test_b", outcome="failed", verdict="FAIL", failed=True, message="lost")
    header = record.header_line(record.header(["pytest"], 0.0, []))
    path.write_text(header + record.item_line(sound) + record.end_line(0))
    assert surprises(path) == []
    path.write_text(header + record.item_line(sound) + record.item_line(broken) + record.end_line(1))
    assert surprises(path) == ["a.py::test_b: failed: lost"]
    path.write_text(header + record.item_line(sound))
    assert surprises(path) == ["the run was cut short"]


def test_a_suite_is_told_so_that_it_can_be_run_again() -> None:
    assert str(Suite("debian:6.12", "arm64", 7)) == "debian:6.12 arm64, seed 7"
