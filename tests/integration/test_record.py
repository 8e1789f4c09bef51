# SPDX-License-Identifier: GPL-2.0
"""``--results`` with real guests: the record is complete after a run, and readable after its processes were killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from harness.report import record
from harness.report.record import Recording
from tests.lab import KERNEL, Lab, wait_until

MIXED = """
    import pytest

    def test_passes(record_property):
        record_property("seen", {"pages": [1, 2]})

    @pytest.mark.parametrize("number", [1, 2])
    def test_fails(number):
        print("said before")
        assert number == 99, f"number \\x1b[31m{number}"

    def test_breaks_the_kernel():
        with open("/dev/kmsg", "w") as log:
            log.write("<4>BUG: Bad page state in process python3  pfn:12345\\n")

    def test_skips():
        pytest.skip("needs CONFIG_NOTHING")
"""

SLOW = """
    import time

    def test_short():
        pass

    def test_long():
        time.sleep(300)

    def test_after():
        pass
"""


def read(lab: Lab) -> Recording:
    return record.read(lab.root / "results.jsonl")


def outcomes(recording: Recording) -> dict[str, str]:
    return {item.test.partition("::")[2]: item.outcome for item in recording.items}


@pytest.mark.parametrize("workers", ["0", "2"], ids=["alone", "xdist"])
def test_a_run_is_recorded_test_by_test(lab: Lab, workers: str) -> None:
    lab.write("test_mixed.py", MIXED)
    outcome = lab.run("--results=results.jsonl", "-n", workers)
    recording = read(lab)
    assert outcome.status == recording.status == pytest.ExitCode.TESTS_FAILED
    assert not recording.notes
    assert outcomes(recording) == {
        "test_passes": "passed",
        "test_fails[1]": "failed",
        "test_fails[2]": "failed",
        "test_breaks_the_kernel": "failed",
        "test_skips": "skipped",
    }
    (kernel,) = recording.header.kernels
    assert kernel.spec == KERNEL
    assert kernel.release.startswith("6.12.")
    assert kernel.accelerator in ("kvm", "tcg")
    assert "sha256" in kernel.provenance
    by_name = {item.test.partition("::")[2]: item for item in recording.items}
    assert ("seen", {"pages": [1, 2]}) in by_name["test_passes"].properties
    assert by_name["test_passes"].sections == ()
    failed = by_name["test_fails[1]"]
    assert failed.label == kernel.label
    assert failed.guest == "clone"
    assert failed.start >= recording.header.started
    assert 0 < failed.duration < 300
    sections = dict(failed.sections)
    assert "said before" in sections["Captured stdout call"]
    assert "kernel console" in sections
    assert "--kernel=debian:6.12" in sections["run it again"]
    assert by_name["test_breaks_the_kernel"].message.startswith("the kernel complained during this test: ")
    assert "\x1b" not in (lab.root / "results.jsonl").read_text()


def worker(lab: Lab) -> int:
    """The process that started the guest whose test is running: a worker of pytest-xdist, or pytest itself."""
    wait_until(lab.running, "a test to run in a guest", 240)
    status = Path(f"/proc/{lab.running()[0]}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("PPid:")).split()[1])


def test_a_test_whose_worker_dies_is_recorded_as_a_harness_error(lab: Lab) -> None:
    path = lab.write("test_slow.py", SLOW)
    run = lab.start("--results=results.jsonl", "-n", "1", "-k", "long or after")
    os.kill(worker(lab), signal.SIGKILL)
    outcome = lab.finish(run)
    recording = read(lab)
    assert recording.status == outcome.status == pytest.ExitCode.TESTS_FAILED
    by_test = {item.test: item for item in recording.items}
    lost = by_test[f"{path}::test_long"]
    assert (lost.outcome, lost.verdict, lost.failed) == ("MISS", "MISS", True)
    assert lost.label == recording.header.kernels[0].label
    assert "crashed" in lost.message
    assert by_test[f"{path}::test_after"].outcome == "passed"


def test_a_killed_run_leaves_a_readable_record(lab: Lab) -> None:
    lab.write("test_slow.py", SLOW)
    (lab.root / "results.jsonl").unlink(missing_ok=True)  # of the test before
    run = lab.start("--results=results.jsonl")
    wait_until(lambda: (lab.root / "results.jsonl").exists() and read_if_any(lab), "the first line of a test", 240)
    run.kill()
    lab.finish(run)
    recording = read(lab)
    assert outcomes(recording) == {"test_short": "passed"}
    assert recording.status is None
    assert "cut short after 1 tests" in recording.notes[0]


def read_if_any(lab: Lab) -> bool:
    return b'"test"' in (lab.root / "results.jsonl").read_bytes()


def test_a_file_that_cannot_be_written_is_a_usage_error(lab: Lab) -> None:
    lab.write("test_mixed.py", MIXED)
    outcome = lab.run("--results=missing/results.jsonl")
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "cannot write the results to" in outcome.output
