# SPDX-License-Identifier: GPL-2.0
"""Writes what became of mutants for a terminal or a log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median

from harness.build.mutants import Mutant
from harness.matrix.table import Paint, clipped, plural
from harness.mutants.outcome import How, Result, Score, State

#: The states that somebody has to look at.
OPEN = (State.SURVIVED, State.UNDECIDED)


def line(result: Result) -> str:
    """One line about one mutant."""
    if result.state is State.KILLED:
        return f"{result.name}: killed in {result.seconds:.1f} s by {short(result.kills[0].test)}{_by(result)}"
    if result.state is State.UNDECIDED:
        return f"{result.name}: undecided: {result.trouble}"
    return f"{result.name}: {result.state}; {_reaching(result)} it"


def lines(score: Score, mutants: Mapping[str, Mutant], width: int, paint: Paint) -> Iterator[str]:
    """The table of one kernel, then the mutants that survived with the promises that they break.

    :param width: the terminal's, in columns.
    """
    yield ""
    yield paint.bold(f"{score.kernel} {score.arch}, {score.release}, {score.accelerator}")
    name_width = max((len(each.name) for each in score.results), default=0)
    for group in dict.fromkeys(each.group for each in score.results):
        yield f"  {group}"
        for each in score.results:
            if each.group == group:
                text = clipped(f"    {each.name:{name_width}}  {_row(each)}", width)
                yield paint.red(text) if each.state in OPEN else text
    for each in score.results:
        if each.state is State.SURVIVED:
            mutant = mutants[each.name]
            yield ""
            yield paint.red(f"{each.name} survived in {mutant.places}")
            yield f"  broken: {mutant.breaks}"
            yield f"  shows:  {mutant.shows}"
            yield f"  {_reaching(each).capitalize()} its place."
    yield ""
    yield total(score)


def total(score: Score) -> str:
    """The score in one line."""
    killed = [each for each in score.results if each.state is State.KILLED]
    ways = Counter(each.kills[0].how for each in killed)
    said = ", ".join(f"{ways[how]} by {_WAYS[how]}" for how in How if ways[how])
    others = [state for state in State if state is not State.KILLED and score.count(state)]
    rest = "".join(f"; {score.count(state)} {state}" for state in others)
    share = f" ({percent(len(killed), score.tried)})" if score.tried else ""
    typical = f"; median time to kill {median(each.seconds for each in killed):.1f} s" if killed else ""
    seen = sum(any(kill.audited for kill in each.kills) for each in killed)
    audited = f"; the audit reported {seen} of them, {ways[How.AUDIT] or 'none'} alone" if score.audited else ""
    return f"{len(killed)} of {score.tried} killed{share}{': ' if said else ''}{said}{audited}{rest}{typical}"


def percent(part: int, whole: int) -> str:
    """A share, rounded down: 100 % means all."""
    return f"{part * 100 // whole} %"


def idle(score: Score) -> list[str]:
    """The modules of tests that killed nothing that no other module killed; only of a run of all tests."""
    by_mutant = [{each.test.partition("::")[0] for each in result.kills} for result in score.results if result.kills]
    modules = set().union(*by_mutant) if by_mutant else set()
    return sorted(module for module in modules if {module} not in by_mutant)


def short(test: str) -> str:
    """A test's id without the directory."""
    return test.removeprefix("guest_tests/")


def _reaching(result: Result) -> str:
    if not result.reaching:
        return "no test reaches"
    return f"{plural(result.reaching, 'test')} {'reaches' if result.reaching == 1 else 'reach'}"


def _row(result: Result) -> str:
    if result.state is State.KILLED:
        return f"killed  {result.seconds:5.1f} s  {short(result.kills[0].test)}{_by(result)}"
    return f"{result.state}  {result.trouble}".rstrip()


def _by(result: Result) -> str:
    first, *others = result.kills
    how = f" ({_WAYS[first.how]})" if first.how is not How.TEST else ""
    how += ", and the audit reported it" if first.audited and first.how is not How.AUDIT else ""
    return f"{how} and {plural(len(others), 'other test')}" if others else how


_WAYS: Mapping[How, str] = {
    How.TEST: "checks of tests",
    How.EXPLORER: "the explorer",
    How.AUDIT: "the audit",
    How.CONSOLE: "the kernel's own complaint",
    How.LOST: "loss of the guest",
}


def names(mutants: Sequence[Mutant]) -> Iterator[str]:
    """The mutants by group, each with the promise that it breaks."""
    for group in dict.fromkeys(each.group for each in mutants):
        yield group
        for each in mutants:
            if each.group == group:
                real = f" [{each.commit}]" if each.commit else ""
                yield f"  {each.name}: {each.breaks}{real}"
