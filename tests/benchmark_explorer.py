# SPDX-License-Identifier: GPL-2.0
"""Measures how long the explorer takes to find mutants, and to how many operations it shrinks them.

::

    python -m tests.benchmark_explorer --kernel=relocate-anon:mutants stale-index stale-anon-vma

Each mutant is looked for with three seeds. The table, which is printed as Markdown, holds medians. A mutant that is not
found in time with most of the seeds is "not found".
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass

from harness import arch
from harness.deadline import Deadline
from harness.explore.campaign import Campaign, Found
from harness.explore.runner import Runner
from harness.guests.fleet import Fleet
from harness.host.terminal import ProgressLine
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec
from harness.machine import provision
from harness.options import MachineOptions


@dataclass(frozen=True)
class Run:
    """One seed."""

    #: seconds until a program failed
    found: float
    #: seconds until it was confirmed and shrunk
    shrunk: float
    #: how many operations are left
    operations: int
    check: str


class _Enough(Exception):
    """Ends a campaign at its first failure."""


def look(spec: BootSpec, mutant: str, seed: int, minutes: float, progress: ProgressLine) -> Run | None:
    """Explore until something fails.

    :returns: None if nothing did in time.
    """
    kernel, machine = provision.provision(spec, MachineOptions(mutant=mutant), progress)
    fleet = Fleet.with_library(machine, progress, mutant)
    runner = Runner(fleet)
    began = time.monotonic()
    runs: list[Run] = []

    def found(one: Found) -> None:
        if not one.known:
            runs.append(Run(one.after, time.monotonic() - began, len(one.program), one.failure.oracle))
            raise _Enough

    try:
        runner.open()
        began = time.monotonic()
        Campaign(runner, seed, kernel.release, str(kernel.arch), lambda now: None, found).run(
            Deadline.after(minutes * 60)
        )
    except _Enough:
        pass
    finally:
        runner.close()
        fleet.close()
    return runs[0] if runs else None


def row(mutant: str, runs: list[Run | None]) -> str:
    """The line of the table."""
    seen = [each for each in runs if each is not None]
    if len(seen) * 2 <= len(runs):
        return f"| `{mutant}` | not found ({len(seen)} of {len(runs)}) | | | |"
    found, shrunk = (statistics.median(values) for values in ([e.found for e in seen], [e.shrunk for e in seen]))
    operations = statistics.median(each.operations for each in seen)
    checks = ", ".join(dict.fromkeys(each.check for each in seen))
    return f"| `{mutant}` | {found:.1f} s ({len(seen)} of {len(runs)}) | {shrunk:.1f} s | {operations:.0f} | {checks} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measures how long the explorer takes to find mutants.")
    parser.add_argument("mutants", nargs="+")
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--arch", default="x86_64")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each mutant and seed (default: 2)")
    chosen = parser.parse_args()
    spec = grammar.parse(chosen.kernel, arch.find(chosen.arch))
    assert isinstance(spec, BootSpec)
    progress = ProgressLine.on(sys.stderr)
    print("| mutant | found after | shrunk after | operations | check |", "|---|---|---|---|---|", sep="\n")
    for mutant in chosen.mutants:
        runs = [look(spec, mutant, seed, chosen.minutes, progress) for seed in range(1, chosen.seeds + 1)]
        progress.clear()
        print(row(mutant, runs), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
