# SPDX-License-Identifier: GPL-2.0
"""``harness explore``: makes programs that move memory, and looks for those that a kernel gets wrong."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from harness import options as shared
from harness.commands.numbers import minutes
from harness.deadline import Deadline
from harness.errors import UsageError
from harness.explore import files
from harness.explore.campaign import RACES, Campaign, Found, Progress
from harness.explore.corpus import Corpus
from harness.explore.differences import Comparison, Difference
from harness.explore.runner import Batch, Runner
from harness.explore.story import story
from harness.guests.fleet import Fleet
from harness.host import safe_text
from harness.host.files import check_creatable
from harness.host.terminal import ProgressLine
from harness.kernels.kernel import BootSpec, Kernel, SshSpec
from harness.machine import provision
from harness.options import MachineOptions
from harness.programs.language import Kind, Program

if TYPE_CHECKING:  # drgn takes a third of a second to import
    from harness.audit.live import Auditor

#: CPUs of a guest in which another process races with programs.
_RACE_CPUS = 2

#: The exit statuses, which are pytest's.
_NOTHING, _FAILURES, _INTERRUPTED = 0, 1, 2


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "explore",
        help="make programs that move memory, run them on a kernel, and shrink those that it gets wrong",
        description="Makes programs, runs them in a guest, checks the bytes and the reverse map of each page, and "
        "shrinks what fails. docs/explore.md describes it.",
        epilog="Exit status: 0 nothing new was found, 1 failures were found, 2 interrupted.",
    )
    shared.KERNEL.declare(parser.add_argument, required=True)
    shared.ARCH.declare(parser.add_argument, action="store", default=None)
    parser.add_argument("--minutes", type=minutes, default=1.0, metavar="N", help="how long (default: 1)")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="make the programs of an earlier run again")
    parser.add_argument(
        "--save",
        type=Path,
        default=None,
        metavar="DIR",
        help="where failures are saved (default: explored; with --replay, nowhere)",
    )
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run one saved program, and say what it shows")
    parser.add_argument(
        "--races",
        action="store_true",
        help="have another process migrate, reclaim and merge the memory of each program while it runs; guests have "
        "two CPUs",
    )
    parser.add_argument(
        "--audit",
        action="store_true",
        help="also audit the reverse map of memory that programs leave: of one program in a hundred, and of each that "
        "fails (fetches the debug information of Debian kernels, 350 MB, once)",
    )
    for option in shared.MACHINE:
        option.declare(parser.add_argument)


def run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run the command; returns its exit status."""
    specs = [_spec(each, chosen.arch) for each in chosen.kernel]
    program = files.read(chosen.replay) if chosen.replay else None
    if len(specs) > (1 if program is not None else 2):
        raise UsageError("one kernel can be explored, or two compared; --replay takes one")
    if chosen.races:
        if len(specs) > 1:
            raise UsageError("--races explores one kernel: a race need not end in the same way on two")
        chosen.guest_cpus = max(chosen.guest_cpus, _RACE_CPUS)
    if chosen.audit and len(specs) > 1:
        raise UsageError("--audit explores one kernel: what two kernels leave is compared without it")
    save = chosen.save or (None if program is not None else Path("explored"))
    if save is not None:
        check_creatable(save)
    chosen.save = save
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(each, chosen, progress)) for each in specs]
        progress.clear()
        for kernel, accelerator, runner in opened:
            print(f"Kernel {kernel.release} ({kernel.arch}, {accelerator})")
            if left_out := [kind for kind in Kind if kind not in runner.kinds]:
                print(f"Left out, because this kernel lacks it: {', '.join(left_out)}")
        (kernel, _, runner), *others = opened
        if program is not None:
            return _replay(runner, program, kernel, chosen)
        return (
            _compare(runner, others[0][2], chosen, progress) if others else _explore(runner, kernel, chosen, progress)
        )


def _spec(text: str, architecture: str | None) -> BootSpec:
    from harness import arch
    from harness.kernels import grammar

    spec = grammar.parse(text, arch.find(architecture) if architecture else None)
    if isinstance(spec, SshSpec):
        raise UsageError(f"{spec} is no virtual machine: programs that damage a kernel are run in guests only")
    return spec


@contextmanager
def _opened(spec: BootSpec, chosen: argparse.Namespace, progress: ProgressLine) -> Iterator[tuple[Kernel, str, Runner]]:
    """A kernel, the name of the accelerator that it runs with, and what runs programs on it."""
    machine_options = MachineOptions.of(vars(chosen))
    kernel, machine = provision.provision(spec, machine_options, progress)
    auditor = _auditor(kernel, machine_options, progress) if chosen.audit else None
    fleet = Fleet.with_library(machine, progress, chosen.mutant)
    runner = Runner(fleet, auditor)
    try:
        runner.open()
        yield kernel, machine.accelerator.name, runner
    finally:
        runner.close()
        fleet.close()


def _auditor(kernel: Kernel, options: MachineOptions, progress: ProgressLine) -> Auditor:
    from harness.audit import live

    auditor = live.auditor(kernel, options, progress)
    if not auditor.able:
        raise UsageError(f"cannot audit: {auditor.obstacle}")
    return auditor


def _compare(first: Runner, second: Runner, chosen: argparse.Namespace, progress: ProgressLine) -> int:
    seed = _seed(chosen)

    def tell(programs: int, differences: int) -> None:
        progress(f"{programs} programs on both kernels, {differences} differences")

    def found(one: Difference) -> None:
        progress.clear()
        print(f"\nDIFFERENCE: {one.text}")
        print(_listing(one.program, list(one.outcomes[0].errors)), flush=True)

    comparison = Comparison((first, second), seed, tell, found)
    interrupted = False
    try:
        comparison.run(Deadline.after(chosen.minutes * 60))
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    print(
        f"\n{comparison.programs} programs on both kernels in {comparison.seconds:.0f} s. {comparison.different} "
        f"differed, in {len(comparison.differences)} ways. {comparison.failed} failed: explore each kernel by "
        "itself."
    )
    return _INTERRUPTED if interrupted else _FAILURES if comparison.differences else _NOTHING


def _seed(chosen: argparse.Namespace) -> int:
    """What the programs are made from; says so, together with how long."""
    seed = chosen.seed if chosen.seed is not None else secrets.randbelow(1 << 32)
    print(f"Seed {seed}, {chosen.minutes:g} minutes", flush=True)
    return int(seed)


def _explore(runner: Runner, kernel: Kernel, chosen: argparse.Namespace, progress: ProgressLine) -> int:
    seed = _seed(chosen)

    def tell(now: Progress) -> None:
        progress(
            f"{now.programs} programs, {now.rate:.0f} a minute; {now.walked} pages walked, "
            f"{now.situations} situations, {len(now.new)} failures"
        )

    def found(one: Found) -> None:
        progress.clear()
        saved = files.save(one, chosen.save, f"seed {seed}")
        what = f"Known finding {one.known}" if one.known else "FAILURE"
        print(f"\n{what} after {one.after:.1f} s: {story(one.program, one.errors).counted(one.failure.text)}")
        print(_listing(one.program, one.errors))
        if one.failure.audit:
            print(f"The audit says:\n{one.failure.audit}")
        if one.runs:
            print(f"A race: it failed in run {one.runs} of up to {RACES}.")
        print(f"saved as {', '.join(map(str, saved))}", flush=True)

    release = safe_text.escape(kernel.release)
    # A run with a seed is to be the same again. Races are too slow to begin with thousands of programs.
    corpus = Corpus(runner.kinds) if chosen.seed is None and not chosen.races else None
    earlier = corpus.read() if corpus is not None else []
    if earlier:
        print(f"{len(earlier)} programs of earlier runs come first", flush=True)
    campaign = Campaign(runner, seed, release, str(kernel.arch), tell, found, earlier=earlier, races=chosen.races)
    interrupted = False
    try:
        campaign.run(Deadline.after(chosen.minutes * 60))
    except KeyboardInterrupt:
        interrupted = True
    progress.clear()
    if corpus is not None:
        corpus.write(campaign.best.programs())
    print(_summary(campaign.progress))
    if runner.audits_programs:
        print(f"{runner.audits} audits.")
    return _INTERRUPTED if interrupted else _FAILURES if campaign.progress.new else _NOTHING


def _summary(now: Progress) -> str:
    lines = [
        f"\n{now.programs} programs, {now.operations} operations in {now.seconds:.0f} s: {now.rate:.0f} programs a "
        f"minute. {now.walked} pages were seen to follow a forced walk. {now.situations} situations."
    ]
    if now.unable:
        lines.append(f"{now.unable} programs could not be walked: no page could be moved to another node then.")
    if now.unconfirmed:
        lines.append(f"{now.unconfirmed} programs failed once and not again in a fresh guest.")
    for one in now.found.values():
        times = "once" if one.times == 1 else f"{one.times} times"
        name = f"finding {one.known}, " if one.known else ""
        lines.append(f"  {name}{times}: {' / '.join(one.shape)}")
    if not now.new:
        lines.append("Nothing new was found." if now.found else "No failure was found.")
    return "\n".join(lines)


def _replay(runner: Runner, program: Program, kernel: Kernel, chosen: argparse.Namespace) -> int:
    runs = RACES if chosen.races else 1
    rival = (chosen.seed or 0) if chosen.races else None
    batch: Batch = runner.run([program] * runs, thorough=True, rival=rival)
    print(_listing(program, batch.errors))
    if batch.failure is None:
        often = f" in each of {runs} runs" if chosen.races else ""
        print(f"It passes{often}: the bytes, the walks, the layout and the accounts are as they should be.")
        return _NOTHING
    often = f", in run {batch.done} of up to {runs}" if chosen.races else ""
    print(f"FAILURE ({batch.failure.oracle}{often}): {story(program, batch.errors).counted(batch.failure.text)}")
    if batch.failure.audit:
        print(f"The audit says:\n{batch.failure.audit}")
    if batch.failure.console:
        print(batch.failure.console, file=sys.stderr)
    if chosen.save is not None:
        runs = batch.done if chosen.races else 0
        found = Found(program, batch.failure, batch.errors, safe_text.escape(kernel.release), runs=runs)
        print(f"saved as {', '.join(map(str, files.save(found, chosen.save, 'a replay')))}")
    return _FAILURES


def _listing(program: Program, errors: list[int]) -> str:
    """The operations of a program, and how each ended."""
    shown = []
    for number, each in enumerate(program):
        error = errors[number] if number < len(errors) else None
        how = "" if error == 0 else " (not reached)" if error is None else _refusal(error)
        shown.append(f"  {number + 1:2} {each}{how}")
    return "\n".join(shown)


def _refusal(error: int) -> str:
    return " (skipped)" if error == -1 else f" (refused: {os.strerror(error)})"
