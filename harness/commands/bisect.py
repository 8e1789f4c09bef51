# SPDX-License-Identifier: GPL-2.0
"""``harness bisect`` and ``harness bisect-step``: find the first kernel that a test fails on."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import options as shared
from harness.commands.numbers import count, minutes
from harness.errors import HarnessError, UsageError
from harness.host import files
from harness.host.terminal import ProgressLine
from harness.options import BuildOptions, MachineOptions

if TYPE_CHECKING:  # the other commands of harness need none of it
    from harness.arch import Architecture
    from harness.bisect.asking import Asking
    from harness.bisect.history import History
    from harness.bisect.search import Direction
    from harness.bisect.step import Step
    from harness.bisect.trial import Criterion, Trial
    from harness.kernels.built import BuildSpec

#: The exit statuses of ``bisect``.
_FOUND, _NOT_FOUND, _INTERRUPTED = 0, 1, 130

#: Options of pytest that the kernels of a bisect are given in another way, or that would change what a failure is.
_TAKEN = (
    "--kernel",
    "--arch",
    "--preset",
    "--append",
    "--results",
    "--expect-findings",
    "--keep",
    "--answer",
    "--bisect",
)


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the commands."""
    parser = commands.add_parser(
        "bisect",
        help="find the first kernel that a test fails on, among Debian's versions or a repository's commits",
        usage="harness bisect --packages OLD..NEW [OPTIONS] -- TESTS\n"
        "       harness bisect --tree DIR --good REV --bad REV [OPTIONS] [+PATCHES ...] -- TESTS",
        description="Runs TESTS, which are arguments of pytest, on kernels of a range until the first bad is found.",
        epilog="Exit status: 0 the first bad kernel was found, 1 it was not (a wrong baseline, kernels without a "
        "verdict in between, trouble of the host), 2 a wrong request, 130 interrupted; the same command goes on then.",
    )
    parser.add_argument(
        "--packages", default="", metavar="OLD..NEW", help="Debian's kernels from OLD to NEW: 6.16..7.3"
    )
    parser.add_argument("--tree", default="", metavar="DIR", help="the commits of this repository, which is only read")
    parser.add_argument("--good", default="", metavar="REV", help="a commit of --tree that is good")
    parser.add_argument("--bad", default="", metavar="REV", help="a commit of --tree that is bad")
    parser.add_argument("--fixed", action="store_true", help="find the first kernel that is good again")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="keep the verdicts in FILE (default: a file of this question's own)"
    )
    parser.add_argument("--again", action="store_true", help="forget the verdicts in the log")
    _add_shared(parser)
    step = commands.add_parser(
        "bisect-step",
        help="build a tree, run tests on it, and exit as `git bisect run` wants",
        usage="harness bisect-step [--tree DIR] [OPTIONS] [+PATCHES ...] -- TESTS",
        description="Builds the kernel tree of this directory in the cache, and runs TESTS, which are arguments of "
        "pytest, on it. For: git bisect run harness bisect-step -- TESTS",
        epilog="Exit status: 0 good, 1 bad, 125 no verdict (patches do not apply, it does not build or boot, a test "
        "could not be run, all tests skip), 128 trouble of the host, 129 a wrong request, 130 interrupted. "
        "git bisect run stops at the last three.",
    )
    step.add_argument("--tree", default=".", metavar="DIR", help="the kernel tree (default: this directory)")
    _add_shared(step)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    shared.PRESET.declare(parser.add_argument)
    shared.ARCH.declare(parser.add_argument, action="store", default=None)
    parser.add_argument(
        "--repeat", type=count, default=1, metavar="N", help="run the tests N times; good is what never fails"
    )
    parser.add_argument(
        "--minutes", type=minutes, default=30.0, metavar="N", help="end the tests of a kernel then (default: 30)"
    )
    for option in shared.MACHINE:
        option.declare(parser.add_argument)
    parser.add_argument(
        "words", nargs="*", metavar="TESTS", help="for pytest, after --; before them +PATCHES, for kernels built here"
    )


def run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run ``bisect``; returns its exit status."""
    try:
        return _packages(chosen, progress) if chosen.packages else _commits(chosen, progress)
    except KeyboardInterrupt:
        progress.clear()
        print("interrupted: the same command goes on from the log", file=sys.stderr)
        return _INTERRUPTED
    finally:
        progress.clear()


def run_step(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run ``bisect-step``; returns its exit status."""
    from harness.report import state

    try:
        return _step(chosen, progress)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except Exception as error:  # Python's own status for it is 1, and would make git take the commit for a bad one
        progress.clear()
        if not isinstance(error, HarnessError):
            traceback.print_exc()
        print(f"harness: {error}", file=sys.stderr)
        return state.WRONG_REQUEST if isinstance(error, UsageError) else state.TROUBLE
    finally:
        progress.clear()


def _step(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    from harness.kernels import built
    from harness.matrix.table import clock
    from harness.report.state import STATUS

    series, tests = _series(chosen), _tests(chosen)
    text = f"{Path(chosen.tree).expanduser().absolute()}{series}"
    spec = built.parse_built(text, _arch(chosen), _building(chosen))
    if spec is None:
        raise UsageError(f"{chosen.tree} is no kernel source: change to its top, or give --tree")
    with _trial(chosen, tests, progress, lenient=False) as trial:
        step = trial.of(spec.label, spec)
    progress.clear()
    print(f"{spec.label}: {step.state} ({clock(step.seconds)}): {step.message}")
    return STATUS[step.state]


def _series(chosen: argparse.Namespace) -> str:
    """The patches among the words, as --kernel takes them; they are taken out of the words.

    :raises UsageError: if one does not exist.
    """
    from harness.build import posted

    count = next((place for place, word in enumerate(chosen.words) if not word.startswith("+")), len(chosen.words))
    words, chosen.words = posted.named(chosen.words[:count]), chosen.words[count:]
    found = [Path(word[1:]).expanduser().absolute() for word in words]
    if missing := [path for path in found if not path.exists()]:
        raise UsageError(f"there is no patch, mbox or directory {missing[0]}")
    return "".join(f"+{path}" for path in found)


def _building(chosen: argparse.Namespace) -> BuildOptions:
    return BuildOptions(trees=True, words=tuple(word for each in chosen.preset for word in each.split(":") if word))


def _packages(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    from harness.bisect import packages, story
    from harness.bisect.search import search
    from harness.debian.apt import Archive
    from harness.host.cache import Cache
    from harness.kernels import debian

    if chosen.tree or chosen.good or chosen.bad or chosen.preset or _series(chosen):
        raise UsageError("--packages takes kernels as they are: leave out what is for --tree")
    arch = _arch(chosen)
    tests = _tests(chosen)
    archive = Archive(Cache(progress=progress), chosen.debian_mirror, progress)
    versions = packages.within(debian.packaged(archive, arch), chosen.packages)
    question = {**_question(chosen, tests), "packages": chosen.packages}
    with _asking(chosen, tests, question, progress, lenient=True) as (asking, tell, log):
        tell(f"{len(versions)} kernels of Debian for {arch}, from {versions[0]} to {versions[-1]}")

        def ask(version: str, left: int) -> Step:
            return asking.ask(version, version, left, lambda: debian.parse_debian(f"debian:{version}", arch))

        direction = _direction(chosen)
        found = search(versions, ask, direction)
        for line in ("", *story.ending(found, direction, "version", log)):
            tell(line)
    return _NOT_FOUND if found.between else _FOUND


def _commits(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    from harness.bisect.history import History
    from harness.host.rundir import RunDirectory

    if not (chosen.tree and chosen.good and chosen.bad):
        raise UsageError("say where to look: --packages OLD..NEW, or --tree DIR --good REVISION --bad REVISION")
    directory = RunDirectory()
    try:
        return _history(chosen, History(Path(chosen.tree).expanduser().absolute(), directory.path), progress)
    finally:
        directory.remove()


def _history(chosen: argparse.Namespace, history: History, progress: ProgressLine) -> int:
    from harness.bisect import story
    from harness.build import series
    from harness.kernels import built

    arch, patches, direction = _arch(chosen), _series(chosen), _direction(chosen)
    tests = _tests(chosen)
    good, bad = history.find(chosen.good), history.find(chosen.bad)
    older, newer = (bad, good) if chosen.fixed else (good, bad)

    def spec(commit: str) -> BuildSpec:
        found = built.parse_built(f"git:{history.tree}@{commit}{patches}", arch, _building(chosen))
        assert found is not None
        return replace(found, label=commit[:12])

    name = spec(newer).name
    question = {
        **_question(chosen, tests),
        "tree": str(history.tree),
        "good commit": good,
        "bad commit": bad,
        "patches": series.patchset_hash([patch for path in name.series for patch in series.load(path)]),
        "configuration": str(name.configuration),
    }
    with _asking(chosen, tests, question, progress, lenient=False) as (asking, tell, log):

        def ask(commit: str, left: int) -> Step:
            return asking.ask(commit, history.name(commit), left, lambda: spec(commit))

        found = history.search(older, newer, ask, direction)
        replay = log.with_name(f"{log.name}.git")
        files.write(replay, f"{history.log()}\n")
        for line in ("", *story.ending(found, direction, "commit", log, history.name)):
            tell(line)
        tell(f"For git bisect replay: {replay}")
    return _NOT_FOUND if found.between else _FOUND


@contextmanager
def _asking(
    chosen: argparse.Namespace, tests: Criterion, question: Mapping[str, Any], progress: ProgressLine, *, lenient: bool
) -> Iterator[tuple[Asking, Callable[[str], None], Path]]:
    """What asks the kernels of a bisect, what writes lines, and the path of the log."""
    from harness.bisect import journal
    from harness.bisect.asking import Asking
    from harness.host.cache import host_trouble

    def tell(line: str) -> None:
        progress.clear()
        print(line, flush=True)

    path = chosen.log or journal.usual_path(question)
    if not chosen.log:
        with host_trouble(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
    log = journal.Journal(path, question, again=chosen.again)
    try:
        with _trial(chosen, tests, progress, lenient=lenient) as trial:
            yield Asking(trial, log, tell), tell, path
    finally:
        log.close()


@contextmanager
def _trial(chosen: argparse.Namespace, tests: Criterion, progress: ProgressLine, *, lenient: bool) -> Iterator[Trial]:
    from harness.bisect.trial import Trial
    from harness.matrix.executor import LocalExecutor

    executor = LocalExecutor()
    try:
        yield Trial(tests, MachineOptions.of(vars(chosen)), executor, progress, lenient=lenient)
    finally:
        executor.cancel()


def _arch(chosen: argparse.Namespace) -> Architecture:
    from harness import arch

    return arch.find(chosen.arch) if chosen.arch else arch.host()


def _direction(chosen: argparse.Namespace) -> Direction:
    from harness.bisect.search import Direction
    from harness.report.state import State

    return Direction(State.BAD if chosen.fixed else State.GOOD)


def _tests(chosen: argparse.Namespace) -> Criterion:
    """What runs on each kernel.

    :raises UsageError: if there is nothing to run, or an option that has no place here.
    """
    from harness.bisect.trial import Criterion

    if not chosen.words:
        raise UsageError("say which tests decide, after --: -- guest_tests/test_example.py")
    for each in chosen.words:
        if each.partition("=")[0] in _TAKEN:
            raise UsageError(f"{each.partition('=')[0]} has no place among the tests: see harness bisect --help")
    return Criterion(arguments=tuple(map(_absolute, chosen.words)), repeat=chosen.repeat, seconds=chosen.minutes * 60)


def _absolute(argument: str) -> str:
    """An argument of pytest, which runs in another directory, with the path of a file of this one made absolute."""
    file, colons, rest = argument.partition("::")
    path = Path(file)
    named = not file.startswith("-") and ("/" in file or path.suffix == ".py")
    return f"{path.absolute()}{colons}{rest}" if named and path.exists() else argument


def _question(chosen: argparse.Namespace, tests: Criterion) -> dict[str, Any]:
    """What the verdicts in a log depend on, beside the kernels."""
    from harness.matrix import job

    options = MachineOptions.of(vars(chosen))
    return {
        "tests": list(tests.arguments),
        "architecture": str(_arch(chosen)),
        "repetitions": tests.repeat,
        "command line of the kernel": options.append,
        "memory": options.memory,
        "processors": options.cpus,
        "version of the tests or of the harness": job.content(),
    }
