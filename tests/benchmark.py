# SPDX-License-Identifier: GPL-2.0
"""Measures how long users wait, next to virtme-ng on the same kernel in the same run.

Run it by hand on a quiet machine: ``.venv/bin/python tests/benchmark.py --kernel=debian:7.3``. It prints medians and
ranges as the table in ``docs/benchmarks.md``. It is not a test: nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness import arch
from harness.agent import protocol
from harness.deadline import Deadline
from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec, Kernel
from harness.machine import payload, provision
from harness.machine.payload import LIBRARY
from harness.markers import MARKERS

#: The smallest check worth a kernel: does mremap() move a page?
ONE_TEST = "guest_tests/test_flags.py::test_the_flag_with_a_move"
SAME_FOR_VNG = (
    "import ctypes,mmap;libc=ctypes.CDLL(None);m=mmap.mmap(-1,8192);"
    "a=ctypes.addressof(ctypes.c_char.from_buffer(m));libc.mremap.restype=ctypes.c_void_p;"
    "assert libc.mremap(ctypes.c_void_p(a),4096,8192,1);print('moved')"
)


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    #: seconds (or MiB) of each round
    samples: tuple[float, ...]
    unit: str = "s"

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.samples)

    def __str__(self) -> str:
        low, high = min(self.samples), max(self.samples)
        return f"| {self.what} | {self.median:.2f} {self.unit} | {low:.2f}-{high:.2f} | {len(self.samples)} |"


def timed(action: Callable[[], object]) -> float:
    """Seconds of wall time."""
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def run(argv: list[str], success: str = "") -> None:
    """Run a command that must succeed: end with 0, or say ``success``."""
    # As on most machines: Python keeps what it compiled.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
    )
    if success not in done.stdout + done.stderr if success else done.returncode:
        sys.exit(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def pytest_command(kernel: str, *more: str) -> list[str]:
    """Our command line, as a user types it."""
    return [sys.executable, "-m", "pytest", "-q", f"--kernel={kernel}", *more]


def vng_command(kernel: Kernel) -> list[str] | None:
    """The peer's command line; None if it is not installed."""
    program = shutil.which("vng", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None or kernel.modules is None:
        return None
    # virtme-ng looks for the modules where a distribution installs them.
    installed = Path("/lib/modules") / kernel.release
    if not installed.exists():
        print(f"virtme-ng needs {installed}: ln -s {kernel.modules.directory} {installed} && depmod {kernel.release}")
        return None
    # It joins its arguments to a line for the guest's shell. On Debian's kernels it does not learn the script's status,
    # and ends with 255 whatever happened: what its verbose console says has to do.
    check = shlex.join(["python3", "-c", SAME_FOR_VNG])
    return [program, "--disable-kvm", "--verbose", "-r", str(kernel.boot_image), "--", check]


def own_memory(guest: Guest) -> float:
    """MiB that only this guest's QEMU has: its anonymous memory, copies of the template's pages among it.

    Not "private" memory: a page of the template that no other process happens to map counts as that.
    """
    for line in Path(f"/proc/{guest.vm.child.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("smaps_rollup has no line 'Anonymous:'")


def run_one_test(guest: Guest) -> None:
    """Have the guest run ONE_TEST."""
    reports = list(guest.run(protocol.Run(ONE_TEST, "", "bench"), Deadline.after(60)))
    assert any(isinstance(each, dict) and each.get("outcome") == "passed" for each in reports), reports


def clones(fleet: Fleet, rounds: int) -> list[Figure]:
    """What a fresh clone costs: until its agent answers, with a test, against the same test in a guest in use."""
    starts, memory, isolated, shared = [], [], [], []
    for _ in range(rounds):
        begin = time.monotonic()
        guest, _ = fleet.fresh()
        starts.append(time.monotonic() - begin)
        run_one_test(guest)
        memory.append(own_memory(guest))
        guest.vm.close()
        isolated.append(time.monotonic() - begin)
    used, _ = fleet.fresh()  # not before: a guest that idles has a heartbeat, too
    run_one_test(used)
    shared += [timed(lambda: run_one_test(used)) for _ in range(rounds)]
    used.vm.close()
    more = tuple(alone - together for alone, together in zip(isolated, shared, strict=True))
    return [
        Figure("clone, from start to the agent's answer", tuple(starts)),
        Figure("one test in a clone of its own, with starting and ending it", tuple(isolated)),
        Figure("... beyond the same test in a shared guest", more),
        Figure("memory of a clone after a test, beyond the template", tuple(memory), "MiB"),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", default="debian:7.3")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--suite", action="store_true", help="time the whole suite as well")
    options = parser.parse_args()
    spec = grammar.parse(options.kernel, arch.host())
    assert isinstance(spec, BootSpec)
    kernel, machine = provision.provision(spec, provision.Options(), print)
    fleet = Fleet(machine, payload.tests_archive(LIBRARY, MARKERS), ["guest_tests", "--tb=auto"], False, print)
    print(f"\n{kernel.release}, {machine.accelerator.name}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    figures = clones(fleet, options.rounds)
    one = pytest_command(options.kernel, ONE_TEST)
    run(one)  # warm the caches
    peer = vng_command(kernel)
    ours, theirs = [], []
    for _ in range(options.rounds):  # side by side, so that both see the same machine
        ours.append(timed(lambda: run(one)))
        if peer:
            theirs.append(timed(lambda: run(peer, "script exited with code 0")))
    figures.append(Figure("`pytest --kernel=… one test`, command to exit", tuple(ours)))
    if theirs:
        figures.append(Figure("virtme-ng, one Python check on that kernel", tuple(theirs)))
    if options.suite:
        figures.append(
            Figure(
                "the whole suite, `-n 2`",
                (timed(lambda: run(pytest_command(options.kernel, "-n", "2", "--expect-findings"))),),
            )
        )
    print("| what | median | range | rounds |\n|---|---|---|---|")
    for figure in figures:
        print(figure)
    if theirs:
        print(f"\nvirtme-ng takes {statistics.median(theirs) / statistics.median(ours):.1f} times as long.")


if __name__ == "__main__":
    main()
