# SPDX-License-Identifier: GPL-2.0
"""``--fail-on=regressed``, and the comparison in the record of results. No test here boots."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable

import pytest

from harness.arch import ARM64, X86_64
from harness.commands import cli
from harness.report import compare, runs
from tests.lab import Lab, Outcome
from tests.recorded import NEW, OLD, line, recording, run, text
from tests.stage import CHECKS, STAGE

BOTH = (OLD, NEW)

Run = Callable[..., Outcome]


def objections(*items: tuple[str, str, str]) -> list[str]:
    """Of tests by name, outcome on the old kernel, and outcome on the new one."""
    lines = [line(name, old) for name, old, _ in items] + [line(name, new, kernel=NEW) for name, _, new in items]
    return compare.objections(run(*lines, kernels=BOTH).compared)


# --- what stands against it ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", ["failed", "error", "xfailed", "skipped", "lacking"])
def test_what_regressed_is_named(new: str) -> None:
    found = objections(("test_a", "passed", "passed"), ("test_b", "passed", new), ("test_c", "passed", new))
    assert found == [f"regressed on {NEW.label}: guest_tests/test_a.py::test_b and 1 more"]


def test_failures_that_the_baseline_has_too_do_not_count() -> None:
    assert objections(("test_a", "failed", "failed"), ("test_b", "xfailed", "xfailed")) == []


def test_what_is_fixed_or_new_does_not_count() -> None:
    assert objections(("test_a", "failed", "passed"), ("test_b", "skipped", "passed")) == []


@pytest.mark.parametrize(("old", "new"), [("passed", "MISS"), ("MISS", "passed")])
def test_what_the_harness_could_not_run_is_no_proof(old: str, new: str) -> None:
    assert objections(("test_a", old, new)) == [f"could not be compared on {NEW.label}: guest_tests/test_a.py::test_a"]


def test_a_run_without_a_pair_proves_nothing() -> None:
    (why,) = compare.objections(run(line("test_a")).compared)
    assert why.startswith("nothing could be compared")


def test_a_kernel_is_compared_with_the_first_of_its_architecture() -> None:
    kernels = {"a": X86_64, "b": ARM64, "c": None, "d": X86_64, "e": ARM64}
    assert compare.baselines(kernels) == {"d": "a", "e": "b"}


# --- in the record ---------------------------------------------------------------------------------------------------


def test_changes_name_kernel_test_and_both_outcomes() -> None:
    items = [line("test_a", "failed"), line("test_a", kernel=NEW), line("test_b"), line("test_b", kernel=NEW)]
    assert run(*items, kernels=BOTH).changes == [
        {
            "label": NEW.label,
            "baseline": OLD.label,
            "test": "guest_tests/test_a.py::test_a",
            "change": "fixed",
            "before": "failed",
            "after": "passed",
        }
    ]


def test_records_of_two_kernels_are_compared_afterwards() -> None:
    old, new = recording(line("test_a")), recording(line("test_a", "failed", kernel=NEW), kernels=(NEW,))
    assert [each["change"] for each in runs.merge([old, new]).changes] == ["regressed"]
    assert [each["change"] for each in runs.merge([new, old]).changes] == ["fixed"]


@pytest.mark.parametrize(("new", "status"), [("passed", 0), ("failed", 1)])
def test_a_report_of_records_has_the_gate(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str], new: str, status: int
) -> None:
    place = tmp_path_factory.mktemp("records")
    (place / "old.jsonl").write_text(text(line("test_a")))
    (place / "new.jsonl").write_text(text(line("test_a", new, kernel=NEW), kernels=(NEW,)))
    assert cli.main(["report", str(place / "old.jsonl"), str(place / "new.jsonl"), "--fail-on=regressed"]) == status
    assert ("regressed on" in capsys.readouterr().err) is bool(status)


def test_a_record_that_was_cut_short_does_not_pass_the_gate(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path_factory.mktemp("records") / "cut.jsonl"
    path.write_text(text(line("test_a"), line("test_a", kernel=NEW), kernels=BOTH, status=None))
    assert cli.main(["report", str(path), "--fail-on=regressed"]) == 1
    assert "cut short" in capsys.readouterr().err


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def staged(lab: Lab) -> Run:
    """Runs the checks of the comparison's tests on two kernels, without guests."""
    lab.write("test_it.py", CHECKS)
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))

    def go(*args: str, old: str = "debian:6.12", new: str = "debian:7.3") -> Outcome:
        return lab.run("-p", "stage", f"--kernel={old}", *args, "--fail-on=regressed", kernel=new)

    return go


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_a_regression_fails_a_run_that_pytest_would_pass(staged: Run, workers: str) -> None:
    outcome = staged("-k", "test_idle", "-n", workers)
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    outcome.said("harness: regressed on debian:7.3-x86_64: checks/test_it.py::test_idle")


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_a_failure_of_the_baseline_does_not_fail_the_run(staged: Run, workers: str) -> None:
    outcome = staged("-k", "test_hole or test_whole", "-n", workers)
    assert "1 failed" in outcome.output
    assert outcome.status == pytest.ExitCode.OK
    outcome.said("nothing has regressed: the exit status is 0")


def test_a_test_that_could_not_be_run_fails_the_run(staged: Run) -> None:
    outcome = staged("-k", "test_no_guest")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    outcome.said("harness: could not be compared on debian:7.3-x86_64: checks/test_it.py::test_no_guest")


def test_a_failure_of_the_host_fails_the_run(staged: Run, lab: Lab) -> None:
    (lab.root / "test_host.py").write_text("def test_host():\n    assert 0\n")
    outcome = staged("test_host.py", "checks", "-k", "test_whole or test_host")
    (lab.root / "test_host.py").unlink()
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    outcome.said("harness: something failed that is no guest test")


def test_a_run_without_tests_keeps_its_status(staged: Run) -> None:
    assert staged("-k", "no_such").status == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize("new", ["debian:6.12", "ssh://root@board"])
def test_kernels_that_cannot_be_compared_are_a_usage_error(lab: Lab, new: str) -> None:
    more = () if new == "debian:6.12" else ("--kernel=debian:6.12",)
    outcome = lab.run("--fail-on=regressed", *more, kernel=new)
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    outcome.said("give --kernel twice, the baseline first")


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_the_record_of_a_run_ends_with_its_changes(staged: Run, lab: Lab, workers: str) -> None:
    outcome = staged("-n", workers, "--results=results.jsonl")
    last = json.loads((lab.root / "results.jsonl").read_text().splitlines()[-1])
    assert last["exit_status"] == outcome.status
    assert {each["test"].partition("::")[2]: each["change"] for each in last["changes"]} == {
        "test_hole[9]": "fixed",
        "test_idle": "regressed",
        "test_walk": "regressed",
        "test_relocates": "new ability",
        "test_no_guest": "not compared",
    }
