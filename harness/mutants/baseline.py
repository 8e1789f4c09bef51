# SPDX-License-Identifier: GPL-2.0
"""The tests with no mutant active: they have to pass, and they show which mutants' places each test reaches.

A test that does not reach the place of a mutant runs the same code as without it. So it cannot notice the mutant, and
is not run against it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from harness.agent.mutants import PROPERTY
from harness.errors import UsageError
from harness.report.record import Item, Recording
from harness.report.results import Outcome


@dataclass(frozen=True)
class Passed:
    """A test that passed."""

    #: its id without the kernel's label
    test: str
    #: seconds it took
    seconds: float
    #: the mutants whose places it reached
    reached: frozenset[str]

    @property
    def module(self) -> str:
        """The file that it is in."""
        return self.test.partition("::")[0]


@dataclass(frozen=True)
class Baseline:
    """What the tests do without any mutant."""

    #: the kernel's label in test ids
    label: str
    release: str
    accelerator: str
    #: by test id without the label; without those that skip or show a finding
    passed: Mapping[str, Passed]

    def reaching(self, mutant: str) -> list[Passed]:
        """The tests that reach the place of a mutant."""
        return [each for each in self.passed.values() if mutant in each.reached]


def read(recording: Recording) -> Baseline:
    """Read a run with ``--mutant=record``.

    :raises UsageError: if a test failed: then no failure would mean that a mutant was noticed.
    """
    failed = [item for item in recording.items if item.failed]
    if failed:
        raise UsageError(
            f"{len(failed)} tests fail although no mutant is active, first {failed[0].test}: {failed[0].message}; "
            "correct this first"
        )
    kernel = recording.header.kernels[0]
    passed = [
        Passed(item.test, item.duration, frozenset(reached(item)))
        for item in recording.items
        if item.outcome in (Outcome.PASSED, Outcome.LACKING)
    ]
    if not any(each.reached for each in passed):
        raise UsageError("no test reaches the place of any mutant: the kernel does not have them")
    return Baseline(kernel.label, kernel.release, kernel.accelerator, {each.test: each for each in passed})


def pytest_name(test: str, label: str) -> str:
    """A test as pytest's command line names it.

    :param test: its id without the kernel's label.
    """
    name, bracket, parameters = test.partition("[")
    return f"{name}[{label}-{parameters}" if bracket else f"{name}[{label}]"


def reached(item: Item) -> Iterable[str]:
    """The mutants whose places a test reached, by what its record says."""
    return " ".join(str(value) for name, value in item.properties if name == PROPERTY).split()
