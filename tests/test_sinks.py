# SPDX-License-Identifier: GPL-2.0
"""What a run writes while the disk fails, and at standard output. No test here boots."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import xml.etree.ElementTree as ET

import pytest

from harness.report import record
from tests.lab import Lab
from tests.stage import CHECKS, STAGE


@pytest.fixture
def staged(lab: Lab) -> Lab:
    """A lab whose checks run without guests."""
    lab.write("test_it.py", CHECKS)
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))
    return lab


@pytest.mark.parametrize("option", ["--results", "--ktap", "--html"])
@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_a_full_disk_costs_one_file_and_the_run_fails_for_it(staged: Lab, option: str, workers: str) -> None:
    outcome = staged.run("-p", "stage", "-k", "test_whole or test_hole", f"{option}=/dev/full", "-n", workers)
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    assert "/dev" in outcome.said("the rest of it is missing")
    assert "INTERNALERROR" not in outcome.output
    assert "Exception ignored" not in outcome.output


def test_a_full_disk_fails_a_run_whose_tests_passed_and_the_other_files_are_whole(staged: Lab) -> None:
    outcome = staged.run("-p", "stage", "-k", "test_whole", "--results=/dev/full", "--ktap=results.ktap")
    assert "1 passed" in outcome.output
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    assert "ok 1 test_whole" in (staged.root / "results.ktap").read_text()


def test_ktap_at_standard_output_begins_a_line(staged: Lab) -> None:
    lines = staged.run("-p", "stage", "-k", "test_whole", "--ktap=-", "-q").output.splitlines()
    assert "KTAP version 1" in lines
    assert any(line.strip() == "ok 1 test_whole" for line in lines)


def test_a_run_that_was_interrupted_says_so_in_what_it_writes(staged: Lab) -> None:
    staged.write("test_stop.py", "def test_a():\n    pass\n\ndef test_stops():\n    pass\n")
    (staged.root / "stop.py").write_text(
        "def pytest_runtest_logfinish(nodeid):\n    if 'test_a' in nodeid:\n        raise KeyboardInterrupt\n"
    )
    outcome = staged.run("-p", "stage", "-p", "stop", "--results=results.jsonl", "--ktap=results.ktap")
    assert outcome.status == pytest.ExitCode.INTERRUPTED
    assert record.read(staged.root / "results.jsonl").status == pytest.ExitCode.INTERRUPTED
    assert "not ok 2 the record is complete # ERROR a run ended early" in (staged.root / "results.ktap").read_text()


def test_what_a_test_of_the_host_captures_stays_out_of_the_junit_file(staged: Lab) -> None:
    (staged.root / "test_host.py").write_text("def test_host():\n    print('\\x1b[31m')\n    assert 0\n")
    outcome = staged.run("-p", "stage", ".", "-k", "test_host or test_hole")
    (staged.root / "test_host.py").unlink()
    by_name = {
        each.get("name", "").partition("[")[0]: each for each in ET.parse(staged.root / "junit.xml").iter("testcase")
    }
    assert by_name["test_host"].find("system-out") is None
    assert outcome["test_host"].outcome == "failure"


def test_a_run_without_pytests_junit_plugin_runs(staged: Lab) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:junitxml",
        "-p",
        "stage",
        "--kernel=debian:6.12",
        "-k",
        "test_whole",
    ]
    done = subprocess.run(command, cwd=staged.root, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.OK, done.stdout


def test_no_file_is_written_twice(staged: Lab) -> None:
    outcome = staged.run("-p", "stage", "--results=results.jsonl", "--ktap=./results.jsonl")
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    outcome.said("name the same file")


def test_nothing_is_written_where_nothing_runs(staged: Lab) -> None:
    (staged.root / "results.ktap").unlink(missing_ok=True)
    assert staged.run("--collect-only", "-q", "--ktap=results.ktap").status == pytest.ExitCode.OK
    assert not (staged.root / "results.ktap").exists()
