# SPDX-License-Identifier: GPL-2.0
"""Jobs on a Dask cluster of two worker processes: they are run once, or once more where a worker or the harness failed.

The jobs are small programs, so that no guest is booted.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.matrix.job import Ended, Job
from tests.lab import wait_until
from tests.matrix_runs import line, recorded, script

distributed = pytest.importorskip(
    "distributed", reason="needs the extra cluster: pip install 'mremap-harness[cluster]'"
)

from harness.matrix.cluster import ClusterExecutor  # noqa: E402 - needs what is asked for above

#: Says on which worker it runs, and waits there until it may go on.
PROGRAM = """
import os, time
from pathlib import Path
with open({beginnings!r}, "a") as file:
    file.write(f"{{os.getppid()}} {{os.getpid()}}\\n")
while not Path({go!r}).exists():
    time.sleep(0.05)
open(RECORD, "w").write({text!r})
"""


class Cluster:
    """A scheduler and its workers, each a process of its own on this machine."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "scheduler.json"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start("dask_scheduler", "--port=0", "--scheduler-file", str(self._file), failures=1)
        wait_until(lambda: self._file.exists() and self._file.read_text().endswith("}"), "the scheduler to start", 120)
        self.address = str(json.loads(self._file.read_text())["address"])
        self.workers: list[subprocess.Popen[bytes]] = []

    def worker(self, *more: str) -> subprocess.Popen[bytes]:
        """Start a worker for one job at a time."""
        process = self._start("dask_worker", self.address, "--nthreads=1", "--no-nanny", *more)
        self.workers.append(process)
        return process

    def _start(self, module: str, *arguments: str, failures: int = 0) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore", "-m", f"distributed.cli.{module}", "--host=127.0.0.1"]
        environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(failures)}
        environment["DASK_TEMPORARY_DIRECTORY"] = str(self._directory)
        with (self._directory / f"{module}-{len(self._processes)}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--no-dashboard", *arguments], env=environment, stdout=log, stderr=log, cwd=self._directory
            )
        self._processes.append(process)
        return process

    def close(self) -> None:
        """End all processes."""
        for process in reversed(self._processes):
            process.kill()
            process.wait()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A scheduler with two workers, the second of which offers ``kvm``."""
    (tmp_path / "dask").mkdir()
    made = Cluster(tmp_path / "dask")
    try:
        made.worker()
        made.worker("--resources", "kvm=1")
        yield made
    finally:
        made.close()


@pytest.fixture
def executor(cluster: Cluster) -> Iterator[ClusterExecutor]:
    wait_until(lambda: workers(cluster.address) == 2, "both workers to join", 120)
    made = ClusterExecutor(cluster.address)
    yield made
    made.cancel()


def workers(address: str) -> int:
    with distributed.Client(address, set_as_default=False) as client:
        return len(client.scheduler_info()["workers"])


class Waiting:
    """A job that waits, and what is seen of it."""

    def __init__(self, directory: Path, name: str, text: str) -> None:
        self._beginnings = directory / f"{name}.begun"
        self._go = directory / f"{name}.go"
        program = PROGRAM.format(beginnings=str(self._beginnings), go=str(self._go), text=text)
        self.task: Job = script(directory / f"{name}.py", program)

    def go(self) -> None:
        """Let it end."""
        self._go.touch()

    @property
    def places(self) -> list[int]:
        """The workers it has begun on, by process id."""
        return [int(each.split()[0]) for each in self._lines()]

    @property
    def processes(self) -> list[int]:
        """The processes it has been."""
        return [int(each.split()[1]) for each in self._lines()]

    def _lines(self) -> list[str]:
        return self._beginnings.read_text().splitlines() if self._beginnings.exists() else []


def collect(executor: ClusterExecutor) -> dict[str, Ended]:
    return {each["name"]: each for each in executor.as_completed(lambda: None)}


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_jobs_run_on_both_workers_and_bring_their_results(executor: ClusterExecutor, tmp_path: Path) -> None:
    jobs = [Waiting(tmp_path, name, recorded(line("test_a"))) for name in ("one", "two")]
    for each in jobs:
        executor.submit(each.task)
    wait_until(lambda: all(each.places for each in jobs), "both jobs to begin", 60)
    assert jobs[0].places != jobs[1].places
    assert set(executor.under_way()) == {"one", "two"}
    for each in jobs:
        each.go()
    ended = collect(executor)
    assert {name: (each["trouble"], each["reruns"]) for name, each in ended.items()} == {
        "one": ("", []),
        "two": ("", []),
    }
    assert all("tcp://127.0.0.1:" in each["host"] for each in ended.values())


def test_a_job_whose_worker_dies_is_run_once_more_and_the_others_go_on(
    cluster: Cluster, executor: ClusterExecutor, tmp_path: Path
) -> None:
    jobs = {name: Waiting(tmp_path, name, recorded(line("test_a"))) for name in ("one", "two", "three")}
    for each in jobs.values():
        executor.submit(each.task)
    wait_until(lambda: sum(len(each.places) for each in jobs.values()) == 2, "two jobs to begin", 60)
    victim = next(each for each in jobs.values() if each.places)
    (first,) = victim.places
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: gone(victim.processes[0]), "the job to end with its worker", 30)
    for each in jobs.values():
        each.go()
    ended = collect(executor)
    assert {each["trouble"] for each in ended.values()} == {""}
    assert victim.places[0] == first
    assert len(victim.places) == 2, "it has to run twice"
    assert victim.places[1] != first, "it has to run elsewhere"
    assert "died in the middle: it was run again" in ended[victim.task["name"]]["reruns"][0]
    others = [each for each in jobs.values() if each is not victim]
    assert [len(each.places) for each in others] == [1, 1]
    assert [ended[each.task["name"]]["reruns"] for each in others] == [[], []]


def test_a_job_that_the_harness_failed_is_run_once_more_elsewhere_and_reported(
    executor: ClusterExecutor, tmp_path: Path
) -> None:
    missed = Waiting(tmp_path, "missed", recorded(line("test_a", "MISS", message="no QEMU"), status=0))
    failed = Waiting(tmp_path, "failed", recorded(line("test_a", "failed"), status=0))
    for each in (missed, failed):
        each.go()
        executor.submit(each.task)
    ended = collect(executor)
    assert len(set(missed.places)) == 2, "it has to run on both workers"
    (why,) = ended["missed"]["reruns"]
    assert "could not run 1 of its tests: no QEMU: it was run again" in why
    assert len(failed.places) == 1, "a failure of the kernel is a result"
    assert ended["failed"]["reruns"] == []


def test_a_job_goes_where_its_label_is_offered(cluster: Cluster, executor: ClusterExecutor, tmp_path: Path) -> None:
    jobs = [Waiting(tmp_path, name, recorded(line("test_a"))) for name in ("one", "two", "three")]
    for each in jobs:
        each.task["resources"] = ["kvm"]
        each.go()
        executor.submit(each.task)
    collect(executor)
    assert {place for each in jobs for place in each.places} == {cluster.workers[1].pid}
    jobs[0].task["resources"] = ["riscv"]
    with pytest.raises(UsageError, match="no worker offers 'riscv', which one needs"):
        executor.submit(jobs[0].task)


@pytest.mark.parametrize("how", ["cancelled", "client gone"])
def test_a_job_that_nobody_waits_for_is_ended_on_its_worker(
    how: str, cluster: Cluster, executor: ClusterExecutor, tmp_path: Path
) -> None:
    waiting = Waiting(tmp_path, "waiting", recorded(line("test_a")))
    if how == "cancelled":
        executor.submit(waiting.task)
        wait_until(lambda: waiting.places, "the job to begin", 60)
        executor.cancel()
    else:
        program = f"""
import sys
from harness.matrix.cluster import ClusterExecutor
executor = ClusterExecutor({cluster.address!r})
executor.submit({waiting.task!r})
list(executor.as_completed(lambda: None))
"""
        with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program]) as client:
            wait_until(lambda: waiting.places, "the job to begin", 60)
            client.kill()
    wait_until(lambda: gone(waiting.processes[0]), "the job to be ended", 60)
    assert len(waiting.places) == 1


def test_a_scheduler_that_does_not_answer_is_a_wrong_request() -> None:
    # The reserved port 9 of this host answers nobody.
    with pytest.raises(UsageError, match=r"^no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        ClusterExecutor("tcp://127.0.0.1:9")


def test_a_cluster_of_this_machine_needs_no_set_up(tmp_path: Path) -> None:
    executor = ClusterExecutor("", 2)
    try:
        quick = Waiting(tmp_path, "quick", recorded(line("test_a")))
        quick.go()
        executor.submit(quick.task)
        assert executor.slots == 2
        assert collect(executor)["quick"]["trouble"] == ""
    finally:
        executor.cancel()


def test_two_clusters_of_this_machine_do_not_meet_at_a_port() -> None:
    # Dask warns that its port 8787 is in use, and warnings are errors here.
    clusters = [ClusterExecutor("", 1)]
    try:
        clusters.append(ClusterExecutor("", 1))
    finally:
        for each in clusters:
            each.cancel()
