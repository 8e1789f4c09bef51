# SPDX-License-Identifier: GPL-2.0
"""One or several records of results as one, kernel by kernel: what every format is made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness import arch
from harness.arch import Architecture
from harness.errors import UsageError
from harness.report import compare
from harness.report.compare import Change, Row
from harness.report.record import Item, KernelFacts, Recording

#: Exit statuses of pytest with which all selected tests have run: all passed, some failed, none selected.
_ENDED = (0, 1, 5)


@dataclass(frozen=True)
class KernelRun:
    """The tests of one kernel."""

    facts: KernelFacts
    #: sorted by id, so that the same tests give the same report, in whatever order they ran
    items: Sequence[Item]

    @property
    def label(self) -> str:
        """Names the kernel; unique in a run."""
        return self.facts.label

    @property
    def modules(self) -> Mapping[str, Sequence[Item]]:
        """The tests by the file that they are in."""
        found: defaultdict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            found[item.module].append(item)
        return found


@dataclass(frozen=True)
class Run:
    """All that was recorded."""

    kernels: Sequence[KernelRun]
    #: when the first of the records began, in seconds since the epoch
    started: float
    #: the command lines of pytest, one for each record
    commands: Sequence[tuple[str, ...]]
    #: the version of the harness
    harness: str
    #: why tests are missing, in sentences; empty if none are
    missing: Sequence[str] = ()
    #: what else a reader should be told, in sentences
    notes: Sequence[str] = ()

    @property
    def items(self) -> Sequence[Item]:
        """All tests, kernel by kernel."""
        return [item for kernel in self.kernels for item in kernel.items]

    @property
    def compared(self) -> Mapping[str, Sequence[Row]]:
        """Each kernel compared with the first one of its architecture, by label."""
        return compare.comparisons([item.result for item in self.items], self._architectures)

    @property
    def baselines(self) -> Mapping[str, str]:
        """The label of the kernel that each one is compared with, by label."""
        return compare.baselines(self._architectures)

    @property
    def changes(self) -> list[dict[str, str]]:
        """What a kernel changes about a test, as the last line of a record tells it."""
        return [
            {
                "label": label,
                "baseline": self.baselines[label],
                "test": row.test,
                "change": str(row.change),
                "before": str(row.baseline.outcome),
                "after": str(row.other.outcome),
            }
            for label, rows in self.compared.items()
            for row in rows
            if row.change is not Change.SAME
        ]

    @property
    def _architectures(self) -> Mapping[str, Architecture | None]:
        return {each.label: _architecture(each.facts.arch) for each in self.kernels}


def merge(recordings: Sequence[Recording]) -> Run:
    """One run of one or more records.

    Records of the same kernel are put together, so that the tests of one suite may be spread over several runs. If a
    test was run in several of them, the last one counts. Two different kernels under one label get different labels.
    """
    found: dict[KernelFacts, dict[str, Item]] = {}
    missing: list[str] = []
    notes: list[str] = []
    for recording in recordings:
        missing += _missing(recording)
        labels = {each.label: _distinct(each, found) for each in recording.header.kernels}
        for label in labels.values():
            found.setdefault(label, {})
        again = 0
        seen: set[tuple[str, str]] = set()
        for item in recording.items:
            facts = labels.setdefault(item.label, KernelFacts(label=item.label, spec=""))
            tests = found.setdefault(facts, {})
            again += item.test in tests and (facts.label, item.test) not in seen
            seen.add((facts.label, item.test))
            tests[item.test] = replace(item, label=facts.label)
        if again:
            notes.append(f"tests that are in several records: {again}; the last of each counts")
    return Run(
        kernels=[KernelRun(facts, [tests[name] for name in sorted(tests)]) for facts, tests in found.items()],
        started=min(each.header.started for each in recordings),
        commands=[each.header.command for each in recordings],
        harness=", ".join(dict.fromkeys(each.header.harness for each in recordings)),
        missing=missing,
        notes=notes,
    )


def _architecture(name: str) -> Architecture | None:
    try:
        return arch.find(name)
    except UsageError:
        return None


def _missing(recording: Recording) -> list[str]:
    if recording.status is not None and recording.status not in _ENDED:
        return [f"a run ended early, with status {recording.status} of pytest after {len(recording.items)} tests"]
    return list(recording.notes)


def _distinct(facts: KernelFacts, found: Mapping[KernelFacts, object]) -> KernelFacts:
    """The same kernel under a label that no other kernel has."""
    taken = {each.label for each in found if replace(each, label=facts.label) != facts}
    label, number = facts.label, 1
    while label in taken:
        number += 1
        label = f"{facts.label}-{number}"
    return replace(facts, label=label)
