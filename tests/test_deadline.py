# SPDX-License-Identifier: GPL-2.0
"""A deadline is one moment, also if several waits share it."""

from __future__ import annotations

import time

import pytest

from harness.deadline import Deadline
from harness.errors import DeadlineExceeded


def test_what_remains_shrinks_and_never_goes_below_nothing() -> None:
    deadline = Deadline.after(0.05)
    first = deadline.remaining
    time.sleep(0.01)
    assert 0 < deadline.remaining < first <= 0.05
    time.sleep(0.05)
    assert deadline.remaining == 0.0


def test_a_moment_that_has_passed_raises_with_what_was_waited_for() -> None:
    Deadline.after(10).check("rain")
    with pytest.raises(DeadlineExceeded, match=r"^gave up waiting for rain$"):
        Deadline.after(-1).check("rain")


def test_it_is_passed_from_its_moment_on() -> None:
    assert Deadline.after(0).passed
    assert not Deadline.after(10).passed


def test_the_wall_clock_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    deadline = Deadline.after(10)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 9 < deadline.remaining <= 10
