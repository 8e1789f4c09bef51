# SPDX-License-Identifier: GPL-2.0
"""``harness mutants``: runs the guest tests against deliberate bugs, and says which they notice."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness import options as shared
from harness.commands.numbers import count
from harness.errors import UsageError
from harness.host import files
from harness.host.terminal import ProgressLine, colourful

if TYPE_CHECKING:  # the other commands of harness need none of it
    from harness.build.mutants import Mutant
    from harness.kernels.built import BuildSpec
    from harness.matrix.definition import Cell
    from harness.matrix.executor import LocalExecutor
    from harness.mutants.baseline import Baseline
    from harness.mutants.outcome import Result, Score

#: The exit statuses, which are pytest's.
_ALL_KILLED, _SURVIVORS, _INTERRUPTED = 0, 1, 2

#: The width of what is no terminal.
_NOT_CLIPPED = 1 << 16

#: The preset that compiles mutants in.
_PRESET = "mutants"

#: The preset that an audit needs.
_DEBUG_INFORMATION = "dwarf"


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "mutants",
        help="run the guest tests against deliberate bugs of a kernel, and say which they notice",
        description="Builds a kernel with all mutants of kernel_configs/mutants/, of which one at a time is active, "
        "and runs the guest tests against each until one fails. docs/mutants.md describes it.",
        epilog="Exit status: 0 every mutant was killed, 1 some were not, 2 interrupted.",
    )
    shared.KERNEL.declare(parser.add_argument, required=True, help="unpatched or relocate-anon; may be repeated")
    shared.ARCH.declare(parser.add_argument, action="store", default="")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this mutant; may be repeated")
    parser.add_argument("--group", action="append", default=[], metavar="NAME", help="only this group; may be repeated")
    parser.add_argument("--sample", action="store_true", help="only the mutants of the sample, and only their tests")
    parser.add_argument("--all", action="store_true", help="run all tests against each mutant, not until one fails")
    parser.add_argument("--audit", action="store_true", help="audit kernel memory too, and say what the audit notices")
    parser.add_argument("--list", action="store_true", help="list the mutants, and run nothing")
    parser.add_argument("--jobs", type=count, default=2, metavar="N", help="mutants side by side (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the results to FILE as one HTML page")
    shared.DEBIAN_MIRROR.declare(parser.add_argument)


def run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run the command; returns its exit status."""
    from harness.matrix.table import Paint
    from harness.mutants import outcome, page, table

    for path in filter(None, (chosen.json, chosen.html)):
        files.check_writable(path)
    started = time.time()
    scores: list[Score] = []
    known: dict[str, Mutant] = {}
    interrupted = False
    try:
        for text in chosen.kernel:
            spec, mutants = _mutants(text, chosen)
            known |= {each.name: each for each in mutants}
            if chosen.list:
                print("\n".join((f"{spec.name.variant}:", *table.names(mutants), "")))
                continue
            scores.append(_score(spec, mutants, chosen, progress))
            interrupted = any(each.state is outcome.State.NOT_RUN for each in scores[-1].results)
            if interrupted:
                break
    finally:
        progress.clear()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _NOT_CLIPPED
    for score in scores:
        for line in table.lines(score, known, width, Paint(colourful(sys.stdout))):
            print(line)
        if chosen.all and (idle := table.idle(score)):
            print(f"Each mutant that these notice, another module notices too: {', '.join(map(table.short, idle))}.")
    if chosen.json:
        files.write(chosen.json, outcome.to_json(scores, started))
    if chosen.html:
        files.write(chosen.html, page.page(scores, known, started))
    if interrupted:
        return _INTERRUPTED
    lacking = any(each.state in table.OPEN for score in scores for each in score.results)
    return _SURVIVORS if lacking else _ALL_KILLED


def _mutants(text: str, chosen: argparse.Namespace) -> tuple[BuildSpec, list[Mutant]]:
    """A kernel with mutants, and those that were asked for.

    :raises UsageError: if it has none, or none of them was asked for.
    """
    from harness import arch
    from harness.kernels import grammar
    from harness.kernels.built import BuildSpec

    presets = [_PRESET, *([_DEBUG_INFORMATION] if chosen.audit else [])]
    named = ":".join((text, *(each for each in presets if each not in text.split(":"))))
    spec = grammar.parse(named, arch.find(chosen.arch) if chosen.arch else None)
    mutants = spec.mutants() if isinstance(spec, BuildSpec) else None
    if not isinstance(spec, BuildSpec) or mutants is None:
        raise UsageError(f"{text} is not built here and has no mutants: use unpatched or relocate-anon")
    for name in chosen.only:
        mutants.find(name)
    found = [
        each
        for each in mutants.all
        if each.changes(str(spec.arch))
        if (not chosen.only or each.name in chosen.only)
        if (not chosen.group or each.group in chosen.group)
        if not chosen.sample or each.sample
    ]
    if not found:
        raise UsageError("no mutant was asked for: harness mutants --list shows them and their groups")
    return spec, found


def _score(spec: BuildSpec, mutants: Sequence[Mutant], chosen: argparse.Namespace, progress: ProgressLine) -> Score:
    from harness.matrix.executor import LocalExecutor
    from harness.mutants import table
    from harness.mutants.order import History
    from harness.mutants.outcome import Score
    from harness.mutants.scoring import Scoring, cell_of

    tests = sorted({test for each in mutants for test in each.sample}) if chosen.sample else []
    cell = cell_of(spec, tests, audit=chosen.audit)
    executor = LocalExecutor(chosen.jobs)
    history = History()

    def tell(result: Result) -> None:
        progress.clear()
        print(table.line(result), flush=True)

    try:
        before = _baseline(cell, executor, chosen.debian_mirror, progress)
        scoring = Scoring(
            cell,
            mutants,
            before,
            executor,
            history,
            everything=chosen.all,
            audit=chosen.audit,
            tell=tell,
            progress=progress,
        )
        try:
            scoring.run()
        except KeyboardInterrupt:
            executor.cancel()
        return Score(
            kernel=spec.name.variant,
            arch=str(spec.arch),
            release=before.release,
            accelerator=before.accelerator,
            results=scoring.results,
            audited=chosen.audit,
        )
    finally:
        executor.cancel()
        history.keep()


def _baseline(cell: Cell, executor: LocalExecutor, mirror: str, progress: ProgressLine) -> Baseline:
    """The tests without any mutant; kept from an earlier run if nothing has changed since."""
    from harness.debian.apt import Archive
    from harness.host.cache import Cache
    from harness.machine import provision
    from harness.matrix import keys
    from harness.matrix.run import Planned
    from harness.matrix.store import ResultStore
    from harness.mutants import scoring
    from harness.options import MachineOptions

    # Building the kernel here, so that its progress is seen and a mutant that does not compile ends the command.
    provision.provision(cell.spec, MachineOptions(debian_mirror=mirror), progress)
    cache = Cache(progress=progress)
    identity = keys.identity(cell, cache, Archive(cache, mirror, progress))
    key, store = keys.key(identity), ResultStore()
    if (kept := store.get(key)) is not None:
        return scoring.check(kept)
    executor.submit(Planned(cell, key, identity).task)
    done = 0

    def tick() -> None:
        nonlocal done
        done = max([done, *(each.tests for each in executor.under_way().values())])
        progress(f"the tests without mutants: {done} so far")

    (ended,) = executor.as_completed(tick)
    before = scoring.check(ended)
    store.put(key, identity, ended)
    return before
