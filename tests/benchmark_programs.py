# SPDX-License-Identifier: GPL-2.0
"""Measures how many of the explorer's programs a guest runs in a minute, and what each check costs.

::

    python -m tests.benchmark_programs --kernel=debian:7.3

The same programs run in one guest in each way, in several rounds. They have only operations that every program may
have. The last line of the table, which is printed as Markdown, is that of an exploration: all operations, programs made
meanwhile, a process for each batch, and failures looked into.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from harness import arch
from harness.deadline import Deadline
from harness.explore.campaign import Campaign, Progress
from harness.explore.plan import plan
from harness.explore.runner import Runner
from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.host.terminal import ProgressLine
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec
from harness.machine import provision
from harness.options import MachineOptions
from harness.programs import generate, language
from harness.programs.language import Kind

#: seconds that the guest may take for one order
_PATIENCE: Final = 300.0
#: how the plans of one round are run
_PLANS: Final = {
    "plans, with all checks": {"walks": True, "bytes": True},
    "plans, bytes alone": {"walks": False, "bytes": True},
    "plans, walks alone": {"walks": True, "bytes": False},
    "plans, no checks": {"walks": False, "bytes": False},
}
#: how the programs of one round are run with the model
_PROGRAMS: Final = {
    "with the model": {"thorough": False},
    "with the model, thoroughly": {"thorough": True},
}


def _ask(guest: Guest, order: dict[str, Any]) -> tuple[float, int]:
    """Seconds that an order takes in the guest, and how many plans did not come true, or programs failed."""
    wait = Deadline.after(_PATIENCE)
    guest.tell(order, wait)
    said = guest.hear(wait)
    return float(said["seconds"]), int(said["untrue"])


def in_guest(fleet: Fleet, count: int, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Programs a minute, by the way they are run: one number for each round, the first of which is left out.

    :returns: also how many plans, at most, did not come true. Such a plan ends early.
    """
    guest, _ = fleet.fresh()
    found: dict[str, list[float]] = {}
    untrue = 0
    try:
        wait = Deadline.after(_PATIENCE)
        guest.call("guest_tests.explorer.speed:main", {}, wait)
        kinds = {Kind(each) for each in guest.hear(wait)["kinds"]} & generate._BASIC.keys()
        # In every round the same: the first one warms up what the processor has translated.
        generator = generate.Generator(1, kinds)
        programs = []
        while len(programs) < count:
            program = generator.next().program
            worked_out = plan(program)
            if worked_out is not None:
                programs.append((program, worked_out))
        plans = [each.to_wire() for _, each in programs]
        wire = [language.to_wire(each) for each, _ in programs[: count // 4]]
        orders = {what: {"plans": plans, **how} for what, how in _PLANS.items()}
        orders |= {what: {"programs": wire, **how} for what, how in _PROGRAMS.items()}
        for number in range(rounds + 1):
            for what, order in orders.items():
                seconds, wrong = _ask(guest, order)
                untrue = max(untrue, wrong)
                rate = len(order.get("plans", wire)) / seconds * 60
                found.setdefault(what, []).extend([rate] if number else [])
    finally:
        guest.close()
    return found, untrue


def exploring(fleet: Fleet, release: str, arch_name: str, seconds: float, say: ProgressLine) -> tuple[float, float]:
    """Programs a minute of an exploration, and the share of a processor that QEMU takes meanwhile."""
    runner = Runner(fleet)
    last = Progress()

    def tell(now: Progress) -> None:
        nonlocal last
        last = now
        say(f"exploring: {now.programs} programs")

    try:
        runner.open()
        guest = runner._guest
        assert guest is not None
        assert guest.vm is not None
        pid = guest.vm.child.pid
        used, began = _processor_seconds(pid), time.monotonic()
        Campaign(runner, 1, release, arch_name, tell, lambda one: None).run(Deadline.after(seconds))
        took = time.monotonic() - began
        # A failure costs the guest, and what it used cannot be read any more.
        share = (_processor_seconds(pid) - used) / took if runner._guest is guest else float("nan")
    finally:
        runner.close()
    return last.programs / took * 60, share


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(what: str, rates: Sequence[float]) -> str:
    """A line of the table."""
    return f"| {what} | {statistics.median(rates):.0f} | {min(rates):.0f}-{max(rates):.0f} |"


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measures how many programs a guest runs in a minute.")
    parser.add_argument("--kernel", required=True)
    parser.add_argument("--arch", default="x86_64")
    parser.add_argument("--programs", type=int, default=1000, help="in each round (default: 1000)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the exploration (default: 60)")
    chosen = parser.parse_args()
    spec = grammar.parse(chosen.kernel, arch.find(chosen.arch))
    assert isinstance(spec, BootSpec)
    say = ProgressLine.on(sys.stderr)
    kernel, machine = provision.provision(spec, MachineOptions(), say)
    fleet = Fleet.with_library(machine, say)
    try:
        rates, untrue = in_guest(fleet, chosen.programs, chosen.rounds)
        rate, share = exploring(fleet, kernel.release, chosen.arch, chosen.seconds, say)
    finally:
        fleet.close()
    say.clear()
    print("| how | programs a minute | range |", "|---|---|---|", sep="\n")
    for what, each in rates.items():
        print(row(what, each))
    print(row("exploring", [rate]))
    print(f"\n{untrue} of {chosen.programs} plans did not come true, and ended early.")
    print(f"While exploring, QEMU took {share:.0%} of a processor.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
