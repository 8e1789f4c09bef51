# SPDX-License-Identifier: GPL-2.0
"""Tests of the storms: what they do to memory, and what they and the checks after them notice."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack, suppress

import pytest

from guest_tests.mm.mapping import CarveOut, carve_out
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.waiting import wait_until
from guest_tests.support.checks import assert_explained
from guest_tests.support.holds import Spliced
from guest_tests.support.storms import Storm

_PAGES = 64


@pytest.mark.usefixtures("ksm")
def test_a_storm_does_everything_that_this_kernel_can_do(own_group: Memcg | None) -> None:
    """No row: a storm works on memory that stays where it is.

    Every kernel: each kind of step has an effect, and the data is as it was.
    """
    group = own_group.path if own_group else None
    with carve_out(_PAGES) as area, Storm([area.page(0)], _PAGES, 1, words=[0], group=group) as storm:
        area.map(0, 1)
        memory = area.map(1, _PAGES - 1).fill()

        def everything() -> bool:
            # What is swapped out cannot be migrated, nor its frame be marked.
            memory.check()
            return all(storm.done.values())

        storm.begin()
        with suppress(TimeoutError):
            wait_until(everything, "every kind of step", 15)
        missing = [name for name, done in storm.done.items() if not done]
        assert not missing, f"no step of these kinds has succeeded: {', '.join(missing)}"


def test_a_storm_notices_a_write_that_is_lost(area: CarveOut) -> None:
    """No row: somebody else writes over a word of a storm.

    Every kernel: the storm says that a write was lost.
    """

    def overwritten() -> None:
        with Storm([area.page(0)], 1, 1, words=[0], processes=1) as storm:
            word = ctypes.c_uint64.from_address(area.map(0, 1).address)
            storm.begin()
            wait_until(lambda: word.value > 2, "some writes of the storm")
            while not storm.failed:
                word.value = 0

    with pytest.raises(AssertionError, match=r"a write was lost: the word of page 0 holds 0, not \d+"):
        overwritten()


def test_pages_that_leak_are_noticed(own_group: Memcg | None) -> None:
    """No row: references from pipes keep pages although their memory is unmapped.

    Every kernel: the group is charged with more than its statistics explain, until the references are dropped.
    """
    if own_group is None or "kernel" not in own_group.stat():
        pytest.skip("needs a control group that says how much memory the kernel uses: Linux 5.18 and CONFIG_MEMCG")
    with ExitStack() as pipes:
        area = pipes.enter_context(carve_out(256))
        for part in range(8):
            memory = area.map(0, 256).fill_same(part + 1)
            pipes.enter_context(Spliced(memory.address, memory.length))
            memory.unmap()
        with pytest.raises(TimeoutError, match="to be explained by its statistics"):
            assert_explained(own_group, 0.2)
    assert_explained(own_group)
