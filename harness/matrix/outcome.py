# SPDX-License-Identifier: GPL-2.0
"""What a matrix has found out: the one form that the table, the JSON file and the HTML page are made of."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.matrix import job
from harness.matrix.definition import Cell
from harness.matrix.job import Ended
from harness.report.record import Item
from harness.report.results import Outcome

#: Names the format of the JSON file.
FORMAT = "mremap-harness matrix"

#: Grows when a reader of the format before would misunderstand the file.
VERSION = 1


class State(StrEnum):
    """How a cell came to its results."""

    RAN = "ran"
    #: they are those of an earlier run of the same cell
    KEPT = "kept"
    #: it has none, or not all
    BROKEN = "broken"
    #: the matrix ended before its turn
    NOT_RUN = "not run"


class Kind(StrEnum):
    """What a test counts as in tables."""

    PASSED = "passed"
    SKIPPED = "skipped"
    FINDING = "expected finding"
    FAILED = "failed"
    #: could not be run, because the harness failed
    MISSED = "missed"


#: The kinds that nobody expects.
SURPRISES = (Kind.FAILED, Kind.MISSED)


@dataclass(frozen=True, kw_only=True)
class OneTest:
    """One test on one kernel."""

    test: str
    #: a word of :class:`harness.report.results.Outcome`
    outcome: str
    failed: bool
    message: str = ""
    finding: str = ""
    duration: float = 0.0
    sections: Sequence[tuple[str, str]] = ()

    @property
    def module(self) -> str:
        """The name of the file that it is in, without directory and suffix."""
        return self.test.partition("::")[0].rpartition("/")[2].removesuffix(".py")

    @property
    def kind(self) -> Kind:
        """What it counts as."""
        if self.outcome == Outcome.MISS:
            return Kind.MISSED
        if self.failed:
            return Kind.FAILED
        return {Outcome.SKIPPED.value: Kind.SKIPPED, Outcome.XFAILED.value: Kind.FINDING}.get(self.outcome, Kind.PASSED)

    @classmethod
    def of(cls, item: Item) -> OneTest:
        """From a line of a record."""
        return cls(
            test=item.test,
            outcome=item.outcome,
            failed=item.failed,
            message=item.message,
            finding=item.finding,
            duration=item.duration,
            sections=item.sections,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of one cell."""

    name: str
    group: str
    kernel: str
    arch: str
    preset: str
    options: str
    #: empty if the kernel could not be identified
    key: str
    state: State
    #: why results are missing; empty if none are
    trouble: str = ""
    release: str = ""
    #: the upstream version of the kernel
    version: str = ""
    provenance: str = ""
    #: "kvm" or "tcg"
    accelerator: str = ""
    seconds: float = 0.0
    #: the machine it ran on
    host: str = ""
    #: why it was run more than once, in sentences
    reruns: Sequence[str] = ()
    #: the end of what pytest printed, if there was trouble
    output: str = ""
    tests: Sequence[OneTest] = ()

    def counts(self, module: str = "") -> Counter[Kind]:
        """How many tests there are of each kind.

        :param module: only those of one module.
        """
        return Counter(each.kind for each in self.tests if module in ("", each.module))

    @property
    def surprises(self) -> int:
        """The tests that did not end as expected, and one more if the cell itself did not."""
        return sum(self.counts()[kind] for kind in SURPRISES) + bool(self.trouble)


def report(cell: Cell, key: str, state: State, ended: Ended | None = None, trouble: str = "") -> Report:
    """What became of a cell.

    :param ended: its run; None if there was none.
    :param trouble: why there was none.
    """
    seen = job.recording(ended) if ended else None
    trouble = trouble or (ended["trouble"] if ended else "")
    kernel = seen.header.kernels[0] if seen and seen.header.kernels else None
    return Report(
        name=cell.name,
        group=cell.group,
        kernel=cell.kernel,
        arch=cell.arch,
        preset=cell.preset,
        options=cell.options,
        key=key,
        state=State.BROKEN if trouble and state is not State.NOT_RUN else state,
        trouble=trouble,
        release=kernel.release if kernel else "",
        version=kernel.version if kernel else "",
        provenance=kernel.provenance if kernel else "",
        accelerator=kernel.accelerator if kernel else "",
        seconds=ended["seconds"] if ended else 0.0,
        host=ended["host"] if ended else "",
        reruns=ended["reruns"] if ended else (),
        output=ended["output"] if ended and trouble else "",
        tests=[OneTest.of(item) for item in seen.items] if seen else (),
    )


def modules(reports: Iterable[Report]) -> list[str]:
    """The modules of all tests, sorted."""
    return sorted({test.module for each in reports for test in each.tests})


def to_json(reports: Sequence[Report], started: float) -> str:
    """The text of a JSON file.

    :param started: when the matrix began, in seconds since the epoch.
    """
    head = {"format": FORMAT, "version": VERSION, "started": round(started, 3)}
    return json.dumps({**head, "cells": [asdict(each) for each in reports]}, indent=1) + "\n"


def from_json(path: Path) -> list[Report]:
    """Read a JSON file.

    :raises UsageError: if it is none, or a newer version wrote it.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{path} does not hold the results of a matrix: give a file that --json wrote")
    if data.get("version") != VERSION:
        raise UsageError(
            f"{path} has version {data.get('version')} of the format, and this harness reads version {VERSION}: "
            "use the harness that wrote it, or run the matrix again"
        )
    try:
        return [restored(each) for each in data["cells"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged: {error}; run the matrix again") from None


def restored(data: Mapping[str, Any]) -> Report:
    """A cell of the JSON file."""
    tests = [OneTest(**each) for each in data["tests"]]
    return Report(**{**data, "state": State(data["state"]), "tests": tests})
