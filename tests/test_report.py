# SPDX-License-Identifier: GPL-2.0
"""``harness report``: records become files, and whatever is wrong with them is one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.commands import cli
from harness.report import record
from tests.recorded import MIXED, NEW, OLD, line, text

Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Report:
    """Runs the command in a directory with a record; gives its status and what it wrote to both streams."""
    monkeypatch.chdir(tmp_path)
    Path("results.jsonl").write_text(text(*MIXED))

    def run(*args: str) -> tuple[int, str, str]:
        status = cli.main(["report", *args])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def refused(report: Report, *args: str) -> str:
    """The one line that says why a command cannot be done."""
    status, out, err = report(*args)
    assert status == 2
    assert out == ""
    assert err.startswith("harness: ")
    assert err.count("\n") == 1
    return err


def test_each_format_is_written_and_failures_do_not_change_the_status(report: Report) -> None:
    assert report("results.jsonl", "--junit=out.xml", "--ktap=out.ktap", "--html=out.html") == (0, "", "")
    assert Path("out.xml").read_text().startswith("<?xml")
    assert Path("out.ktap").read_text().startswith("KTAP version 1\n")
    assert Path("out.html").read_text().startswith("<!DOCTYPE html>\n")


def test_one_format_can_go_to_standard_output(report: Report) -> None:
    status, out, err = report("results.jsonl", "--ktap=-")
    assert (status, err) == (0, "")
    assert out.startswith("KTAP version 1\n")


def test_several_records_are_put_together(report: Report) -> None:
    Path("more.jsonl").write_text(text(line("test_more", kernel=NEW), kernels=(NEW,)))
    _, out, _ = report("results.jsonl", "more.jsonl", "--ktap=-")
    assert "ok 1 test_more" in out
    assert f"ok 2 {NEW.label}" in out


def test_a_record_that_was_cut_is_reported_as_far_as_it_goes_and_that_is_said(report: Report) -> None:
    Path("cut.jsonl").write_text(text(line("test_one"), line("test_two"), status=None)[:-20])
    status, out, err = report("cut.jsonl", "--ktap=-")
    assert status == 0
    assert "ok 1 test_one" in out
    assert "test_two" not in out
    assert "the last line of cut.jsonl is incomplete" in err
    assert "cut short after 1 tests" in err


def test_a_command_without_a_format_says_which_there_are(report: Report) -> None:
    assert "--ktap=FILE" in refused(report, "results.jsonl")


@pytest.mark.parametrize("option", ["--html", "--junit", "--ktap"])
@pytest.mark.parametrize("where", ["missing/out", ".", "/proc/version/out"])
def test_a_file_that_cannot_be_written_is_named_before_anything_is_read(
    report: Report, option: str, where: str
) -> None:
    assert f"cannot write {where}" in refused(report, "gone.jsonl", f"{option}={where}")


def test_no_file_is_written_twice_and_no_record_is_overwritten(report: Report) -> None:
    before = Path("results.jsonl").read_text()
    assert "name the same file" in refused(report, "results.jsonl", "--junit=out", "--ktap=./out")
    assert "name the same file" in refused(report, "results.jsonl", "--ktap=results.jsonl")
    assert "standard output" in refused(report, "results.jsonl", "--ktap=-", "--junit=-")
    assert Path("results.jsonl").read_text() == before


def test_what_is_no_record_is_refused_and_an_old_file_is_kept(report: Report) -> None:
    Path("out.ktap").write_text("old")
    Path("foreign.jsonl").write_text("hello\n")
    future = json.loads(text().splitlines()[0]) | {"version": 99}
    Path("future.jsonl").write_text(json.dumps(future) + "\n")
    lines = text(line("test_one")).splitlines(keepends=True)
    Path("damaged.jsonl").write_text("".join([lines[0], '{"test": 1}\n', *lines[1:]]))
    for name, why in (
        ("missing.jsonl", "No such file"),
        ("foreign.jsonl", "is no record of results"),
        ("future.jsonl", "has version 99"),
        ("damaged.jsonl", "is damaged in line 2"),
    ):
        assert why in refused(report, "results.jsonl", name, "--ktap=out.ktap")
    assert Path("out.ktap").read_text() == "old"


def test_a_line_of_a_hundred_megabytes_is_refused(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "LINE_LIMIT", 1 << 20)
    Path("long.jsonl").write_text(text(line("test_one", "failed", "x" * (1 << 21))))
    assert "is damaged in line 2: it is longer than 1 Mi characters" in refused(report, "long.jsonl", "--ktap=-")


def test_a_record_without_tests_becomes_every_format(report: Report) -> None:
    Path("empty.jsonl").write_text(text(status=5))
    status, _, err = report("empty.jsonl", "--html=a.html", "--junit=a.xml", "--ktap=a.ktap", "--kcidb=a.json")
    assert (status, err) == (0, "")
    assert Path("a.ktap").read_text().endswith(f"ok 1 {OLD.label} # SKIP no test of it ran\n")


def test_files_are_utf_8_and_standard_output_is_what_the_terminal_takes(report: Report) -> None:
    Path("more.jsonl").write_text(text(line("test_a", "failed", "a page … was lost")))
    command = [sys.executable, "-m", "harness.commands.cli", "report", "more.jsonl", "--ktap=-", "--html=a.html"]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, check=True)
    assert b"a page \\u2026 was lost" in done.stdout
    assert "a page … was lost" in Path("a.html").read_bytes().decode()
