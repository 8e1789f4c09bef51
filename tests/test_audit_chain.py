# SPDX-License-Identifier: GPL-2.0
"""Lists of any length are followed to their end, and a loop is detected soon."""

from __future__ import annotations

from itertools import islice

import pytest

from harness.audit.chain import Endless, chain


def test_a_list_is_followed_to_its_end() -> None:
    assert list(chain(5, lambda at: at - 1)) == [5, 4, 3, 2, 1]
    assert list(chain(5, lambda at: at + 1, end=8)) == [5, 6, 7]
    assert list(chain(0, lambda at: at)) == list(chain(8, lambda at: at, end=8)) == []


def test_a_long_list_is_not_taken_for_a_loop() -> None:
    assert sum(1 for _ in chain(1 << 18, lambda at: at - 1)) == 1 << 18


@pytest.mark.parametrize("tail", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("loop", [1, 2, 3, 8, 100])
def test_a_loop_is_detected(tail: int, loop: int) -> None:
    """1 -> 2 -> ... -> tail + 1 -> ... -> tail + loop -> tail + 1"""
    followed = chain(1, lambda at: at + 1 if at < tail + loop else tail + 1)
    met: list[int] = []
    with pytest.raises(Endless) as caught:
        met.extend(islice(followed, 10 * (tail + loop) + 10))
    assert len(met) <= 3 * (tail + loop) + 1
    assert tail < caught.value.address <= tail + loop


def test_a_loop_that_does_not_contain_the_head_is_detected() -> None:
    """The last element leads to the first one, and not to the head of the list."""
    following = {1: 2, 2: 3, 3: 1}
    with pytest.raises(Endless):
        list(chain(1, following.__getitem__, end=99))
