# SPDX-License-Identifier: GPL-2.0
"""Which mappings become one when memory moves: rows 25 to 46.

Anonymous memory that was never faulted in takes the offset (``vm_pgoff``) of wherever it goes, so that it merges with
compatible neighbours. Memory that was faulted in keeps the offset of the place where that happened, because its pages
are found by it; at any other place no neighbour continues that offset, and nothing merges. That is what relocation is
for: it rewrites the pages, so that the offset can follow.

The rules are copy_vma(), vma_merge_new_range() and is_mergeable_anon_vma() in mm/vma.c of Linux 6.12 and 7.3. Pictures
show pages of the carve-out: ``f`` faulted, ``u`` unfaulted, ``s`` the faulted source, all in blocks of five pages.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

import pytest

from guest_tests.mm import maps, numa, pagemap, syscalls, system
from guest_tests.mm.mapping import ZERO, CarveOut, Mapping, move
from guest_tests.mm.syscalls import (
    MREMAP_DONTUNMAP,
    MREMAP_MUST_RELOCATE_ANON,
    MREMAP_RELOCATE_ANON,
    PROT_EXEC,
    PROT_READ,
    PROT_RW,
)
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused

pytestmark = pytest.mark.shared_guest

#: pages in a block
_BLOCK = 5
#: where the source is before it moves: far from everything
_AWAY = 30

Layout = list[tuple[int, int]]
#: three blocks that did not merge
_THREE: Final[Layout] = [(0, 5), (5, 5), (10, 5)]

#: every kernel moves without a flag; with it a kernel either relocates or refuses
plain_or_must = pytest.mark.parametrize("flags", [0, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "must"])


def _block(area: CarveOut, at: int, *, faulted: bool = True) -> Mapping:
    mapping = area.map(at, _BLOCK)
    return mapping.fill(seed=at) if faulted else mapping


def _moved(relocate: bool, area: CarveOut, source: Mapping, to: int, flags: int) -> Mapping | None:
    """Move to page ``to``; None where the flag was refused and nothing changed. Frames and data must come along.

    Checking the data has pages that were never touched read as zero, which does not count as faulting them in.
    """
    before = pagemap.pfns(source.address, source.pages)
    moved = move_or_refused(relocate, area, source, area.page(to), flags)
    if moved is not None:
        for old, new in zip(before, pagemap.pfns(moved.address, moved.pages), strict=True):
            assert old in (None, new), f"the move changed a page frame from {old} to {new}"
    return moved


def _still_works(*mappings: Mapping) -> None:
    """All data is right, every page is found by the reverse map, and untouched memory can be faulted in."""
    for number, mapping in enumerate(mappings):
        mapping.check()
        if all(content == ZERO for content in mapping.contents):
            mapping.fill(seed=100 + number)
    assert_found(*mappings)


def _move_between(
    relocate: bool,
    area: CarveOut,
    flags: int,
    *,
    faulted: Sequence[int] = (),
    unfaulted: Sequence[int] = (),
    to: int,
    plain: Layout,
    relocated: Layout,
) -> None:
    """Move five faulted pages from far away to page ``to``, and see what merges.

    :param faulted: where faulted neighbours begin, in pages of ``area``.
    :param unfaulted: the same of unfaulted ones.
    :param plain: the mappings after a move without flag, as :func:`guest_tests.checks.layout` gives them.
    :param relocated: the same after a relocation.
    """
    neighbours = [_block(area, at) for at in faulted] + [_block(area, at, faulted=False) for at in unfaulted]
    source = _block(area, _AWAY)
    moved = _moved(relocate, area, source, to, flags)
    if moved is not None:
        why = (
            "relocated memory merges like native memory" if flags else "moved memory keeps the offset of its old place"
        )
        expect_layout(area, relocated if flags else plain, why)
        _still_works(moved, *neighbours)


# --- one or two neighbours ---------------------------------------------------------------------------------------


@plain_or_must
def test_after_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 25, after-unfaulted.

    ::

        page   0         5         10
               |uuuuuuuuu|sssssssss|          two; relocated: one
    """
    _move_between(relocate, area, flags, unfaulted=[0], to=5, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_before_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 26, before-unfaulted.

    ::

        page   0         5         10
               |sssssssss|uuuuuuuuu|          two; relocated: one
    """
    _move_between(relocate, area, flags, unfaulted=[5], to=0, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_between_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 27, between-unfaulted.

    ::

        page   0         5         10        15
               |uuuuuuuuu|sssssssss|uuuuuuuuu|          three; relocated: one
    """
    _move_between(relocate, area, flags, unfaulted=[0, 10], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_after_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 28, after-faulted.

    ::

        page   0         5         10
               |fffffffff|sssssssss|          two; relocated: one
    """
    _move_between(relocate, area, flags, faulted=[0], to=5, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_before_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 29, before-faulted.

    ::

        page   0         5         10
               |sssssssss|fffffffff|          two; relocated: one
    """
    _move_between(relocate, area, flags, faulted=[5], to=0, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_between_faulted_and_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 30, between-faulted-unfaulted: without flag never two, for the source's offset fits neither side.

    ::

        page   0         5         10        15
               |fffffffff|sssssssss|uuuuuuuuu|          three; relocated: one
    """
    _move_between(relocate, area, flags, faulted=[0], unfaulted=[10], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_between_unfaulted_and_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 31, between-unfaulted-faulted: without flag never two, for the source's offset fits neither side.

    ::

        page   0         5         10        15
               |uuuuuuuuu|sssssssss|fffffffff|          three; relocated: one
    """
    _move_between(relocate, area, flags, faulted=[10], unfaulted=[0], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_between_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 32, between-faulted: the neighbours were faulted in separately, each with an anon_vma of its own. A relocated
    source can share one of them only, and find_mergeable_anon_vma() (mm/vma.c) prefers the one behind it.

    ::

        page   0         5         10        15
               |fffffffff|sssssssss|fffffffff|          three; relocated: the right pair is one
    """
    _move_between(relocate, area, flags, faulted=[0, 10], to=5, plain=_THREE, relocated=[(0, 5), (5, 10)])


@pytest.mark.parametrize("unlike", ["before", "after"])
def test_between_a_neighbour_alike_and_one_that_is_not(relocate: bool, area: CarveOut, unlike: str) -> None:
    """Row 32, between-faulted: only one of two faulted neighbours has the same protection. The one it can merge with
    has to be the one whose anon_vma is joined, though the other one would do for that as well.

    ::

        page   10        15        20        25
               |fffffffff|sssssssss|rrrrrrrrr|     two where r, which is read-only, comes after, or before
    """
    neighbours = {"before": _block(area, 10), "after": _block(area, 20)}
    neighbours[unlike].mprotect(PROT_READ)
    moved = _moved(relocate, area, _block(area, _AWAY), 15, MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        merged: Layout = [(10, 10), (20, 5)] if unlike == "after" else [(10, 5), (15, 10)]
        expect_layout(area, merged, f"relocated memory is all that its neighbour is, but for the one {unlike} it")
        _still_works(moved, *neighbours.values())


@plain_or_must
def test_between_the_halves_of_one_mapping(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 33, between-correct-faulted: the neighbours share their anon_vma, because they were one mapping. Without flag
    a stranger between them stays alone; only what was cut out there fits (row 36).

    ::

        page   0         5         10        15
               |fffffffff|fffffffff|fffffffff|
               |fffffffff|         |fffffffff|
               |fffffffff|sssssssss|fffffffff|          three; relocated: one
    """
    whole = area.map(0, 15).fill()
    area.reserve(5, 5)
    source = _block(area, _AWAY)
    moved = _moved(relocate, area, source, 5, flags)
    if moved is not None:
        expect_layout(area, [(0, 15)] if flags else _THREE, "a stranger between two that share their anon_vma")
        _still_works(whole.part(0, 5), moved, whole.part(10, 5))


@plain_or_must
@pytest.mark.parametrize("faulted", [True, False], ids=["faulted", "unfaulted"])
def test_a_neighbour_that_becomes_equal_later(relocate: bool, area: CarveOut, flags: int, faulted: bool) -> None:
    """Row 34, mprotect-later: the neighbour is read-only at the time of the move.

    ::

        page   0         5         10
               |fffffffff|sssssssss|          two
                read-only  writable
               |fffffffff|sssssssss|          two; relocated: one
                writable   writable
    """
    neighbour = _block(area, 0, faulted=faulted).mprotect(PROT_READ)
    moved = _moved(relocate, area, _block(area, _AWAY), 5, flags)
    if moved is not None:
        expect_layout(area, [(0, 5), (5, 5)], "different protections do not merge")
        neighbour.mprotect(PROT_RW)
        expect_layout(area, [(0, 10)] if flags else [(0, 5), (5, 5)], "moved, and then given equal protections")
        _still_works(moved, neighbour)


# --- unfaulted sources, and moves back ---------------------------------------------------------------------------


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
    """Row 35, unfaulted-plain: it has no pages that would hold it to an offset. Between two that were faulted
    separately it joins the first, and the second cannot join them: two anon_vmas.

    ::

        page   0         5         10        15
               |fffffffff|uuuuuuuuu|fffffffff|          moved between two faulted
               |-------------------|---------|
    """
    neighbours = [_block(area, at) for at in faulted] + [_block(area, at, faulted=False) for at in unfaulted]
    moved = move(_block(area, _AWAY, faulted=False), area.page(to)).check()
    expect_layout(area, merged, "unfaulted memory takes the offset of its new place")
    _still_works(moved, *neighbours)


@pytest.mark.parametrize("first", [0, 5, 10], ids=["head", "middle", "tail"])
def test_a_move_back_closes_the_hole(area: CarveOut, first: int) -> None:
    """Row 36, away-and-back: a hole made with mremap() is closed by moving the piece back: the offset it kept is the
    right one again. Twice, because the second time must find everything as the first time left it.

    ::

        page   0         5         10        15          30
               |fffffffff|fffffffff|fffffffff|                       one
               |fffffffff|         |fffffffff|     ...   |sssssssss| three
               |fffffffff|fffffffff|fffffffff|                       one
    """
    whole = area.map(0, 15).fill()
    frames = pagemap.pfns(whole.address, whole.pages)
    for _ in range(2):
        piece = move(whole.part(first, 5), area.page(_AWAY)).check()
        around = {0: [(5, 10)], 5: [(0, 5), (10, 5)], 10: [(0, 10)]}[first]
        expect_layout(area, [*around, (_AWAY, 5)], "a piece was moved out of the mapping")
        area.reserve(first, 5)
        move(piece, area.page(first))
        expect_layout(area, [(0, 15)], "the piece was moved back to where it was faulted in")
        whole.check()
    assert pagemap.pfns(whole.address, whole.pages) == frames, "moving a piece away and back changed page frames"
    assert_found(whole)


def test_a_whole_mapping_moved_back_merges_with_what_it_left(area: CarveOut) -> None:
    """Row 36, away-and-back: over an intermediate place, and back in two halves.

    ::

        page   0         5         10        20        30
               |fffffffff|sssssssss|
               |fffffffff|                   |sssssssss|
               |fffffffff|                             |sssssssss|
               |fffffffff|ssss                             |sssss|      the first two pages
               |fffffffff|sssssssss|                                    one again
    """
    whole = area.map(0, 10).fill()
    once = move(whole.part(5, 5), area.page(20))
    twice = move(once, area.page(_AWAY)).check()
    expect_layout(area, [(0, 5), (_AWAY, 5)], "moved away in two steps")
    move(twice.part(0, 2), area.page(5))
    expect_layout(area, [(0, 7), (_AWAY + 2, 3)], "the first two pages are back")
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
    """Rows 25 to 27 with the offset out of the way: the source returns to where it was faulted in, between neighbours
    that appeared meanwhile and were never touched. Linux 6.16 (879bca0a2c4f) lets faulted memory merge with unfaulted
    memory in every position; before, only an unfaulted range could be added to a faulted mapping, because
    is_mergeable_anon_vma() (mm/vma.c of 6.12) wants one anon_vma in the chain of its neighbour, which has none.

    ::

        page   0         5         10        15
                         |fffffffff|               faulted in here
                                                   moved away
               |uuuuuuuuu|         |uuuuuuuuu|     new
               |uuuuuuuuu|sssssssss|uuuuuuuuu|     moved back: one; before 6.16: three
    """
    away = move(_block(area, 5), area.page(_AWAY))
    neighbours = [_block(area, at, faulted=False) for at in new]
    moved = move(away, area.page(5)).check()
    apart = sorted([(5, 5), *[(at, 5) for at in new]])
    expect_layout(area, merged if system.release() >= (6, 16, 0) else apart, "the offset fits, one side is unfaulted")
    _still_works(moved, *neighbours)


@pytest.mark.parametrize("called", ["faulted", "unfaulted"])
@pytest.mark.parametrize("first", ["faulted", "unfaulted"])
def test_mprotect_merges_faulted_and_unfaulted_memory(area: CarveOut, first: str, called: str) -> None:
    """Rows 25 and 26 without any move: two halves of one mapping, one of them faulted in while they differ in
    protection, become equal. A call about the unfaulted half merges them on every kernel; a call about the faulted half
    does since Linux 6.16 (879bca0a2c4f), see above.

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|      one executable, one not
               |-------------------|      neither
    """
    # Not read-only: mprotect_fixup() (mm/mprotect.c) then drops VM_ACCOUNT of unfaulted memory alone, and the halves
    # would never be equal.
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
    _still_works(faulted, unfaulted)


# --- what only relocation can do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0, MREMAP_RELOCATE_ANON], ids=["plain-back", "relocate-back"])
def test_relocated_away_and_moved_back(relocate: bool, area: CarveOut, back: int) -> None:
    """Row 37, relocate-away-plain-back: relocated memory is native to the intermediate place, so that a plain move back
    does not close the hole; relocating it back does.

    ::

        page   0         5         10        15          30
               |fffffffff|         |fffffffff|     ...   |sssssssss|   relocated
               |fffffffff|sssssssss|fffffffff|                         three; relocated again: one
    """
    whole = area.map(0, 15).fill()
    moved = move_or_refused(relocate, area, whole.part(5, 5), area.page(_AWAY), MREMAP_RELOCATE_ANON)
    if moved is not None:
        area.reserve(5, 5)
        move(moved, area.page(5), back)
        expect_layout(area, [(0, 15)] if back else _THREE, "relocated away, and moved back with or without the flag")
        _still_works(whole)


@plain_or_must
@pytest.mark.parametrize("side", ["after", "before"])
def test_a_new_neighbour_joins_relocated_memory(relocate: bool, area: CarveOut, flags: int, side: str) -> None:
    """Row 38, isolated-then-merge: the destination has no neighbour at the time of the move.

    ::

        page   15        20        25        30
                         |sssssssss|               moved
                         |sssssssss|uuuuuuuuu|     new: two; relocated: one
    """
    moved = _moved(relocate, area, _block(area, 0), 20, flags)
    if moved is not None:
        expect_layout(area, [(20, 5)], "there was nothing to merge with")
        at = 25 if side == "after" else 15
        fresh = _block(area, at, faulted=False)
        apart = sorted([(20, 5), (at, 5)])
        expect_layout(area, [(min(20, at), 10)] if flags else apart, "new memory beside what was moved")
        _still_works(moved, fresh)


def test_an_unfaulted_source_must_relocate(relocate: bool, area: CarveOut) -> None:
    """Row 39, must-unfaulted: there is nothing to relocate, and so nothing that could fail.

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|      moved there with "must": one
    """
    neighbour = _block(area, 0)
    source = _block(area, _AWAY, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(5), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(0, 10)], "unfaulted memory takes the offset of its new place")
        _still_works(moved, neighbour)


#: Row 40: mappings after a plain move and after a relocation, by which of left, middle and right are faulted
_PERMUTATIONS: dict[tuple[bool, bool, bool], tuple[Layout, Layout]] = {
    (False, False, False): ([(0, 15)], [(0, 15)]),
    (False, False, True): ([(0, 15)], [(0, 15)]),
    (True, False, False): ([(0, 15)], [(0, 15)]),
    (True, False, True): ([(0, 10), (10, 5)], [(0, 10), (10, 5)]),
    (False, True, False): (_THREE, [(0, 15)]),
    (False, True, True): (_THREE, [(0, 15)]),
    (True, True, False): (_THREE, [(0, 15)]),
    (True, True, True): (_THREE, [(0, 5), (5, 10)]),
}


@pytest.mark.parametrize(
    "flags", [0, MREMAP_RELOCATE_ANON, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "relocate", "must"]
)
@pytest.mark.parametrize("faulted", _PERMUTATIONS, ids=lambda faulted: "".join("uf"[each] for each in faulted))
def test_every_combination(relocate: bool, area: CarveOut, flags: int, faulted: tuple[bool, bool, bool]) -> None:
    """Row 40, 8-permutations: all combinations of faulted and unfaulted.

    ::

        page   0         5         10        15
               |  left   | middle  |  right  |      the middle one is moved in
    """
    first, last = _block(area, 0, faulted=faulted[0]), _block(area, 10, faulted=faulted[2])
    moved = _moved(relocate, area, _block(area, _AWAY, faulted=faulted[1]), 5, flags)
    if moved is not None:
        plain, relocated = _PERMUTATIONS[faulted]
        expect_layout(area, relocated if flags else plain, "all three may merge, as far as anon_vmas and offsets allow")
        _still_works(first, moved, last)


@plain_or_must
def test_the_middle_of_a_mapping(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 41, partial-middle: the source is split in two, on every kernel.

    ::

        page   0         5         10        15        20        25        30
               |fffffffff|sssssssss|fffffffff|         |uuuuuuuuu|
               |fffffffff|         |fffffffff|         |uuuuuuuuu|sssssssss|   four; relocated: three
    """
    whole = area.map(0, 15).fill()
    neighbour = _block(area, 20, faulted=False)
    moved = _moved(relocate, area, whole.part(5, 5), 25, flags)
    if moved is not None:
        there = [(20, 10)] if flags else [(20, 5), (25, 5)]
        expect_layout(area, [(0, 5), (10, 5), *there], "the middle was moved next to unfaulted memory")
        _still_works(moved, whole.part(0, 5), whole.part(10, 5), neighbour)


def test_relocating_and_keeping_the_source(relocate: bool, area: CarveOut) -> None:
    """Row 42, dontunmap-relocate: the source stays mapped, empty, and as good as new.

    ::

        page   0         5         20        25        30
               |sssssssss|         |uuuuuuuuu|
               |    0    |         |uuuuuuuuu|sssssssss|    relocated: merged at its new place
    """
    source, neighbour = _block(area, 0), _block(area, 20, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(25), MREMAP_MUST_RELOCATE_ANON | MREMAP_DONTUNMAP)
    if moved is not None:
        expect_layout(area, [(0, 5), (20, 10)], "relocated from a source that stays")
        assert pagemap.pfns(source.address, 5) == [None] * 5, "the source kept pages that were moved"
        source.check()
        _still_works(moved, source, neighbour)


@pytest.mark.parametrize(("first", "to"), [(0, 10), (5, -5)], ids=["head-behind", "tail-in-front"])
def test_a_copy_beside_what_it_was_made_of(relocate: bool, area: CarveOut, first: int, to: int) -> None:
    """Row 42, dontunmap-relocate: the source stays, and is no neighbour to merge with, although part of it was moved
    and another part is what lies beside.

    ::

        page   10        15        20        25
               |sssssssss|fffffffff|
               |    0    |fffffffff|sssssssss|    two
    """
    source = area.map(10, 10).fill()
    expected = sorted([(10, 10), (10 + to, 5)])
    part = source.part(first, 5)
    flags = MREMAP_MUST_RELOCATE_ANON | MREMAP_DONTUNMAP
    moved = move_or_refused(relocate, area, part, area.page(10 + to), flags)
    if moved is not None:
        expect_layout(area, expected, "a copy beside its source")
        _still_works(moved, source.part(5 - first, 5))


@pytest.mark.parametrize("fixed", [True, False], ids=["to-a-place", "anywhere"])
def test_growing_while_relocating(relocate: bool, area: CarveOut, fixed: bool) -> None:
    """Row 43, grow-move: there is no room in place, because the carve-out's reservation follows.

    ::

        page   0         5         15        20        25        30
               |sssssssss|         |uuuuuuuuu|
                                   |uuuuuuuuu|sssssssss 000000000|    relocated: one
    """
    source, neighbour = _block(area, 0), _block(area, 15, faulted=False)
    before = pagemap.pfns(source.address, 5)
    to = area.page(20) if fixed else None
    moved = move_or_refused(relocate, area, source, to, MREMAP_MUST_RELOCATE_ANON, pages=10)
    if moved is not None:
        assert moved.address != source.address, "there was no room in place"
        expect_layout(area, [(15, 15)] if fixed else [(15, 5)], "five pages were relocated and grew to ten")
        assert pagemap.pfns(moved.address, 5) == before, "relocation changed page frames"
        _still_works(moved.part(0, 5), moved.part(5, 5), neighbour)
        if not fixed:
            moved.unmap()


def test_shrinking_while_relocating(relocate: bool, area: CarveOut) -> None:
    """Row 44, mremap-shrink-move: five of ten pages arrive, the others are gone.

    ::

        page   0         5         10        15        20        25
               |sssssssss sssssssss|         |uuuuuuuuu|
                                             |uuuuuuuuu|sssssssss|    relocated: one
    """
    source, neighbour = area.map(0, 10).fill(), _block(area, 15, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON, pages=5)
    if moved is not None:
        expect_layout(area, [(15, 10)], "five of ten pages were relocated")
        assert not maps.vmas_between(source.address, source.end), "the source is still mapped"
        _still_works(moved, neighbour)


def test_a_neighbour_of_another_name(relocate: bool, area: CarveOut) -> None:
    """Row 45, named-vma: names must be equal to merge, and nothing else is in the way once it is relocated.

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different names; one as soon as the names are equal
    """
    neighbour, source = _block(area, 15, faulted=False), _block(area, 0)
    try:
        syscalls.name_anonymous(neighbour.address, neighbour.length, "neighbour")
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("needs CONFIG_ANON_VMA_NAME=y: this kernel has it off")
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(15, 5), (20, 5)], "different names do not merge")
        syscalls.name_anonymous(moved.address, moved.length, "neighbour")
        expect_layout(area, [(15, 10)], "relocated, then equal names")
        _still_works(moved, neighbour)


def test_a_neighbour_of_another_memory_policy(relocate: bool, area: CarveOut) -> None:
    """Row 46, mempolicy-differs: like row 45 for memory policies.

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different policies; one as soon as the policies are equal
    """
    system.require_config("NUMA")
    neighbour, source = _block(area, 15, faulted=False), _block(area, 0)
    node = numa.nodes()[0]
    numa.mbind(neighbour.address, neighbour.length, numa.MPOL_BIND, [node])
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(15, 5), (20, 5)], "different memory policies do not merge")
        numa.mbind(moved.address, moved.length, numa.MPOL_BIND, [node])
        expect_layout(area, [(15, 10)], "relocated, then equal memory policies")
        numa.mbind(moved.address, moved.length, numa.MPOL_DEFAULT, [])  # the check migrates to the other node
        _still_works(moved, neighbour)
