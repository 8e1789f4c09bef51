# SPDX-License-Identifier: GPL-2.0
"""The results of a benchmark: a table to read, a JSON file to keep, and the comparison with an earlier file."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness.errors import HarnessError, UsageError

#: Version of the JSON layout. A file with another version is refused.
FORMAT = 1

#: Key of the peer's figure. The column of ratios divides its median by that of our own figures.
PEER = "peer"


class MeasureError(HarnessError):
    """A measurement failed, so its figure is missing."""


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    #: the same in every run; figures of two runs are compared by it
    key: str
    what: str
    #: one value for each round, in ``unit``
    samples: tuple[float, ...]
    unit: str = "s"
    #: whether the peer's figure measures the same check, so that the ratio of the two means something
    as_peer: bool = False

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.samples)


@dataclass
class Results:
    """What one run of a benchmark measured."""

    #: what was measured and where: kernel, accelerator and so on
    about: dict[str, str]
    figures: list[Figure] = field(default_factory=list)
    #: one sentence for each figure that is missing, with the reason
    problems: list[str] = field(default_factory=list)

    def attempt(self, what: str, measure: Callable[[], Sequence[Figure]]) -> None:
        """Add figures. If they cannot be measured, add the reason to the problems instead.

        :param what: names the figures in the problem.
        """
        try:
            self.figures += measure()
        except HarnessError as error:
            self.failed(what, error)

    def failed(self, what: str, error: Exception) -> None:
        """Add the first line of an error to the problems."""
        self.problems.append(f"{what}: {str(error).partition(chr(10))[0]}")

    def median(self, key: str) -> float | None:
        """The median of one figure, or None if it is missing."""
        return next((figure.median for figure in self.figures if figure.key == key), None)

    def write(self, path: Path) -> None:
        """Write all samples to a JSON file that :meth:`read` reads."""
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that :meth:`write` wrote.

        :raises UsageError: if the file cannot be read, or is not such a file.
        """
        try:
            data: Any = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the figures in {path}: {error}") from None
        try:
            if data["format"] != FORMAT:
                raise UsageError(f"{path} has format {data['format']}, not {FORMAT}: measure again with --json")
            figures = [Figure(**{**each, "samples": tuple(map(float, each["samples"]))}) for each in data["figures"]]
            if not all(figure.samples for figure in figures):
                raise ValueError("a figure without samples")
            return cls(dict(data["about"]), figures, list(data["problems"]))
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{path} is not a file of figures: write one with --json") from None


def timed(action: Callable[[], object]) -> float:
    """Run ``action``.

    :returns: the seconds it took.
    """
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def side_by_side(
    actions: Mapping[str, Callable[[], object]], rounds: int, results: Results
) -> dict[str, tuple[float, ...]]:
    """Time several actions in turn, so that all of them see the machine in the same state.

    Each action runs once before the rounds begin, to warm its caches. An action that fails is not run again: its error
    goes to the problems of ``results``, and it has no samples.

    :returns: the seconds of each round, for each action that never failed.
    """
    samples: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            if name not in samples:
                continue
            try:
                seconds = timed(action)
            except HarnessError as error:
                results.failed(name, error)
                del samples[name]
                continue
            if number > 0:
                samples[name].append(seconds)
    return {name: tuple(values) for name, values in samples.items()}


def table(results: Results, earlier: Results | None = None) -> list[str]:
    """The figures as a Markdown table.

    :param earlier: results to compare with; they add a column with their medians, and one with the ratios.
    """
    peer = results.median(PEER)
    head = ["what", "median", "range", "rounds"]
    head += [f"{results.about['peer']} takes"] if peer is not None else []
    head += ["before", "now / before"] if earlier else []
    rows = []
    for figure in results.figures:
        low, high = min(figure.samples), max(figure.samples)
        row = [figure.what, _value(figure.median, figure.unit), f"{low:.2f}-{high:.2f}", str(len(figure.samples))]
        if peer is not None:
            row.append(_ratio(peer, figure.median) if figure.as_peer else "")
        if earlier:
            before = earlier.median(figure.key)
            row += ["-", "-"] if before is None else [_value(before, figure.unit), _ratio(figure.median, before)]
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _value(median: float, unit: str) -> str:
    return f"{median:.2f} {unit}"


def _ratio(dividend: float, divisor: float) -> str:
    return f"x{dividend / divisor:.2f}" if divisor > 0 else "-"


def differences(results: Results, earlier: Results) -> list[str]:
    """One sentence for each thing other than the harness that changed between two runs."""
    pairs = [(name, now, earlier.about[name]) for name, now in results.about.items() if name in earlier.about]
    return [f"The {name} is {now}, but was {before} before." for name, now, before in pairs if now != before]


def missing(results: Results, earlier: Results) -> list[str]:
    """One sentence for each figure of ``earlier`` that ``results`` lacks."""
    keys = {figure.key for figure in results.figures}
    return [f"Not measured this time: {figure.what}." for figure in earlier.figures if figure.key not in keys]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that :func:`finish` reads."""
    parser.add_argument("--rounds", type=_at_least_one, default=5, help="how often each figure is taken, default: 5")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples to FILE")
    parser.add_argument("--compare", type=_earlier, metavar="FILE", help="compare with a file that --json wrote")


def _earlier(path: str) -> Results:
    try:
        return Results.read(Path(path))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds: give 1 or more")
    return int(text)


def finish(results: Results, options: argparse.Namespace) -> int:
    """Print the results and write the file that was asked for.

    :returns: the exit status, 1 if a figure is missing.
    """
    earlier: Results | None = options.compare
    print(f"\n{', '.join(results.about.values())}\n")
    print("\n".join(table(results, earlier)), end="\n\n")
    for line in [*differences(results, earlier), *missing(results, earlier)] if earlier else []:
        print(line)
    for problem in results.problems:
        print(f"Not measured: {problem}")
    if options.json:
        results.write(options.json)
    return 1 if results.problems else 0
