# SPDX-License-Identifier: GPL-2.0
"""Moves with the relocation flags that do not depend on what cannot be relocated: rows 44, 47 and 73.

A pin or a relative by fork is in the way only of memory that has to be rewritten. Memory that moves to where its page
offset fits stays as it is, and so does what a move leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from guest_tests.mm import pagemap
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.proctree import Child
from guest_tests.support.checks import counted, expect_layout
from guest_tests.support.found import assert_found
from guest_tests.support.holds import pinned
from guest_tests.support.moves import move_or_refused, ways

pytestmark = pytest.mark.shared_guest

#: pages in the mapping under test
_PAGES = 5
#: page of the carve-out it moves to
_TO = 20

# --- obstacles ---------------------------------------------------------------------------------------------------

_Obstacle = Callable[[Mapping], AbstractContextManager[object]]


@contextmanager
def _pinned_first_page(mapping: Mapping) -> Iterator[None]:
    """Pin the first page while the block runs."""
    with pinned(mapping.address):
        yield


@contextmanager
def _with_a_child(mapping: Mapping) -> Iterator[None]:
    """Have a child that inherits the mapping while the block runs."""
    with Child():
        yield


@contextmanager
def _nothing(mapping: Mapping) -> Iterator[None]:
    """Leave the mapping as it is."""
    yield


# --- where the page offset fits ----------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("obstacle", [_pinned_first_page, _with_a_child], ids=["pinned", "forked"])
@pytest.mark.parametrize("follows", ["second", "first"])
def test_a_merge_as_it_is_needs_no_relocation(
    relocate: bool, area: CarveOut, flags: int, obstacle: _Obstacle, follows: str
) -> None:
    """Rows 47 (fork-parent) and 73 (pinned-4k): memory that cannot be relocated moves to where it merges as it is.

    One half of a mapping moves plainly, and the other half follows it. Their page offsets still fit, so that nothing
    has to be rewritten, and no pin and no relative by fork is in the way.

    ::

        page      0        5        10    20       25
        before  | aaaaaa | bbbbbb |
        plain            | bbbbbb |     | aaaaaa |             or bbbbbb at 25
        then                            | aaaaaa   bbbbbb |    one mapping

    Unpatched: a plain move merges them; EINVAL with a flag, and nothing changes.
    Patched: the two merge with either flag, and no relocation is counted.
    """
    whole = area.map(0, 2 * _PAGES).fill()
    leader, follower = (0, _PAGES) if follows == "second" else (_PAGES, 0)
    first = move(whole.part(leader, _PAGES), area.page(_TO + leader))
    second = whole.part(follower, _PAGES)
    with obstacle(second), counted(relocate, relocated=0, refused_pinned=0, refused_forked=0):
        result = move_or_refused(relocate, area, second, area.page(_TO + follower), flags)
        if result is not None:
            expect_layout(area, [(_TO, 2 * _PAGES)], "the halves of a mapping that follow each other")
    assert_found(first)
    assert_found(second if result is None else result)


@ways
@pytest.mark.parametrize("obstacle", [_nothing, _pinned_first_page, _with_a_child], ids=["nothing", "pinned", "forked"])
def test_the_way_home_needs_no_relocation(relocate: bool, area: CarveOut, flags: int, obstacle: _Obstacle) -> None:
    """Rows 47 (fork-parent) and 73 (pinned-4k): a mapping was moved away plainly, and moves back to its empty old place
    while nothing is in the way of a relocation, while a page is pinned, or while a child has inherited it.

    ::

        page      0        5              20       25
        before  | aaaaaa |
        plain                           | aaaaaa |
        back    | aaaaaa |

    Its page offset is still that of the old place, so that nothing has to be rewritten.

    Unpatched: a plain move keeps the frames; EINVAL with a flag, and nothing changes.
    Patched: the same with either flag, and no relocation and no refusal is counted.
    """
    away = move(area.map(0, _PAGES).fill(), area.page(_TO))
    area.hole(0, _PAGES)
    before = pagemap.pfns(away.address, away.pages)
    with obstacle(away), counted(relocate, relocated=0, refused_pinned=0, refused_forked=0):
        result = move_or_refused(relocate, area, away, area.page(0), flags)
        if result is not None:
            assert pagemap.pfns(result.address, result.pages) == before, "the move changed frames"
    assert_found(away if result is None else result)


# --- what a move leaves out --------------------------------------------------------------------------------------


@ways
def test_a_neighbour_that_is_cut_off(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 44 (mremap-shrink-move): a range of two mappings shrinks to the first while it moves, to the place directly
    behind the second. Their page offsets would fit, but the same call cuts the second off.

    ::

        page      0        6     10        20     24       30     34
        before  | aaaaaa | bbbb |        |      |        |      | nn |
        plain   |                        | bbbb | aaaaaa |      | nn |
        after   |                                        | bbbb | nn |   relocated: one mapping

    Unpatched: a plain move; EINVAL with a flag, and nothing changes.
    Patched: there is nothing to merge with as it is, so the pages are relocated with either flag, and merge with what
    lies behind them.
    """
    area.hole(20, 14)
    behind = area.map(34, 2).fill(seed=1)
    whole = area.map(0, 10).fill()
    last = move(whole.part(6, 4), area.page(20))
    first = move(whole.part(0, 6), area.page(24))
    source = Mapping(area.page(20), 10, [*last.contents, *first.contents])
    with counted(relocate, relocated=1 if flags else 0):
        result = move_or_refused(relocate, area, source, area.page(30), flags, pages=4)
        if result is not None:
            expect_layout(area, [(30, 6)] if flags else [(30, 4), (34, 2)], "a mapping that shrank while it moved")
    assert_found(source if result is None else result)
    assert_found(behind)


@ways
@pytest.mark.parametrize("at", [_PAGES, 2 * _PAGES - 1], ids=["first-of-it", "last"])
def test_a_pin_in_the_tail_that_is_cut_off(relocate: bool, area: CarveOut, flags: int, at: int) -> None:
    """Rows 44 (mremap-shrink-move) and 73 (pinned-4k): ten pages move to a place and shrink to five, while a page of
    the tail that is cut off is pinned.

    ::

        page      0        5        10              20       25
        before  | aaaaaaaaaaatttPttt |
        after                                     | aaaaaa |

    Unpatched: a plain move; EINVAL with a flag, and nothing changes.
    Patched: the five pages are relocated with either flag, because only they move; every page is found.
    """
    source = area.map(0, 2 * _PAGES).fill()
    with pinned(source.page(at)), counted(relocate, relocated=1 if flags else 0, refused_pinned=0):
        result = move_or_refused(relocate, area, source, area.page(_TO), flags, pages=_PAGES)
        if result is not None:
            expect_layout(area, [(_TO, _PAGES)], "a mapping that shrank while it moved")
    assert_found(source if result is None else result)
