# SPDX-License-Identifier: GPL-2.0
"""Programs that the explorer makes from a seed, as tests: ``--explore=200``."""

from __future__ import annotations

from typing import Final

import pytest

from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.mm import system
from guest_tests.support.folios import advised_folios
from harness.programs import language
from harness.programs.generate import Generator

#: programs of one test
_PROGRAMS: Final = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of so many programs, each with a seed of its own."""
    count, seed = (metafunc.config.getoption(name, 0) for name in ("--explore", "--explore-seed"))
    parts = range(max(1, -(-count // _PROGRAMS)))
    metafunc.parametrize("seed", [seed * 1000 + part for part in parts])


@pytest.mark.explore
@pytest.mark.usefixtures("own_group", "ksm")
def test_programs(seed: int) -> None:
    """No row: programs that the explorer makes.

    Every kernel: the bytes, the walks, the layout and the accounts are right after each of them.
    """
    system.require_nodes(2)
    generator = Generator(seed, kinds())
    executor = Executor()
    with advised_folios():
        for number in range(_PROGRAMS):
            program = generator.next().program
            wire = [tuple(each) for each in language.to_wire(program)]
            failure = executor.run(wire, thorough=False, layout=True).failure
            assert failure is None, (
                f"{failure.text} ({failure.oracle}) after program {number}. Save it, and give its file to "
                f"harness explore --replay:\n{language.to_json(program)}"
            )
