# SPDX-License-Identifier: GPL-2.0
"""Builds or fetches one kernel, boots it, runs the tests on it, and says what it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.bisect import step
from harness.bisect.step import Step
from harness.errors import FetchError, HarnessError
from harness.guests import template_store
from harness.host.cache import Progress
from harness.kernels.kernel import BootSpec
from harness.machine import provision
from harness.matrix.executor import Executor
from harness.matrix.job import Ended, Job
from harness.options import MachineOptions
from harness.report.state import STOPS, State, why_not_ready

#: More options of pytest. Its guests collect the tests as those of a run by hand do, and share their template.
_QUIET = ("-q", "-p", "no:cacheprovider")


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """The tests that decide."""

    #: for pytest: tests, and options that choose among them
    arguments: tuple[str, ...]
    #: how many times they run; a kernel is good if it is good each time
    repeat: int = 1
    #: after how many seconds one run is ended
    seconds: float = 1800.0


def ready(spec: BootSpec, options: MachineOptions, progress: Progress) -> None:
    """Build or fetch a kernel, and boot it to its agent. The run of the tests then clones that guest.

    This is done here and not by pytest, because the error says whose fault it is.

    :raises HarnessError: whatever goes wrong, by its kind.
    """
    _, machine = provision.provision(spec, options, progress)
    template_store.boot(machine, progress)


class Trial:
    """Asks kernels the same question.

    :param options: about the machines.
    :param executor: runs the tests.
    :param progress: shows what takes long.
    :param lenient: whether a kernel that cannot be fetched has no verdict. Otherwise it stops the bisect.
    :param ready: see :func:`ready`.
    """

    def __init__(
        self,
        tests: Criterion,
        options: MachineOptions,
        executor: Executor,
        progress: Progress,
        *,
        lenient: bool = False,
        ready: Callable[[BootSpec, MachineOptions, Progress], None] = ready,
    ) -> None:
        self._tests = tests
        self._options = options
        self._executor = executor
        self._progress = progress
        self._stops = tuple(each for each in STOPS if not (lenient and each is FetchError))
        self._ready = ready

    def of(self, name: str, spec: BootSpec) -> Step:
        """What one kernel says.

        :param name: what the step is called.
        :raises HostError: if this host lacks a program, or space.
        :raises FetchError: if something cannot be fetched.
        :raises UsageError: if the request makes no sense on any kernel.
        """
        began = time.monotonic()
        try:
            self._ready(spec, self._options, self._progress)
        except self._stops:
            raise
        except HarnessError as error:
            message = why_not_ready(error)
            return Step(name=name, state=State.NONE, message=message, seconds=time.monotonic() - began)
        state, message, results = self._run(spec)
        return Step(name=name, state=state, message=message, seconds=time.monotonic() - began, results=results)

    def _run(self, spec: BootSpec) -> tuple[State, str, str]:
        """The worst that the repetitions say."""
        found: list[tuple[State, str, str]] = []
        for number in range(1, self._tests.repeat + 1):
            again = f", run {number} of {self._tests.repeat}" if self._tests.repeat > 1 else ""
            ended = self._once(spec, again)
            state, message = step.judge(ended)
            found.append((state, f"{message}{again}", ended["results"]))
            if state is State.BAD:
                return found[-1]
        return next((each for each in found if each[0] is State.NONE), found[-1])

    def _once(self, spec: BootSpec, again: str) -> Ended:
        def tick() -> None:
            tests = sum(each.tests for each in self._executor.under_way().values())
            self._progress(f"{spec.label}: running the tests{again}, {tests} done")

        self._executor.submit(
            Job(
                name=spec.label,
                python=["-m", "pytest", *_kernel(spec), *_machine(self._options), *_QUIET, *self._tests.arguments],
                seconds=self._tests.seconds,
                content="",
                resources=[],
            )
        )
        (ended,) = self._executor.as_completed(tick)
        return ended


def _kernel(spec: BootSpec) -> Sequence[str]:
    return f"--kernel={spec.text}", f"--arch={spec.arch}"


def _machine(options: MachineOptions) -> Sequence[str]:
    """The options as pytest takes them."""
    given = {
        "--append": options.append,
        "--guest-memory": options.memory,
        "--guest-cpus": options.cpus,
        "--debian-mirror": options.debian_mirror,
        "--userland": options.userland or "",
    }
    return [f"{name}={value}" for name, value in given.items() if value]
