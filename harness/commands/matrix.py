# SPDX-License-Identifier: GPL-2.0
"""``harness matrix``: the guest tests on many kernels."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from harness import options as shared
from harness.commands.numbers import count
from harness.errors import UsageError
from harness.host import files
from harness.host.terminal import ProgressLine, colourful

if TYPE_CHECKING:  # the other commands of harness need none of it
    from harness.matrix.executor import Executor
    from harness.matrix.outcome import Report

#: Seconds between two words about how far it is, where no terminal shows them in place.
_SELDOM = 60.0

#: The exit statuses, which are pytest's.
_AS_EXPECTED, _SURPRISES, _INTERRUPTED, WRONG_REQUEST = 0, 1, 2, 4


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "matrix",
        help="run the guest tests on many kernels, and keep the results of what has not changed",
        description="Runs the matrix that FILE describes (default: kernel_configs/matrix.toml).",
        epilog="Exit status: 0 all as expected, 1 surprises, 2 interrupted, 4 a wrong request.",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the matrix")
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="only this group; may be repeated")
    parser.add_argument("--jobs", type=count, default=1, metavar="N", help="cells side by side (default: 1)")
    parser.add_argument("--again", action="store_true", help="also run cells whose results are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the results to FILE as one HTML page")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="show what changed since a file that --json wrote")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--scheduler", default="", metavar="ADDRESS", help="run on the Dask cluster of this scheduler")
    where.add_argument(
        "--cluster", action="store_true", help="run on a Dask cluster of --jobs processes on this machine"
    )
    shared.DEBIAN_MIRROR.declare(parser.add_argument)


def run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run the command; returns its exit status."""
    try:
        return _run(chosen, progress)
    except UsageError as error:
        progress.clear()
        print(f"harness: {error}", file=sys.stderr)
        return WRONG_REQUEST
    except KeyboardInterrupt:
        return _INTERRUPTED


def _run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    from harness.matrix import definition, outcome
    from harness.matrix.run import Matrix, plan

    cells = definition.load(chosen.file or definition.DEFAULT).cells(chosen.group)
    base = outcome.from_json(chosen.compare) if chosen.compare else None
    for path in filter(None, (chosen.json, chosen.html)):
        files.check_writable(path)
    started = time.time()
    planned = plan(cells, chosen.debian_mirror, progress)
    progress.clear()
    executor = _executor(chosen)

    def tell(line: str) -> None:
        progress.clear()
        print(line, flush=True)

    matrix = Matrix(planned, executor, tell, _Seldom(progress))
    interrupted = False
    try:
        matrix.run(again=chosen.again)
    except KeyboardInterrupt:
        interrupted = True
        executor.cancel()
    finally:
        executor.cancel()
    progress.clear()
    reports = matrix.reports
    _write(reports, base, started, chosen)
    if interrupted:
        print("interrupted: the cells that were done are kept, and the same command goes on with the others")
        return _INTERRUPTED
    return _SURPRISES if any(each.surprises for each in reports) else _AS_EXPECTED


def _write(reports: list[Report], base: list[Report] | None, started: float, chosen: argparse.Namespace) -> None:
    """Show the results, and write the files that were asked for."""
    from harness.matrix import changes, outcome, page, table

    width = shutil.get_terminal_size().columns
    for line in table.lines(reports, width, table.Paint(colourful(sys.stdout))):
        print(line)
    found = changes.compare(base, reports) if base is not None else None
    if found is not None:
        print(f"\nChanges since {chosen.compare}:" if found else f"\nNo changes since {chosen.compare}.")
        for each in found:
            print(f"  {each}")
    if chosen.json:
        files.write(chosen.json, outcome.to_json(reports, started))
    if chosen.html:
        files.write(chosen.html, page.page(reports, started, found, str(chosen.compare or "")))


def _executor(chosen: argparse.Namespace) -> Executor:
    if not (chosen.scheduler or chosen.cluster):
        from harness.matrix.executor import LocalExecutor

        return LocalExecutor(chosen.jobs)
    from harness.matrix.cluster import ClusterExecutor

    return ClusterExecutor(chosen.scheduler, chosen.jobs)


class _Seldom:
    """Shows progress at once on a terminal, and once a minute elsewhere: a matrix takes hours."""

    def __init__(self, progress: ProgressLine) -> None:
        self._progress = progress
        self._last = time.monotonic()
        self._shown = ""

    def __call__(self, message: str) -> None:
        """Show how far it is."""
        due = message != self._shown if sys.stderr.isatty() else time.monotonic() - self._last >= _SELDOM
        if due:
            self._last, self._shown = time.monotonic(), message
            self._progress(message)
