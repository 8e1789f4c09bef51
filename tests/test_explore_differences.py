# SPDX-License-Identifier: GPL-2.0
"""Two kernels side by side, without a guest."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import cast

from harness.deadline import Deadline
from harness.explore import differences
from harness.explore.differences import Comparison, Difference
from harness.explore.runner import Batch, Failure, Outcome, Runner
from harness.programs.language import Kind, Program


class FakeRunner:
    """A kernel: a function that says what a user sees of a program. None stands for a program that fails."""

    kinds = tuple(kind for kind in Kind if kind is not Kind.SCAN)

    def __init__(self, sees: Callable[[Program], Outcome | None]) -> None:
        self._sees = sees

    def run(self, programs: Sequence[Program], *, outcomes: bool) -> Batch:
        assert outcomes
        batch = Batch()
        for each in programs:
            seen = self._sees(each)
            batch.done += 1
            batch.outcomes.append(seen or Outcome((), ""))
            if seen is None:
                batch.failure = Failure("bytes", 0, 1, "wrong")
                break
        return batch


def _plain(program: Program) -> Outcome:
    return Outcome(tuple(0 for _ in program), "48-50 rw-p")


def _refuses_grow(program: Program) -> Outcome:
    return Outcome(tuple(errno.EFAULT if each.kind is Kind.GROW else 0 for each in program), "48-50 rw-p")


def _splits(program: Program) -> Outcome:
    split = any(each.kind is Kind.LOCK for each in program)
    return Outcome(tuple(0 for _ in program), "48-49 rw-p; 49-50 rw-p" if split else "48-50 rw-p")


def _compare(one: Callable[[Program], Outcome | None], other: Callable[[Program], Outcome | None]) -> Comparison:
    runners = (cast(Runner, FakeRunner(one)), cast(Runner, FakeRunner(other)))
    found: list[Difference] = []
    comparison = Comparison(runners, 1, lambda *_: None, found.append)
    comparison.run(Deadline.after(0.5))
    assert found == list(comparison.differences.values())
    return comparison


def test_equal_kernels_have_no_differences() -> None:
    comparison = _compare(_plain, _plain)
    assert comparison.programs >= differences.BATCH
    assert not comparison.different


def test_an_operation_that_only_one_kernel_refuses_is_found_and_shrunk() -> None:
    (only,) = _compare(_plain, _refuses_grow).differences.values()
    assert [each.kind for each in only.program] == ["grow"]
    assert only.text == "operation 1 succeeds on the first kernel and fails (Bad address) on the second"


def test_other_mappings_are_a_difference() -> None:
    (only,) = _compare(_plain, _splits).differences.values()
    assert [each.kind for each in only.program] == ["lock"]
    assert "the mappings are 48-50 rw-p on the first kernel and 48-49 rw-p; 49-50 rw-p" in only.text


def test_programs_that_fail_are_counted_and_not_compared() -> None:
    comparison = _compare(
        _plain, lambda program: None if _refuses_grow(program) != _plain(program) else _plain(program)
    )
    assert comparison.failed
    assert not comparison.different
