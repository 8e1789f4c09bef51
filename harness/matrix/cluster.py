# SPDX-License-Identifier: GPL-2.0
"""Runs jobs on the workers of a Dask cluster (the extra ``cluster``).

Dask decides where a job runs, and runs it again elsewhere if its worker dies. What is added here: a job whose machine
or harness failed is run once more on another worker, and each repetition is reported.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.deadline import Deadline
from harness.errors import UsageError
from harness.matrix import job
from harness.matrix.executor import TICK, Tally
from harness.matrix.job import Ended, Job

try:
    import dask
    import distributed
except ImportError as error:
    raise UsageError("a cluster needs Dask: install it with: pip install 'mremap-harness[cluster]'") from error

# Their types are not complete.
_Client: Any = distributed.Client
_LocalCluster: Any = distributed.LocalCluster

#: The topic under which workers log that they begin with a job.
_TOPIC = "mremap-harness"

#: Seconds for a scheduler to answer.
_CONNECT = 10.0

#: Seconds for which a cluster may have no worker at all, before what is left is given up.
_DESERTED = 60.0


@dataclass
class _Run:
    """One job on its way."""

    task: Job
    future: Any
    #: why it was run again, in sentences
    reruns: tuple[str, ...] = ()


class ClusterExecutor:
    """Runs jobs on a cluster.

    :param address: of the scheduler, such as ``tcp://host:8786``; empty for a cluster of processes on this machine.
    :param slots: how many workers a cluster on this machine has.
    :raises UsageError: if no scheduler answers, or it has no workers.
    """

    def __init__(self, address: str, slots: int = 1) -> None:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what happens to workers is reported by us
        self._runs: dict[str, _Run] = {}
        self._cluster: Any = None if address else _local_cluster(slots)
        try:
            self._client: Any = _Client(
                address or self._cluster, timeout=_CONNECT, set_as_default=False, direct_to_workers=False
            )
        except (OSError, ValueError) as error:
            raise UsageError(f"no Dask scheduler answers at {address}: {error}") from None
        if self._cluster is not None:
            self._client.wait_for_workers(slots, timeout=_CONNECT * 6)
        workers = self._workers()
        if not workers:
            self.cancel()
            raise UsageError(f"the scheduler at {address} has no workers: start some with: dask worker {address}")
        self.slots = sum(int(each["nthreads"]) for each in workers.values())

    def submit(self, task: Job) -> None:
        """See :class:`harness.matrix.executor.Executor`.

        :raises UsageError: if no worker offers what the job needs.
        """
        offered = {name for each in self._workers().values() for name in each.get("resources", {})}
        if missing := set(task["resources"]) - offered:
            raise UsageError(
                f"no worker offers {sorted(missing)[0]!r}, which {task['name']} needs: "
                f"start one with: dask worker --resources {sorted(missing)[0]}=1"
            )
        self._start(task, (), None)

    def as_completed(self, tick: Callable[[], None]) -> Iterator[Ended]:
        """See :class:`harness.matrix.executor.Executor`."""
        deserted = Deadline.after(_DESERTED)
        while self._runs:
            for key, run in list(self._runs.items()):
                if run.future.done():
                    del self._runs[key]
                    ended = self._ended(key, run)
                    if ended is not None:
                        yield ended
            tick()
            time.sleep(TICK)
            if self._workers():
                deserted = Deadline.after(_DESERTED)
            elif deserted.passed:
                for run in self._runs.values():
                    yield job.failed(run.task, "the cluster has no workers any more")
                self.cancel()

    def under_way(self) -> Mapping[str, Tally]:
        """See :class:`harness.matrix.executor.Executor`. How many tests a worker has run is not known here."""
        return {self._runs[key].task["name"]: Tally() for key in self._beginnings() if key in self._runs}

    def cancel(self) -> None:
        """See :class:`harness.matrix.executor.Executor`."""
        runs, self._runs = self._runs, {}
        if self._client.status == "closed":
            return
        with contextlib.suppress(OSError, TimeoutError):
            self._client.cancel([run.future for run in runs.values()])
        self._client.close(timeout=1)
        if self._cluster is not None:
            with contextlib.suppress(TimeoutError):  # its processes end with this one at the latest
                self._cluster.close(timeout=5)

    def _start(self, task: Job, reruns: tuple[str, ...], elsewhere: list[str] | None) -> None:
        key = f"{task['name']} {secrets.token_hex(4)}"
        future = self._client.submit(
            _run_on_worker,
            dict(task),
            key=key,
            pure=False,
            workers=elsewhere,
            resources=dict.fromkeys(task["resources"], 1) or None,
        )
        self._runs[key] = _Run(task, future, reruns)

    def _ended(self, key: str, run: _Run) -> Ended | None:
        """What became of a job; None if it runs again."""
        places = self._beginnings().get(key, [])
        died = tuple(f"its worker {place} died in the middle: it was run again" for place in places[:-1])
        if run.future.status != "finished":
            error = run.future.exception() if run.future.status == "error" else run.future.status
            what = f"its worker died: {error}" if isinstance(error, distributed.KilledWorker) else str(error)
            return {**job.failed(run.task, f"it was lost in the cluster: {what}"), "reruns": [*run.reruns, *died]}
        ended: Ended = run.future.result()
        why = "" if ended["late"] else job.unsettled(ended)
        others = [each for each in self._workers() if each not in places]
        if why and not run.reruns and not died and others:
            self._start(run.task, (f"on {places[-1]}, {why}: it was run again",), others)
            return None
        return {**ended, "reruns": [*run.reruns, *died]}

    def _beginnings(self) -> dict[str, list[str]]:
        """On which workers each job has begun, in order."""
        found: dict[str, list[str]] = {}
        for _, event in self._client.get_events(_TOPIC):
            found.setdefault(event["key"], []).append(event["worker"])
        return found

    def _workers(self) -> dict[str, Any]:
        found: dict[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
        return found


def _local_cluster(slots: int) -> Any:
    # One repetition for a job whose worker dies; a second death is reported.
    dask.config.set({"distributed.scheduler.allowed-failures": 1})
    return _LocalCluster(
        n_workers=slots,
        threads_per_worker=1,
        host="127.0.0.1",
        # Without a dashboard a scheduler still serves its routes, by default on port 8787, which may be in use.
        dashboard_address="127.0.0.1:0",
        scheduler_kwargs={"dashboard": False},
        worker_dashboard_address=None,
        silence_logs=logging.CRITICAL,
    )


def _run_on_worker(task: Job) -> Ended:
    """Run a job on a worker, until nobody waits for it any more."""
    worker: Any = distributed.get_worker()
    key = worker.get_current_task()
    worker.log_event(_TOPIC, {"key": key, "worker": worker.address})

    def stopped() -> bool:
        # A job that was cancelled, or whose client is gone, stays in the worker's state as "cancelled" while it runs.
        state = worker.state.tasks.get(key)
        return state is None or state.state in ("cancelled", "resumed")

    ended = job.run(task, stopped, lambda _path: None)
    return {**ended, "host": f"{ended['host']} ({worker.address})"}
