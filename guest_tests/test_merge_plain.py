# SPDX-License-Identifier: GPL-2.0
"""Merges without relocation, of unfaulted sources and of memory that moves back: rows 35 and 36.

Unfaulted memory takes the page offset of its new place. Faulted memory keeps its own, which fits again where the memory
was faulted in. Pictures as in :mod:`guest_tests.test_merge`.
"""

from __future__ import annotations

import pytest

from guest_tests.mm import pagemap, system
from guest_tests.mm.mapping import CarveOut, move
from guest_tests.mm.syscalls import PROT_EXEC, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found
from guest_tests.support.merging import AWAY, Layout, block, still_works

pytestmark = pytest.mark.shared_guest


@pytest.mark.parametrize(
    ("faulted", "unfaulted", "to", "merged"),
    [
        pytest.param([0], [], 5, [(0, 10)], id="after-faulted"),
        pytest.param([5], [], 0, [(0, 10)], id="before-faulted"),
        pytest.param([0, 10], [], 5, [(0, 10), (10, 5)], id="between-faulted"),
        pytest.param([0], [10], 5, [(0, 15)], id="between-faulted-and-unfaulted"),
        pytest.param([10], [0], 5, [(0, 15)], id="between-unfaulted-and-faulted"),
        pytest.param([], [0, 10], 5, [(0, 15)], id="between-unfaulted"),
    ],
)
def test_an_unfaulted_source_merges_anywhere(
    area: CarveOut, faulted: list[int], unfaulted: list[int], to: int, merged: Layout
) -> None:
    """Row 35 (unfaulted-plain): unfaulted memory moves plainly next to faulted and unfaulted neighbours.

    It has no pages that would bind it to an offset. Between two mappings that were faulted in separately it joins the
    first one. The second cannot join them, because the anon_vmas differ.

    ::

        page   0         5         10        15
               |fffffffff|uuuuuuuuu|fffffffff|          moved between two faulted
               |-------------------|---------|

    Every kernel: it merges with its neighbours, as far as these share an anon_vma.
    """
    neighbours = [block(area, at) for at in faulted] + [block(area, at, faulted=False) for at in unfaulted]
    moved = move(block(area, AWAY, faulted=False), area.page(to)).check()
    expect_layout(area, merged, "unfaulted memory takes the offset of its new place")
    still_works(moved, *neighbours)


@pytest.mark.parametrize("first", [0, 5, 10], ids=["head", "middle", "tail"])
def test_a_move_back_closes_the_hole(area: CarveOut, first: int) -> None:
    """Row 36 (away-and-back): a plain move takes a piece out of a mapping, another one brings it back.

    The piece kept its offset, which is the right one again. The test does this twice, because the second time must find
    everything as the first time left it.

    ::

        page   0         5         10        15          30
               |fffffffff|fffffffff|fffffffff|                       one
               |fffffffff|         |fffffffff|     ...   |sssssssss| three
               |fffffffff|fffffffff|fffffffff|                       one

    Every kernel: one mapping again, with the same frames.
    """
    whole = area.map(0, 15).fill()
    frames = pagemap.pfns(whole.address, whole.pages)
    for _ in range(2):
        piece = move(whole.part(first, 5), area.page(AWAY)).check()
        around = {0: [(5, 10)], 5: [(0, 5), (10, 5)], 10: [(0, 10)]}[first]
        expect_layout(area, [*around, (AWAY, 5)], "a piece was moved out of the mapping")
        area.reserve(first, 5)
        move(piece, area.page(first))
        expect_layout(area, [(0, 15)], "the piece was moved back to where it was faulted in")
        whole.check()
    assert pagemap.pfns(whole.address, whole.pages) == frames, "moving a piece away and back changed page frames"
    assert_found(whole)


def test_a_whole_mapping_moved_back_merges_with_what_it_left(area: CarveOut) -> None:
    """Row 36 (away-and-back): half of a mapping moves away in two steps, and comes back in two pieces.

    ::

        page   0         5         10        20        30
               |fffffffff|sssssssss|
               |fffffffff|                   |sssssssss|
               |fffffffff|                             |sssssssss|
               |fffffffff|ssss                             |sssss|      the first two pages
               |fffffffff|sssssssss|                                    one again

    Every kernel: one mapping again.
    """
    whole = area.map(0, 10).fill()
    once = move(whole.part(5, 5), area.page(20))
    twice = move(once, area.page(AWAY)).check()
    expect_layout(area, [(0, 5), (AWAY, 5)], "moved away in two steps")
    move(twice.part(0, 2), area.page(5))
    expect_layout(area, [(0, 7), (AWAY + 2, 3)], "the first two pages are back")
    move(twice.part(2, 3), area.page(7))
    expect_layout(area, [(0, 10)], "all pages are back")
    whole.check()
    assert_found(whole)


@pytest.mark.parametrize(
    ("new", "merged"),
    [
        pytest.param([0], [(0, 10)], id="after-unfaulted"),
        pytest.param([10], [(5, 10)], id="before-unfaulted"),
        pytest.param([0, 10], [(0, 15)], id="between-unfaulted"),
    ],
)
def test_a_move_back_next_to_unfaulted_memory(area: CarveOut, new: list[int], merged: Layout) -> None:
    """Rows 25 (after-unfaulted), 26 (before-unfaulted) and 27 (between-unfaulted): faulted memory moves away and back,
    while unfaulted neighbours appear at its place.

    The offset fits, so only the rule about anon_vmas counts. Linux 6.16 (879bca0a2c4f) lets faulted memory merge with
    unfaulted memory in every position. Before, only an unfaulted range could be added to a faulted mapping:
    is_mergeable_anon_vma() (mm/vma.c of 6.12) wants exactly one anon_vma in the chain of the neighbour, which has none.

    ::

        page   0         5         10        15
                         |fffffffff|               faulted in here
                                                   moved away
               |uuuuuuuuu|         |uuuuuuuuu|     new
               |uuuuuuuuu|sssssssss|uuuuuuuuu|     moved back: one; before 6.16: three

    Every kernel: they merge since 6.16, and stay apart before.
    """
    away = move(block(area, 5), area.page(AWAY))
    neighbours = [block(area, at, faulted=False) for at in new]
    moved = move(away, area.page(5)).check()
    apart = sorted([(5, 5), *[(at, 5) for at in new]])
    expect_layout(area, merged if system.release() >= (6, 16, 0) else apart, "the offset fits, one side is unfaulted")
    still_works(moved, *neighbours)


@pytest.mark.parametrize("called", ["faulted", "unfaulted"])
@pytest.mark.parametrize("first", ["faulted", "unfaulted"])
def test_mprotect_merges_faulted_and_unfaulted_memory(area: CarveOut, first: str, called: str) -> None:
    """Rows 25 (after-unfaulted) and 26 (before-unfaulted): without any move, mprotect() makes a faulted and an
    unfaulted half of one mapping equal.

    The kernel rule is that of the test before (879bca0a2c4f).

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|      one executable, one not
               |-------------------|      neither

    Every kernel: they merge if mprotect() is called for the unfaulted half; if it is called for the faulted half, since
    6.16.
    """
    # Not read-only: then mprotect_fixup() (mm/mprotect.c) would drop VM_ACCOUNT of the unfaulted half only, and the
    # halves would never be equal.
    whole = area.map(0, 10)
    halves = [whole.part(0, 5), whole.part(5, 5)]
    faulted, unfaulted = halves if first == "faulted" else halves[::-1]
    changed = faulted if called == "faulted" else unfaulted
    changed.mprotect(PROT_RW | PROT_EXEC)
    faulted.fill()
    expect_layout(area, [(0, 5), (5, 5)], "different protections do not merge")
    changed.mprotect(PROT_RW)
    merges = called == "unfaulted" or system.release() >= (6, 16, 0)
    expect_layout(area, [(0, 10)] if merges else [(0, 5), (5, 5)], f"mprotect() of the {called} half made them equal")
    still_works(faulted, unfaulted)
