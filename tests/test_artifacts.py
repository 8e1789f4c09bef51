# SPDX-License-Identifier: GPL-2.0
"""The evidence of failures as files with stable names, in one directory for each run. No test here boots."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from harness import paths
from harness.commands import cli
from harness.errors import HostError, UsageError
from harness.report import artifacts
from harness.report.artifacts import Artifacts
from tests.lab import Lab
from tests.recorded import EVIDENCE, MIXED, OLD, hostile, line, text
from tests.stage import CHECKS, STAGE

FAILED = line("test_fails[1]", "failed", "lost a page", sections=EVIDENCE)


def files(directory: Path) -> list[str]:
    return sorted(str(each.relative_to(directory)) for each in directory.rglob("*") if each.is_file())


def kept() -> list[Path]:
    """The directories of runs below this user's state directory, which each test has for itself."""
    directory = paths.state_dir() / "artifacts"
    return sorted(directory.iterdir()) if directory.exists() else []


# --- the files -------------------------------------------------------------------------------------------------------


def test_each_kind_of_evidence_has_its_file(tmp_path: Path) -> None:
    memory = [("memory under test before the first move", "carve-out 0x1000"), ("moves", "mremap() = 0x2000")]
    Artifacts(tmp_path / "run").add(replace(FAILED, sections=(*EVIDENCE, *memory, ("Captured stdout call", "hello"))))
    place = tmp_path / "run" / "debian-6.12-x86_64" / "test_a" / "test_fails-1"
    assert files(tmp_path / "run") == [
        str(place.relative_to(tmp_path / "run") / name)
        for name in (
            *("again.txt", "console.txt", "failure.txt", "machine.txt", "memory.txt", "output.txt", "result.json"),
        )
    ]
    assert (place / "console.txt").read_text() == "[    1.5] BUG: Bad page state in process python3  pfn:12345\n"
    assert (place / "again.txt").read_text() == "pytest --kernel=debian:6.12 guest_tests/test_a.py\n"
    said = (place / "memory.txt").read_text()
    assert said.index("before the first move:\n\ncarve-out") < said.index("moves:\n\nmremap()")
    assert json.loads((place / "result.json").read_text())["message"] == "lost a page"


def test_only_failures_are_written(tmp_path: Path) -> None:
    run = Artifacts(tmp_path / "run")
    for item in MIXED:
        run.add(item)
    assert {Path(each).parts[2] for each in files(tmp_path / "run")} == {
        *("test_fails-1", "test_fixed", "test_misses", "test_breaks"),
    }


def test_names_are_the_same_in_each_run_and_differ_between_tests() -> None:
    tests = (
        "test_a[x y]",
        "test_a[x_y]",
        "test_a[x/y]",
        "test_a[..]",
        "test_a[[vdso]]",
        "T::test_a",
        f"test_{'a' * 300}",
    )
    places = [artifacts.place(line(f"guest_tests/test_a.py::{test}")) for test in tests]
    assert len(set(places)) == len(tests)
    assert places == [artifacts.place(line(f"guest_tests/test_a.py::{test}")) for test in tests]
    assert places[1].name == "test_a-x_y"


@pytest.mark.parametrize("test", ["../../etc/passwd", "a/../../b.py::..", "::", "/etc::/etc", "\x00::\n", "-rf::.git"])
@pytest.mark.parametrize("label", ["..", "/", "", "-rf"])
def test_no_name_leads_out_of_the_directory(test: str, label: str) -> None:
    parts = artifacts.place(replace(FAILED, test=test, label=label)).parts
    assert len(parts) == 3
    for each in parts:
        assert each not in ("", ".", "..")
        assert "/" not in each
        assert not each.startswith((".", "/"))


def test_a_hostile_guest_writes_text_without_control_characters(tmp_path: Path) -> None:
    run = Artifacts(tmp_path / "run")
    for item in hostile():
        run.add(item)
    assert files(tmp_path / "run")
    for name in files(tmp_path / "run"):
        assert "\x1b" not in (tmp_path / "run" / name).read_text()


def test_the_picture_of_the_audit_is_copied(tmp_path: Path) -> None:
    audits = paths.state_dir() / "audits"
    audits.mkdir(parents=True)
    (audits / "a.html").write_text("drawn")
    (tmp_path / "secret.html").write_text("secret")
    for number, path in enumerate((audits / "a.html", tmp_path / "secret.html", audits / "../../secret.html")):
        run = Artifacts(tmp_path / str(number))
        run.add(replace(FAILED, sections=(("audit of memory", f"errors\ndrawn in {path}"),)))
    copied = {path.parent.parent.parent.parent.name: path.read_text() for path in tmp_path.glob("?/*/*/*/memory.html")}
    assert copied == {"0": "drawn"}, "only pictures of the audit are copied, wherever a guest says they are"


# --- the directory ---------------------------------------------------------------------------------------------------


def test_a_run_without_failures_leaves_nothing() -> None:
    run = Artifacts()
    run.add(line("test_passes"))
    run.close()
    assert run.path is None
    assert kept() == []


def failing_runs(monkeypatch: pytest.MonkeyPatch, seconds: range) -> Iterator[Artifacts]:
    """Runs that begin one after the other, a second apart, and have a failure."""
    for number in seconds:
        monkeypatch.setattr(artifacts.time, "strftime", lambda _, number=number: f"20260101-{number:06}")
        run = Artifacts()
        run.add(FAILED)
        yield run


def numbers() -> list[int]:
    return [int(each.name.split("-")[1]) for each in kept()]


def test_the_last_ten_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for run in failing_runs(monkeypatch, range(13)):
        run.close()
    assert numbers() == list(range(3, 13))


def test_the_directory_of_a_run_that_goes_on_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    first, *others = failing_runs(monkeypatch, range(13))
    assert numbers() == list(range(13))
    first.close()
    for each in others[:2]:
        each.close()
    for run in failing_runs(monkeypatch, range(13, 14)):
        run.close()
    assert numbers() == list(range(3, 14)), "only those that are over are removed, and one too many is left"


def test_a_directory_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(UsageError, match="is not empty: give --artifacts a new directory"):
        Artifacts(tmp_path / "run")
    with pytest.raises(UsageError, match="Not a directory"):
        Artifacts(tmp_path / "run" / "mine" / "below")


def test_a_disk_that_fails_is_one_line(tmp_path: Path) -> None:
    run = Artifacts(tmp_path / "run")
    (tmp_path / "run" / "debian-6.12-x86_64").write_text("in the way")
    with pytest.raises(HostError, match=r"cannot write the artifacts of guest_tests/test_a\.py::test_fails"):
        run.add(FAILED)


def test_a_report_writes_them_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(text(*MIXED))
    command = ["report", str(tmp_path / "results.jsonl"), f"--artifacts={tmp_path / 'run'}"]
    assert cli.main(command) == 0
    assert (tmp_path / "run" / "debian-6.12-x86_64" / "test_a" / "test_fails-1" / "console.txt").exists()
    assert cli.main(command) == 2, "the directory is not empty any more"


# --- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def staged(lab: Lab) -> Lab:
    lab.write("test_it.py", CHECKS)
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))
    return lab


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_a_run_with_failures_says_where_their_evidence_is(staged: Lab, workers: str) -> None:
    outcome = staged.run("-p", "stage", "-n", workers)
    (directory,) = kept()
    assert str(directory) in outcome.said("harness: the evidence of the failures is in")
    assert {Path(each).parts[2] for each in files(directory)} == {"test_hole-9"}
    assert "old" in (directory / OLD.label.replace(":", "-") / "test_it" / "test_hole-9" / "failure.txt").read_text()


def test_a_run_without_failures_says_nothing(staged: Lab) -> None:
    outcome = staged.run("-p", "stage", "-k", "test_whole")
    assert "evidence" not in outcome.output
    assert kept() == []


def test_a_directory_that_cannot_be_used_is_a_usage_error(staged: Lab) -> None:
    old = staged.root / "old.jsonl"
    old.write_text("results of an earlier run")
    outcome = staged.run("-p", "stage", "--results=old.jsonl", "--artifacts=checks")
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    outcome.said("checks is not empty: give --artifacts a new directory")
    assert "ResourceWarning" not in outcome.output
    assert old.read_text() == "results of an earlier run", "a run that was refused has replaced a file"
