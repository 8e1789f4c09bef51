# SPDX-License-Identifier: GPL-2.0
"""Programs that the explorer makes from a seed, as tests: ``--explore=200``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import pytest

from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.explorer.oracles import Failure
from guest_tests.mm import system
from guest_tests.support.folios import advised_folios
from harness.programs import language
from harness.programs.generate import Generator
from harness.programs.language import Program
from harness.programs.shrink import shrink

#: programs of one test
_PROGRAMS: Final = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of so many programs, each with a seed of its own."""
    count, seed = (metafunc.config.getoption(name, 0) for name in ("--explore", "--explore-seed"))
    parts = range(max(1, -(-count // _PROGRAMS)))
    metafunc.parametrize("seed", [seed * 1000 + part for part in parts])


@pytest.mark.explore
@pytest.mark.guest_timeout(60)  # shrinking takes a second or two, if a program fails
@pytest.mark.usefixtures("own_group", "ksm")
def test_programs(seed: int, record_property: Callable[[str, object], None]) -> None:
    """No row: programs that the explorer makes.

    Every kernel: the bytes, the walks, the layout and the accounts are right after each of them. Programs that fail are
    shrunk, and may show a finding.
    """
    system.require_nodes(2)
    generator = Generator(seed, kinds())
    executor = Executor()
    failed = list[str]()
    with advised_folios():
        for number in range(_PROGRAMS):
            program = generator.next().program
            failure = _run(executor, program)
            if failure is None:
                continue
            # With this word and in this form harness/judging/findings.py reads which finding it shows.
            shown = f"{failure.oracle}: {' / '.join(each.kind for each in _smallest(executor, program, failure))}"
            record_property("program", shown)
            failed.append(
                f"{shown}: {failure.text}. That was program {number}, of which these operations alone fail in the same "
                f"way. Save it, and give its file to harness explore --replay:\n{language.to_json(program)}"
            )
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


def _run(executor: Executor, program: Program, *, thorough: bool = False) -> Failure | None:
    wire = [tuple(each) for each in language.to_wire(program)]
    return executor.run(wire, thorough=thorough, layout=True).failure


def _smallest(executor: Executor, program: Program, failure: Failure) -> Program:
    """The smallest program that fails by the same check."""

    def first_failing(candidates: Sequence[Program]) -> int | None:
        return next((number for number, each in enumerate(candidates) if fails(each)), None)

    def fails(candidate: Program) -> bool:
        found = _run(executor, candidate, thorough=True)
        return found is not None and found.oracle == failure.oracle

    return shrink(program, first_failing)
