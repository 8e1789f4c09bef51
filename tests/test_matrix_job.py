# SPDX-License-Identifier: GPL-2.0
"""A job is one child process with a deadline, and it is ended with all that it started. Real processes, no guests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.matrix import job
from harness.matrix.executor import LocalExecutor, Tally
from harness.matrix.job import Ended, Job
from tests.lab import wait_until
from tests.matrix_runs import line, recorded, script


def run(task: Job) -> Ended:
    return job.run(task, lambda: False, lambda _: None)


def writes(text: str, status: int = 0) -> str:
    """A program that leaves a record."""
    return f"open(RECORD, 'w').write({text!r})\nprint('the end')\nsys.exit({status})"


def test_a_job_brings_its_record_its_output_and_its_status(tmp_path: Path) -> None:
    watched: list[Path] = []
    task = script(tmp_path / "a.py", writes(recorded(line("test_a", "failed")), 1))
    ended = job.run(task, lambda: False, watched.append)
    assert (ended["name"], ended["status"], ended["trouble"], ended["output"]) == ("a", 1, "", "the end")
    seen = job.recording(ended)
    assert seen is not None
    assert [item.outcome for item in seen.items] == ["failed"]
    assert not watched[0].parent.exists(), "the directory of the job stays behind"


@pytest.mark.parametrize(
    ("program", "trouble"),
    [
        ("print('no such kernel')\nsys.exit(4)", "pytest ended with status 4: no such kernel"),
        ("sys.exit(5)", "pytest ended with status 5"),
        ("pass", "it left no record of its results"),
        ("open(RECORD, 'w').write('something else\\n')", "is no record of results"),
        (writes(recorded(line("test_a")).rpartition('{"exit')[0]), "its record of results is not complete: the end"),
        ("import os\nos.kill(os.getpid(), 9)", "pytest ended with status -9"),
    ],
    ids=["usage", "nothing selected", "no record", "foreign", "cut", "killed"],
)
def test_a_job_without_complete_results_says_why(tmp_path: Path, program: str, trouble: str) -> None:
    ended = run(script(tmp_path / "a.py", program))
    assert trouble in ended["trouble"]
    assert job.unsettled(ended) == ended["trouble"]
    assert not ended["late"]


def test_tests_that_could_not_run_are_unsettled_and_failures_of_the_kernel_are_not(tmp_path: Path) -> None:
    missed = run(script(tmp_path / "a.py", writes(recorded(line("test_a", "MISS", message="no QEMU")), 1)))
    failed = run(script(tmp_path / "b.py", writes(recorded(line("test_a", "failed")), 1)))
    assert job.unsettled(missed) == "could not run 1 of its tests: no QEMU"
    assert job.unsettled(failed) == ""


CHILDREN = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
open({pids!r}, "w").write(f"{{os.getpid()}} {{child.pid}} ")
{deaf}
time.sleep(600)
"""
DEAF = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)"


def alive(pids: Path) -> list[int]:
    found = []
    for pid in map(int, pids.read_text().split()):
        try:
            if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                found.append(pid)
        except OSError:
            pass
    return found


def wait_for_the_end_of(pids: Path) -> None:
    """A process that was killed lives on until it is scheduled, which takes a moment on a busy host."""
    wait_until(lambda: not alive(pids), "the processes of the job to be gone", 10)


@pytest.mark.parametrize("deaf", ["", DEAF], ids=["", "deaf"])
def test_the_deadline_ends_a_job_with_its_children(tmp_path: Path, deaf: str) -> None:
    pids = tmp_path / "pids"
    task = script(tmp_path / "a.py", CHILDREN.format(pids=str(pids), deaf=deaf))
    task["seconds"] = 3.0
    ended = run(task)
    assert ended["late"]
    assert ended["trouble"].startswith("it was ended after 0.05 minutes")
    wait_for_the_end_of(pids)


def test_a_machine_with_other_tests_refuses(tmp_path: Path) -> None:
    task = script(tmp_path / "a.py", writes(recorded(line("test_a"))))
    task["content"] = "something else"
    ended = run(task)
    assert ended["status"] is None
    assert "not those that the matrix began with" in ended["trouble"]
    task["content"] = job.content()
    assert run(task)["trouble"] == ""


# --- the local executor ----------------------------------------------------------------------------------------------


@pytest.fixture
def local() -> Iterator[LocalExecutor]:
    executor = LocalExecutor(2)
    yield executor
    executor.cancel()


def test_jobs_run_side_by_side_and_come_as_they_end(tmp_path: Path, local: LocalExecutor) -> None:
    meeting = tmp_path / "meeting"
    wait = f"import time\nfrom pathlib import Path\nwhile not Path({str(meeting)!r}).exists(): time.sleep(0.05)\n"
    local.submit(script(tmp_path / "waits.py", wait + writes(recorded(line("test_a")))))
    local.submit(script(tmp_path / "comes.py", f"open({str(meeting)!r}, 'w')\n" + writes(recorded(line("test_a")))))
    assert sorted(each["name"] for each in local.as_completed(lambda: None)) == ["comes", "waits"]


def test_tests_are_counted_while_a_job_runs(tmp_path: Path, local: LocalExecutor) -> None:
    go = tmp_path / "go"
    text = recorded(line("test_a"), line("test_b", "failed"))
    program = f"""
import time
from pathlib import Path
file = open(RECORD, "w")
file.write({text[:-10]!r}); file.flush()
while not Path({str(go)!r}).exists(): time.sleep(0.05)
file.write({text[-10:]!r})
"""
    local.submit(script(tmp_path / "a.py", program))
    wait_until(lambda: local.under_way().get("a") == Tally(2, 1), "both tests to be counted", 30)
    assert local.under_way()["a"] == Tally(2, 1), "a second look must not count them again"
    go.touch()
    assert [each["trouble"] for each in local.as_completed(lambda: None)] == [""]
    assert local.under_way() == {}


def test_cancelling_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    local = LocalExecutor(1)
    pids = tmp_path / "pids"
    local.submit(script(tmp_path / "a.py", CHILDREN.format(pids=str(pids), deaf=DEAF)))
    local.submit(script(tmp_path / "b.py", f"open({str(tmp_path / 'second')!r}, 'w')"))
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the job to start its child", 30)
    local.cancel()
    wait_for_the_end_of(pids)
    ended = [each.result() for each in local._pending if not each.cancelled()]
    assert [each["trouble"] for each in ended] == ["it was stopped"], "it must not run until its deadline"
    assert not (tmp_path / "second").exists()


def test_jobs_end_with_a_matrix_that_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = script(tmp_path / "a.py", CHILDREN.format(pids=str(pids), deaf=""))
    program = f"from harness.matrix import job\njob.run({task!r}, lambda: False, lambda _: None)"
    with subprocess.Popen([sys.executable, "-c", program]) as matrix:
        wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, "the job to start its child", 30)
        matrix.kill()
    first = int(pids.read_text().split()[0])
    wait_until(lambda: first not in alive(pids), "the kernel to end the job", 30)
    for pid in alive(pids):  # what pytest would end by itself: its guests and workers see that it is gone
        os.kill(pid, signal.SIGKILL)
