# SPDX-License-Identifier: GPL-2.0
"""Runs the guest suite again and again, in random order, beside processes that use up processors and memory.

::

    make soak                                        # 20 suites: two kernels on both architectures, five times
    python -m tests.soak --rounds=1 -- guest_tests/test_flags.py

A test that fails in one run and passes in the next is a bug, of a test, of the harness or of a kernel. Each failure is
printed with the seed of its order, and its record stays in the directory that is named at the end. This is no gate.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UsageError
from harness.host.process import killed_with_parent
from harness.report import record

KERNELS = ("debian:6.12", "debian:7.3")
ARCHES = ("x86_64", "arm64")

#: Load beside the suite: one busy process for each processor, and one that fills and frees 256 MiB.
_STRESS = ("stress-ng", "--quiet", "--cpu", "0", "--vm", "1", "--vm-bytes", "256M")


@dataclass(frozen=True)
class Suite:
    """One run of the suite."""

    kernel: str
    arch: str
    #: of the order of its tests
    seed: int

    def command(self, results: Path, more: Sequence[str]) -> list[str]:
        """pytest's command line.

        :param results: where the record goes.
        :param more: arguments of the user.
        """
        order = ["--random-order-bucket=global", f"--random-order-seed={self.seed}"]
        kernel = [f"--kernel={self.kernel}", f"--arch={self.arch}", "--expect-findings"]
        return [sys.executable, "-m", "pytest", "-q", "-n", "2", *kernel, *order, f"--results={results}", *more]

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch}, seed {self.seed}"


def suites(rounds: int, first_seed: int) -> Iterator[Suite]:
    """The runs, in order; no seed comes twice."""
    combinations = [(kernel, arch) for _ in range(rounds) for kernel in KERNELS for arch in ARCHES]
    return (Suite(kernel, arch, first_seed + number) for number, (kernel, arch) in enumerate(combinations))


def surprises(results: Path) -> list[str]:
    """What a record holds that nobody expects, one line each; also that it is not complete."""
    try:
        read = record.read(results)
    except UsageError as error:
        return [str(error)]
    lines = [f"{each.test}: {each.outcome}: {each.message}" for each in read.items if each.failed]
    return lines + ([] if read.status is not None else ["the run was cut short"])


@contextmanager
def load() -> Iterator[None]:
    """Keep processors and memory busy meanwhile."""
    stress = subprocess.Popen(killed_with_parent(_STRESS, "KILL"), stdin=subprocess.DEVNULL)
    try:
        time.sleep(1)
        if stress.poll() is not None:
            raise SystemExit(f"stress-ng ended at once with status {stress.returncode}")
        yield
    finally:
        stress.terminate()
        stress.wait()


def main() -> int:
    """Run the suites; 1 if anything happened that nobody expects."""
    parser = argparse.ArgumentParser(description="Runs the guest suite again and again, under load.")
    parser.add_argument("--rounds", type=int, default=5, help="of two kernels on two architectures (default: 5)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first run (default: the time)")
    parser.add_argument("more", nargs="*", help="pytest's arguments, after --")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="soak-"))
    failed = 0
    with load():
        for number, suite in enumerate(suites(options.rounds, options.seed), 1):
            results = directory / f"{number:02}.jsonl"
            began = time.monotonic()
            subprocess.run(suite.command(results, options.more), stdout=subprocess.DEVNULL, check=False)
            found = surprises(results)
            failed += bool(found)
            average = os.getloadavg()[0]
            print(f"{number}: {suite}: {time.monotonic() - began:.0f} s, load {average:.1f}, {len(found)} surprises")
            for line in found:
                print(f"    {line}", flush=True)
    print(f"{failed} runs with surprises; records are in {directory}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
