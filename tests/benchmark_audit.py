# SPDX-License-Identifier: GPL-2.0
"""Measures how long an audit takes, in place and from dumps, and how much memory it needs.

Run it by hand, on an idle machine: ``.venv/bin/python tests/benchmark_audit.py --kernel=unpatched:fast:dwarf``. It
prints medians as a table for the README. The guest runs the scene of ``tests/audit_scene.py``, and a process that fills
``--pages`` further pages. No other tool does the same. The figures can be compared with the time that QEMU's
``dump-guest-memory`` takes for a raw copy of the guest's memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import arch
from harness.audit import debuginfo, dump, walk
from harness.audit.layout import Layout
from harness.audit.result import Audit
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels import grammar, kernel
from harness.machine.vm import Vm
from tests.audit_scene import standing
from tests.benchmark import Figure, timed


@contextmanager
def layout_and_guest(spec: str, machine: str, pages: int) -> Iterator[tuple[Layout, Vm]]:
    """The structure layout of a kernel, and a running guest with that kernel."""
    archive = Archive(Cache(progress=print))
    chosen = grammar.parse(spec, arch.find(machine))
    assert isinstance(chosen, kernel.BootSpec)
    layout = debuginfo.layout_of(chosen.resolve(archive.cache, archive), archive, fetch=True)
    with standing(spec, machine, pages) as (vm, _):
        yield layout, vm


def audit_command(path: Path) -> float:
    """Run ``harness audit`` on a dump; returns its peak memory in MiB, with the interpreter and all imports."""
    child = subprocess.Popen(
        [sys.executable, "-m", "harness.commands.cli", "audit", str(path)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, status
    return usage.ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="debian:7.3")
    parser.add_argument("--arch", default=arch.host().name)
    parser.add_argument("--pages", type=int, default=4000, help="anonymous pages to add to those of the scene")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with (
        layout_and_guest(options.kernel, options.arch, options.pages) as (layout, vm),
        tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
    ):
        path = Path(directory) / "dump"
        seen: list[Audit] = []

        def in_place() -> None:
            with dump.memory_of(vm, Deadline.after(600)) as image:
                seen.append(walk.audit(image, layout))

        def copy() -> None:
            path.unlink(missing_ok=True)
            dump.take(vm, path, Deadline.after(600))

        in_place()
        here = [timed(in_place) for _ in range(options.rounds)]
        copies, read, most = [], [], []
        for _ in range(options.rounds):
            copies.append(timed(copy))
            read.append(timed(lambda: most.append(audit_command(path))))
        last = seen[-1]
        assert not last.errors, last.report()
        counts = last.counts
        entries = counts.anonymous + counts.other + counts.swap
        figures = [
            Figure("guest frozen, audited in place, and running again", tuple(here)),
            Figure("raw dump of its whole memory, to tmpfs", tuple(copies)),
            Figure("`harness audit` of that dump", tuple(read)),
            Figure("memory `harness audit` takes at most", tuple(most), "MiB"),
        ]
    print(f"\n{last.release} {options.arch}: {vm.machine.memory} MiB, {counts.processes} processes, {counts.vmas} VMAs")
    print(f"{counts.anonymous} anonymous entries of {entries} present, load {os.getloadavg()[0]:.1f}\n")
    print("| what | median | range | rounds |\n|---|---|---|---|")
    for figure in figures:
        print(figure)
    print(f"\n{60 * entries / statistics.median(here):,.0f} entries a minute in place")


if __name__ == "__main__":
    main()
