# SPDX-License-Identifier: GPL-2.0
"""Measures how long an audit takes, in place and from dumps, and how much memory it needs.

Run by hand, on a machine that does nothing else, for a kernel that has its debug information (or fetch it)::

    .venv/bin/python tests/benchmark_audit.py --kernel=unpatched:fast:dwarf --json before.json
    .venv/bin/python tests/benchmark_audit.py --kernel=unpatched:fast:dwarf --compare before.json

The guest has the scene of ``tests/audit_scene.py``, and a process that fills ``--pages`` more pages. No other program
does what the audit does. Compare its figures with that of a raw copy of the guest's memory, which is what QEMU's
``dump-guest-memory`` makes. The exit status is 1 if a figure is missing.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import arch
from harness.audit import debuginfo, dump, walk
from harness.audit.layout import Layout
from harness.audit.result import Audit
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.errors import HarnessError
from harness.host.cache import Cache
from harness.kernels import grammar, kernel
from harness.machine.vm import Vm
from tests import figures
from tests.audit_scene import standing
from tests.benchmark import run
from tests.figures import Figure, MeasureError, Results, timed


@contextmanager
def layout_and_guest(spec: str, machine: str, pages: int) -> Iterator[tuple[Layout, Vm]]:
    """The structure layout of a kernel, and a running guest with that kernel."""
    archive = Archive(Cache(progress=print))
    chosen = grammar.parse(spec, arch.find(machine))
    assert isinstance(chosen, kernel.BootSpec)
    layout = debuginfo.layout_of(chosen.resolve(archive.cache, archive), archive, fetch=True)
    with standing(spec, machine, pages) as (vm, _):
        yield layout, vm


#: Runs a command and prints the KiB it took at most. The kernel starts the count of a new program with the memory of
#: the process that started it (exec_mmap() in fs/exec.c), so that one must be small.
_SMALL_PARENT = (
    "import resource, subprocess, sys; subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True);"
    "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


def most_memory(argv: Sequence[str]) -> float:
    """Run a command.

    :returns: the MiB it took at most, interpreter and imports included.
    :raises MeasureError: if it fails.
    """
    done = subprocess.run([sys.executable, "-c", _SMALL_PARENT, *argv], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MeasureError(f"{shlex.join(argv)} failed")
    return int(done.stdout) / 1024


def measured(vm: Vm, layout: Layout, rounds: int, directory: Path) -> tuple[list[Figure], Audit]:
    """All figures of one guest, and what the audit saw in it at the end.

    :raises MeasureError: if an audit fails, or finds something in a guest where nothing is wrong.
    """
    path = directory / "dump"
    seen: list[Audit] = []

    def in_place() -> None:
        with dump.memory_of(vm, Deadline.after(600)) as image:
            seen.append(walk.audit(image, layout))

    def copy() -> None:
        path.unlink(missing_ok=True)
        dump.take(vm, path, Deadline.after(600))

    audit_dump = [sys.executable, "-m", "harness.commands.cli", "audit", str(path)]
    in_place()
    here = [timed(in_place) for _ in range(rounds)]
    copies, read, most = [], [], []
    for _ in range(rounds):
        copies.append(timed(copy))
        read.append(timed(lambda: run(audit_dump, 600)))
        most.append(most_memory(audit_dump))
    if seen[-1].errors:
        raise MeasureError(f"the audit found errors where there are none:\n{seen[-1].report()}")
    taken = [
        Figure("in-place", "guest frozen, audited in place, and running again", tuple(here)),
        Figure("copy", "raw dump of its whole memory, to tmpfs", tuple(copies)),
        Figure("from-dump", "`harness audit` of that dump", tuple(read)),
        Figure("memory", "memory `harness audit` takes at most", tuple(most), "MiB"),
    ]
    return taken, seen[-1]


def main() -> int:
    """Measure and print.

    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(description="Measures the audit of a guest's reverse map.")
    parser.add_argument("--kernel", default="debian:7.3")
    parser.add_argument("--arch", default=arch.host().name)
    parser.add_argument("--pages", type=int, default=4000, help="anonymous pages of a process, beyond what runs anyway")
    figures.add_options(parser)
    options = parser.parse_args()
    try:
        with (
            layout_and_guest(options.kernel, options.arch, options.pages) as (layout, vm),
            tempfile.TemporaryDirectory(dir="/dev/shm") as directory,
        ):
            taken, last = measured(vm, layout, options.rounds, Path(directory))
            accelerator = vm.machine.accelerator.name
    except HarnessError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    counts = last.counts
    entries = counts.anonymous + counts.other + counts.swap
    about = {
        "kernel": last.release,
        "architecture": options.arch,
        "accelerator": accelerator,
        "number of pages to fill": f"{options.pages} pages to fill",
    }
    print(f"\n{vm.machine.memory} MiB, {counts.processes} processes, {counts.vmas} VMAs")
    print(f"{counts.anonymous} anonymous entries of {entries} present, load {os.getloadavg()[0]:.1f}")
    print(f"{60 * entries / taken[0].median:,.0f} entries a minute in place")
    return figures.finish(Results(about, taken), options)


if __name__ == "__main__":
    sys.exit(main())
