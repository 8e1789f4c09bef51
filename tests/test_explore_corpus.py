# SPDX-License-Identifier: GPL-2.0
"""Programs that are kept from one exploration to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import pytest

from harness.deadline import Deadline
from harness.explore import corpus
from harness.explore.campaign import Campaign
from harness.explore.corpus import Best, Corpus
from harness.explore.plan import Plan
from harness.explore.runner import Batch, Runner
from harness.programs.generate import Generator, remade
from harness.programs.language import Kind, Program


def _programs(count: int, seed: int = 1) -> list[Program]:
    generator = Generator(seed, list(Kind))
    return [generator.next().program for _ in range(count)]


def test_programs_are_there_in_the_next_run() -> None:
    assert Corpus(Kind).read() == []
    Corpus(Kind).write(_programs(20))
    assert Corpus(Kind).read() == _programs(20)


def test_a_kernel_with_other_operations_has_programs_of_its_own() -> None:
    Corpus(Kind).write(_programs(20))
    assert Corpus([each for each in Kind if each is not Kind.SCAN]).read() == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"programs": 3}', '{"programs": [[[99, 0, 0, 0, 0, 0, 0, 0]]]}'])
def test_a_file_that_is_no_corpus_counts_as_none(text: str) -> None:
    Corpus(Kind).write(_programs(1))
    Corpus(Kind).path.write_text(text)
    assert Corpus(Kind).read() == []


def test_what_meets_most_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MOST", 50)
    best, plain = Best(), Best()
    made = [remade(each) for each in _programs(1000)]
    for each in made:
        best.add(each)
    for each in made[:50]:
        plain.add(each)
    again = Best()
    kept = best.programs()
    for program in kept:
        again.add(remade(program))
    assert len(kept) == 50
    assert len(again.seen) > len(plain.seen)


def test_a_program_that_meets_nothing_new_is_not_kept() -> None:
    best = Best()
    (program,) = _programs(1)
    best.add(remade(program))
    best.add(remade(program))
    assert best.programs() == [program]


def test_earlier_programs_run_first_and_change_no_later_one() -> None:
    """A seed makes the same new programs whatever was kept."""
    earlier = _programs(30, seed=7)

    class Noting:
        audits_programs = False
        kinds = tuple(Kind)

        def __init__(self) -> None:
            self.ran: list[Program] = []

        def run_plans(self, plans: Sequence[Plan]) -> Batch:
            return Batch(len(plans), untrue=[*range(len(plans))])

        def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
            self.ran += programs
            return Batch(len(programs))

    def ran(known: list[Program]) -> list[Program]:
        runner = Noting()
        campaign = Campaign(cast(Runner, runner), 1, "7.3", "x86_64", lambda _: None, lambda _: None, earlier=known)
        campaign.run(Deadline.after(60), 1)
        return runner.ran

    # A batch runs its plans behind the others.
    assert set(earlier) < set(ran(earlier))
    assert set(ran(earlier)) - set(earlier) < set(ran([]))
