# SPDX-License-Identifier: GPL-2.0
"""Compares the kernels of one run: what each makes of every test, next to the first kernel of its architecture.

What counts is what a kernel did, not what was expected of it: a finding that shows is broken whether or not
``--expect-findings`` made a failure of it. The words are those of :class:`harness.judging.verdict.Verdict`, which
tell trouble of ours from the kernel's.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from harness.arch import Architecture
from harness.report.results import Facts, Outcome, Result


class Change(StrEnum):
    """What a kernel changes about a test, as seen from the baseline."""

    FIXED = "fixed"
    REGRESSED = "regressed"
    NEW = "new ability"
    SAME = "same"
    NOT_COMPARED = "not compared"


#: Stands for a test that was not run on a kernel.
_NOT_RUN = Result(Facts(label="", test=""), Outcome.NONE)


class _Kind(StrEnum):
    WORKS = "works"
    BROKEN = "broken"
    ABSENT = "absent"


_KINDS = {
    Outcome.PASSED: _Kind.WORKS,
    Outcome.FAILED: _Kind.BROKEN,
    Outcome.ERROR: _Kind.BROKEN,  # of set-up, but by the same test that did not err on the other kernel
    Outcome.XFAILED: _Kind.BROKEN,
    Outcome.SKIPPED: _Kind.ABSENT,
    Outcome.LACKING: _Kind.ABSENT,
}

#: By kind on the baseline and on the other kernel, with what a reader should be told. All that is worse, or can no
#: longer be told from worse, is a regression: a failure that is skipped now is not fixed, and an ability that came
#: broken must not hide among those that work.
_CHANGES = {
    (_Kind.BROKEN, _Kind.WORKS): (Change.FIXED, ""),
    (_Kind.WORKS, _Kind.BROKEN): (Change.REGRESSED, ""),
    (_Kind.WORKS, _Kind.ABSENT): (Change.REGRESSED, "no longer runs"),
    (_Kind.BROKEN, _Kind.ABSENT): (Change.REGRESSED, "no longer runs"),
    (_Kind.ABSENT, _Kind.BROKEN): (Change.REGRESSED, "new, but broken"),
    (_Kind.ABSENT, _Kind.WORKS): (Change.NEW, ""),
}


@dataclass(frozen=True)
class Row:
    """One test on a pair of kernels."""

    #: its id without the kernel's label
    test: str
    baseline: Result
    other: Result

    @property
    def module(self) -> str:
        """The file it is in."""
        return self.test.partition("::")[0]

    @property
    def _judged(self) -> tuple[Change, str]:
        before, after = _KINDS.get(self.baseline.outcome), _KINDS.get(self.other.outcome)
        if before is None or after is None:
            return Change.NOT_COMPARED, ""
        return _CHANGES.get((before, after), (Change.SAME, ""))

    @property
    def change(self) -> Change:
        """Its class."""
        return self._judged[0]

    @property
    def why(self) -> str:
        """What is to be said of it: the new trouble, or else the old."""
        return ": ".join(filter(None, (self._judged[1], self.other.message or self.baseline.message)))


@dataclass(frozen=True)
class Line:
    """A line for the terminal, with pytest's markup."""

    text: str
    markup: Mapping[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """What is to be said of one kernel."""

    title: str
    lines: Sequence[Line]


#: What stands out, and first what a line is coloured by if it has several.
_MARKUP = {
    Change.REGRESSED: {"red": True},
    Change.FIXED: {"green": True},
    Change.NEW: {"green": True},
    Change.NOT_COMPARED: {"yellow": True},
}


def sections(
    results: Sequence[Result], kernels: Mapping[str, Architecture | None], width: int, *, verbose: bool
) -> list[Section]:
    """Each kernel compared with its baseline, the first of its architecture; nothing for kernels that ran no test.

    :param results: of the whole run.
    :param kernels: architecture by label, in the order of the command line; None is one that is not known.
    :param width: the terminal's, in columns.
    :param verbose: list every test, not only those that were fixed or regressed.
    """
    said = []
    tests = {each.facts.label for each in results}
    for label, arch in kernels.items():
        if arch is None and len(kernels) > 1 and label in tests:
            why = "its architecture is not known: give --arch, so that it is compared with others of the same"
            said.append(Section(f"{label} compared with nothing", [Line(why)]))
    for label, rows in comparisons(results, kernels).items():
        title = f"{label} compared with {baselines(kernels)[label]}"
        said.append(Section(title, lines(rows, width, verbose=verbose)))
    return said


def baselines(kernels: Mapping[str, Architecture | None]) -> dict[str, str]:
    """The label of the kernel that each one is compared with, by label; without those that are compared with none.

    :param kernels: as for :func:`sections`.
    """
    first: dict[Architecture, str] = {}
    found = {label: first.setdefault(arch, label) for label, arch in kernels.items() if arch is not None}
    return {label: baseline for label, baseline in found.items() if label != baseline}


def comparisons(results: Sequence[Result], kernels: Mapping[str, Architecture | None]) -> dict[str, list[Row]]:
    """The rows of each kernel that is compared, by label; without pairs of kernels that ran no test.

    :param results: of the whole run.
    :param kernels: as for :func:`sections`.
    """
    seen = {label: {each.facts.test: each for each in results if each.facts.label == label} for label in kernels}
    found = {label: compare(seen[baseline], seen[label]) for label, baseline in baselines(kernels).items()}
    return {label: rows for label, rows in found.items() if rows}


def objections(compared: Mapping[str, Sequence[Row]]) -> list[str]:
    """Why nobody can say that nothing has regressed, in sentences; empty if nothing has.

    :param compared: see :func:`comparisons`.
    """
    found = []
    for label, rows in compared.items():
        counts = Counter(row.change for row in rows)
        for change, what in ((Change.REGRESSED, "regressed"), (Change.NOT_COMPARED, "could not be compared")):
            if counts[change]:
                test = next(row.test for row in rows if row.change is change)
                more = f" and {counts[change] - 1} more" if counts[change] > 1 else ""
                found.append(f"{what} on {label}: {test}{more}")
    return found or ([] if compared else ["nothing could be compared: no two kernels of one architecture ran a test"])


def compare(baseline: Mapping[str, Result], other: Mapping[str, Result]) -> list[Row]:
    """One row for each test that ran on either kernel, in the order of their ids."""
    tests = sorted(baseline.keys() | other.keys())
    return [Row(test, baseline.get(test, _NOT_RUN), other.get(test, _NOT_RUN)) for test in tests]


def lines(rows: Sequence[Row], width: int, *, verbose: bool) -> list[Line]:
    """A table by module, and the tests that were fixed or regressed by name; all of them if ``verbose``."""
    told = [each for each in Change if verbose or each in (Change.FIXED, Change.REGRESSED)]
    return [*_table(rows, width), *(line for change in told for line in _list(rows, change, width))]


def _table(rows: Sequence[Row], width: int) -> Iterator[Line]:
    counts: defaultdict[str, Counter[Change]] = defaultdict(Counter)
    for row in rows:
        counts[row.module][row.change] += 1
    total = sum(counts.values(), Counter[Change]())
    directory = os.path.commonpath([os.path.dirname(name) for name in counts])
    named = {name.removeprefix(directory).lstrip("/"): each for name, each in counts.items()} | {"all": total}
    cells = "".join(f"  {each}" for each in Change)
    column = min(max(map(len, named)), max(12, width - len(cells)))
    yield Line(f"{'':{column}}{cells}")
    for name, each in named.items():
        shown = name if len(name) <= column else f"…{name[1 - column :]}"
        cells = "".join(f"  {each[change] or '-':>{len(change)}}" for change in Change)
        yield Line(f"{shown:{column}}{cells}", next((_MARKUP[change] for change in _MARKUP if each[change]), {}))


def _list(rows: Sequence[Row], change: Change, width: int) -> Iterator[Line]:
    listed = [(f"{row.baseline.outcome} -> {row.other.outcome}", row) for row in rows if row.change is change]
    if listed:
        yield Line("")
        yield Line(f"{change}:", _MARKUP.get(change, {}))
    column = max((len(outcomes) for outcomes, _ in listed), default=0)
    for outcomes, row in listed:
        yield Line(f"  {outcomes:{column}}  {row.test}")
        if row.why:
            yield Line(_clipped(f"      {row.why}", width))


def _clipped(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width, 20) - 1]}…"
