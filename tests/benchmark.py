# SPDX-License-Identifier: GPL-2.0
"""Measures what users wait for, and how much longer the same check takes under virtme-ng.

``make bench`` installs what is needed and runs it; ``make bench KERNEL=debian:7.3 ARCH=x86_64`` chooses the kernel.
After that it can be run by hand. To see what a change does to the figures::

    .venv/bin/python tests/benchmark.py --kernel=debian:6.12 --suite --json before.json
    .venv/bin/python tests/benchmark.py --kernel=debian:6.12 --suite --json after.json --compare before.json

Use a machine that does nothing else. Figures from a busy one mean nothing, not even as ratios: our side and virtme-ng
run in turn, but they do not use the processors alike.

The table goes to standard output and can be pasted into the documentation. The column "takes" says how many times
longer virtme-ng takes for its check than we take for one test that asks the same. It is left empty where the two do not
do the same.

The exit status is 1 if a figure is missing; a line then says why. Nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import arch, paths
from harness.agent import protocol
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.errors import HarnessError, UsageError
from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.host.cache import Cache
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec, Kernel
from harness.machine import provision, qemu
from harness.machine.vm import Vm
from harness.options import MachineOptions
from tests import figures, virtme_ng
from tests.figures import Figure, MeasureError, Results, side_by_side, timed

#: The smallest check worth a kernel: does mremap() move a page?
ONE_TEST = "guest_tests/test_flags.py::test_the_flag_with_a_move"

#: Seconds after which a command that runs one check is stuck.
_ONE = 600.0

#: Seconds after which a run of the whole suite is stuck.
_SUITE = 7200.0


def run(argv: Sequence[str], seconds: float, env: Mapping[str, str] = os.environ, says: str = "") -> None:
    """Run a command in the project's directory.

    :param seconds: how long it may take.
    :param says: what its output must contain.
    :raises MeasureError: if it does not end with 0, takes longer, or does not say so.
    """
    # As on most machines: Python keeps what it compiled.
    env = {name: value for name, value in env.items() if name != "PYTHONDONTWRITEBYTECODE"}
    deadline = Deadline.after(seconds)
    # A pipe, not a file: virtme-ng's QEMU opens its output again by way of /proc, and a file would be truncated.
    with subprocess.Popen(
        argv,
        cwd=paths.PROJECT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as child:
        try:
            output, _ = child.communicate(timeout=deadline.remaining)
        except subprocess.TimeoutExpired:
            raise MeasureError(f"{shlex.join(argv)} did not end in {seconds:.0f} s") from None
        finally:
            _end(child)
    if child.returncode or says not in output:
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        raise MeasureError(f"{shlex.join(argv)} ended with {child.returncode}: {last}")


def _end(child: subprocess.Popen[str]) -> None:
    """End a command with all that it started, unless it has ended by itself."""
    if child.poll() is not None:
        return
    os.killpg(child.pid, signal.SIGINT)  # pytest ends its guests
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(Deadline.after(30).remaining)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)  # what a shell starts in the background ignores SIGINT
    child.wait()


def own_memory(guest: Guest) -> float:
    """MiB that only this guest's QEMU has: its anonymous memory, with its copies of the template's pages.

    "Private" memory would be wrong: it includes a page of the template that no other process maps at the moment.
    """
    assert isinstance(guest.vm, Vm)
    for line in Path(f"/proc/{guest.vm.child.pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) / 1024
    raise MeasureError("/proc/PID/smaps_rollup has no line 'Anonymous:'")


def run_one_test(guest: Guest) -> None:
    """Have the guest run ONE_TEST.

    :raises MeasureError: if it does not pass.
    """
    reports = list(guest.run(protocol.Run(ONE_TEST, "", "bench"), Deadline.after(60)))
    if not any(isinstance(each, dict) and each.get("outcome") == "passed" for each in reports):
        raise MeasureError(f"{ONE_TEST} did not pass in the guest: {reports}")


def clones(fleet: Fleet, rounds: int) -> list[Figure]:
    """What a fresh clone costs: until its agent answers, and with one test, beside the same test in a used guest."""
    fleet.fresh()[0].close()  # makes the template, which later runs find in the cache
    if fleet.obstacle:
        raise MeasureError(fleet.obstacle)
    starts, memory, isolated = [], [], []
    for _ in range(rounds):
        begin = time.monotonic()
        guest, _ = fleet.fresh()
        try:
            starts.append(time.monotonic() - begin)
            run_one_test(guest)
            memory.append(own_memory(guest))
        finally:
            guest.close()
        isolated.append(time.monotonic() - begin)
    # Started only now: the heartbeat of an idle guest would take processor time from the clones.
    used, _ = fleet.fresh()
    try:
        run_one_test(used)
        shared = [timed(partial(run_one_test, used)) for _ in range(rounds)]
    finally:
        used.close()
    beyond = tuple(whole - test for whole, test in zip(isolated, shared, strict=True))
    alone = "one test in a clone of its own, with starting and ending it"
    return [
        Figure("clone", "clone, from start to the agent's answer", tuple(starts)),
        Figure("isolated", alone, tuple(isolated), as_peer=True),
        Figure("isolation", "... beyond the same test in a shared guest", beyond),
        Figure("memory", "memory of a clone after a test, beyond the template", tuple(memory), "MiB"),
    ]


def clones_of(machine: qemu.Machine, rounds: int) -> list[Figure]:
    """The figures of :func:`clones` for one machine."""
    fleet = Fleet.with_library(machine, print)
    try:
        return clones(fleet, rounds)
    finally:
        fleet.close()


def commands(results: Results, ours: list[str], peer: virtme_ng.Peer | None, rounds: int) -> None:
    """Add what one check costs from the command line, with the harness and with virtme-ng."""
    actions: dict[str, Callable[[], object]] = {"pytest --kernel=…": partial(run, [*ours, ONE_TEST], _ONE)}
    if peer:
        actions[peer.name] = partial(run, peer.argv, _ONE, peer.env, virtme_ng.PASSED)
    samples = side_by_side(actions, rounds, results)
    if "pytest --kernel=…" in samples:
        what = "`pytest --kernel=… one test`, command to exit"
        results.figures.append(Figure("command", what, samples["pytest --kernel=…"], as_peer=True))
    if peer and peer.name in samples:
        what = f"{peer.name}, the same check, command to exit"
        results.figures.append(Figure(figures.PEER, what, samples[peer.name]))


def suite(ours: list[str]) -> list[Figure]:
    """What the whole suite takes, once."""
    whole = partial(run, [*ours, "-n", "2", "--expect-findings"], _SUITE)
    return [Figure("suite", "the whole suite, `-n 2`", (timed(whole),))]


def measure(kernel: Kernel, machine: qemu.Machine, options: argparse.Namespace) -> Results:
    """Take all figures for one kernel."""
    about = {
        "kernel": kernel.release,
        "architecture": str(kernel.arch),
        "accelerator": machine.accelerator.name,
        "number of processors": f"{os.cpu_count()} CPUs",
    }
    results = Results(about)
    peer = None
    try:
        cache = Cache(progress=print)
        peer = virtme_ng.prepare(kernel, machine.accelerator, cache, Archive(cache, "", print))
        about["peer"] = peer.name
    except HarnessError as error:
        results.failed("virtme-ng", error)
    print(f"load average before the first round: {os.getloadavg()[0]:.1f}")
    results.attempt("clones", lambda: clones_of(machine, options.rounds))
    ours = [sys.executable, "-m", "pytest", "-q", f"--kernel={options.kernel}", f"--arch={kernel.arch}"]
    commands(results, ours, peer, options.rounds)
    if options.suite:
        results.attempt("the whole suite", lambda: suite(ours))
    return results


def main() -> int:
    """Measure and print.

    :returns: the exit status.
    """
    parser = argparse.ArgumentParser(
        description="Measures what users wait for, and how much longer the same check takes under virtme-ng."
    )
    parser.add_argument("--kernel", default="debian:7.3", help="as for pytest, default: debian:7.3")
    parser.add_argument("--arch", help="as for pytest")
    parser.add_argument("--suite", action="store_true", help="time the whole suite as well, once")
    figures.add_options(parser)
    options = parser.parse_args()
    try:
        spec = grammar.parse(options.kernel, arch.find(options.arch) if options.arch else None)
        if not isinstance(spec, BootSpec):
            raise UsageError(f"{spec} is not booted here, so there is nothing to measure: give another --kernel")
        kernel, machine = provision.provision(spec, MachineOptions(), print)
        results = measure(kernel, machine, options)
    except HarnessError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return figures.finish(results, options)


if __name__ == "__main__":
    sys.exit(main())
