# SPDX-License-Identifier: GPL-2.0
"""Which mappings become one when memory moves: rows 25 to 46.

Anonymous memory that was never faulted in gets the page offset (``vm_pgoff``) of the place that it moves to, so that it
merges with compatible neighbours. Memory that was faulted in keeps the offset of the place where that happened, because
the reverse map finds its pages by that offset. At another place no neighbour continues the offset, and nothing merges.
Relocation rewrites the pages, so that the memory can get the offset of its new place.

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

#: run a test with a plain move and with flag 16
plain_or_must = pytest.mark.parametrize("flags", [0, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "must"])


def _block(area: CarveOut, at: int, *, faulted: bool = True) -> Mapping:
    mapping = area.map(at, _BLOCK)
    return mapping.fill(seed=at) if faulted else mapping


def _moved(relocate: bool, area: CarveOut, source: Mapping, to: int, flags: int) -> Mapping | None:
    """Move to page ``to``, and assert that frames and data are the same; None if the flag was refused.

    The check of the data reads pages that were never touched. That maps the zero page and gives them no anon_vma.
    """
    before = pagemap.pfns(source.address, source.pages)
    moved = move_or_refused(relocate, area, source, area.page(to), flags)
    if moved is not None:
        for old, new in zip(before, pagemap.pfns(moved.address, moved.pages), strict=True):
            assert old in (None, new), f"the move changed a page frame from {old} to {new}"
    return moved


def _still_works(*mappings: Mapping) -> None:
    """Assert that all data is right, that untouched memory can be faulted in, and that every page is found."""
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
    """Move five faulted pages from far away to page ``to``, and assert what merges.

    :param faulted: where faulted neighbours begin, in pages of ``area``.
    :param unfaulted: where unfaulted neighbours begin.
    :param plain: the mappings after a move without flag, as :func:`guest_tests.support.checks.layout` gives them.
    :param relocated: the mappings after a relocation.
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
    """Row 25 (after-unfaulted): faulted memory moves to the place right behind unfaulted memory.

    ::

        page   0         5         10
               |uuuuuuuuu|sssssssss|          two; relocated: one

    Unpatched: two mappings after a plain move.
    Patched: one mapping of ten pages.
    """
    _move_between(relocate, area, flags, unfaulted=[0], to=5, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_before_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 26 (before-unfaulted): faulted memory moves to the place right before unfaulted memory.

    ::

        page   0         5         10
               |sssssssss|uuuuuuuuu|          two; relocated: one

    Unpatched: two mappings after a plain move.
    Patched: one mapping of ten pages.
    """
    _move_between(relocate, area, flags, unfaulted=[5], to=0, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_between_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 27 (between-unfaulted): faulted memory moves between two unfaulted mappings.

    ::

        page   0         5         10        15
               |uuuuuuuuu|sssssssss|uuuuuuuuu|          three; relocated: one

    Unpatched: three mappings after a plain move.
    Patched: one mapping of 15 pages.
    """
    _move_between(relocate, area, flags, unfaulted=[0, 10], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_after_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 28 (after-faulted): faulted memory moves to the place right behind other faulted memory.

    ::

        page   0         5         10
               |fffffffff|sssssssss|          two; relocated: one

    Unpatched: two mappings after a plain move.
    Patched: one mapping of ten pages.
    """
    _move_between(relocate, area, flags, faulted=[0], to=5, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_before_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 29 (before-faulted): faulted memory moves to the place right before other faulted memory.

    ::

        page   0         5         10
               |sssssssss|fffffffff|          two; relocated: one

    Unpatched: two mappings after a plain move.
    Patched: one mapping of ten pages.
    """
    _move_between(relocate, area, flags, faulted=[5], to=0, plain=[(0, 5), (5, 5)], relocated=[(0, 10)])


@plain_or_must
def test_between_faulted_and_unfaulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 30 (between-faulted-unfaulted): faulted memory moves between a faulted and an unfaulted mapping.

    ::

        page   0         5         10        15
               |fffffffff|sssssssss|uuuuuuuuu|          three; relocated: one

    Unpatched: three mappings after a plain move: the offset of the source fits neither neighbour.
    Patched: one mapping of 15 pages.
    """
    _move_between(relocate, area, flags, faulted=[0], unfaulted=[10], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_between_unfaulted_and_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 31 (between-unfaulted-faulted): faulted memory moves between an unfaulted and a faulted mapping.

    ::

        page   0         5         10        15
               |uuuuuuuuu|sssssssss|fffffffff|          three; relocated: one

    Unpatched: three mappings after a plain move: the offset of the source fits neither neighbour.
    Patched: one mapping of 15 pages.
    """
    _move_between(relocate, area, flags, faulted=[10], unfaulted=[0], to=5, plain=_THREE, relocated=[(0, 15)])


@plain_or_must
def test_between_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 32 (between-faulted): faulted memory moves between two mappings that were faulted in separately.

    Each neighbour has an anon_vma of its own. Relocated memory can share only one of them, and
    find_mergeable_anon_vma() (mm/vma.c) prefers that of the mapping behind it.

    ::

        page   0         5         10        15
               |fffffffff|sssssssss|fffffffff|          three; relocated: the right pair is one

    Unpatched: three mappings after a plain move.
    Patched: two mappings: the moved one merges with the neighbour behind it.
    """
    _move_between(relocate, area, flags, faulted=[0, 10], to=5, plain=_THREE, relocated=[(0, 5), (5, 10)])


@pytest.mark.parametrize("unlike", ["before", "after"])
def test_between_a_neighbour_alike_and_one_that_is_not(relocate: bool, area: CarveOut, unlike: str) -> None:
    """Row 32 (between-faulted): only one of two faulted neighbours has the same protection as the source.

    The kernel must join the anon_vma of that neighbour, although it could join that of the other as well.

    ::

        page   10        15        20        25
               |fffffffff|sssssssss|rrrrrrrrr|     two where r, which is read-only, comes after, or before

    Unpatched: EINVAL, and nothing changes.
    Patched: the moved memory merges with the neighbour of the same protection.
    """
    neighbours = {"before": _block(area, 10), "after": _block(area, 20)}
    neighbours[unlike].mprotect(PROT_READ)
    moved = _moved(relocate, area, _block(area, _AWAY), 15, MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        merged: Layout = [(10, 10), (20, 5)] if unlike == "after" else [(10, 5), (15, 10)]
        expect_layout(area, merged, f"relocated memory merges, except with the read-only neighbour {unlike} it")
        _still_works(moved, *neighbours.values())


@plain_or_must
def test_between_the_halves_of_one_mapping(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 33 (between-correct-faulted): faulted memory moves between two neighbours that were one mapping and share an
    anon_vma.

    ::

        page   0         5         10        15
               |fffffffff|fffffffff|fffffffff|
               |fffffffff|         |fffffffff|
               |fffffffff|sssssssss|fffffffff|          three; relocated: one

    Unpatched: three mappings after a plain move; only what was cut out there would fit (row 36).
    Patched: one mapping of 15 pages.
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
    """Row 34 (mprotect-later): the neighbour is read-only during the move, and is made writable afterwards.

    ::

        page   0         5         10
               |fffffffff|sssssssss|          two
                read-only  writable
               |fffffffff|sssssssss|          two; relocated: one
                writable   writable

    Unpatched: two mappings, also after mprotect().
    Patched: two mappings, and one after mprotect().
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
    """Row 35 (unfaulted-plain): unfaulted memory moves plainly next to faulted and unfaulted neighbours.

    It has no pages that would bind it to an offset. Between two mappings that were faulted in separately it joins the
    first one. The second cannot join them, because the anon_vmas differ.

    ::

        page   0         5         10        15
               |fffffffff|uuuuuuuuu|fffffffff|          moved between two faulted
               |-------------------|---------|

    Every kernel: it merges with its neighbours, as far as these share an anon_vma.
    """
    neighbours = [_block(area, at) for at in faulted] + [_block(area, at, faulted=False) for at in unfaulted]
    moved = move(_block(area, _AWAY, faulted=False), area.page(to)).check()
    expect_layout(area, merged, "unfaulted memory takes the offset of its new place")
    _still_works(moved, *neighbours)


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
    away = move(_block(area, 5), area.page(_AWAY))
    neighbours = [_block(area, at, faulted=False) for at in new]
    moved = move(away, area.page(5)).check()
    apart = sorted([(5, 5), *[(at, 5) for at in new]])
    expect_layout(area, merged if system.release() >= (6, 16, 0) else apart, "the offset fits, one side is unfaulted")
    _still_works(moved, *neighbours)


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
    _still_works(faulted, unfaulted)


# --- what only relocation can do ---------------------------------------------------------------------------------


@pytest.mark.parametrize("back", [0, MREMAP_RELOCATE_ANON], ids=["plain-back", "relocate-back"])
def test_relocated_away_and_moved_back(relocate: bool, area: CarveOut, back: int) -> None:
    """Row 37 (relocate-away-plain-back): a piece is relocated out of a mapping with flag 8, and comes back plainly or
    with flag 8.

    ::

        page   0         5         10        15          30
               |fffffffff|         |fffffffff|     ...   |sssssssss|   relocated
               |fffffffff|sssssssss|fffffffff|                         three; relocated again: one

    Unpatched: EINVAL, and nothing changes.
    Patched: a plain move back leaves three mappings, because the piece has the offset of the place in between; with
    flag 8 there is one.
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
    """Row 38 (isolated-then-merge): the moved memory has no neighbour; new memory is mapped next to it afterwards.

    ::

        page   15        20        25        30
                         |sssssssss|               moved
                         |sssssssss|uuuuuuuuu|     new: two; relocated: one

    Unpatched: two mappings after a plain move.
    Patched: one mapping: new memory joins relocated memory.
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
    """Row 39 (must-unfaulted): unfaulted memory moves with flag 16 next to a faulted neighbour.

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|      moved there with "must": one

    Unpatched: EINVAL, and nothing changes.
    Patched: success, although there is nothing to relocate; one mapping of ten pages.
    """
    neighbour = _block(area, 0)
    source = _block(area, _AWAY, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(5), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(0, 10)], "unfaulted memory takes the offset of its new place")
        _still_works(moved, neighbour)


#: Row 40: which of left, middle and right are faulted; the mappings after a plain move and after a relocation
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
    """Row 40 (8-permutations): the middle one of three mappings is moved in, for all combinations of faulted and
    unfaulted.

    ::

        page   0         5         10        15
               |  left   | middle  |  right  |      the middle one is moved in

    Unpatched: an unfaulted middle merges, as far as the neighbours share an anon_vma; a faulted middle stays alone
    after a plain move.
    Patched: an unfaulted middle merges as on an unpatched kernel. A faulted middle merges with both neighbours, or with
    the one behind it if both are faulted.
    """
    first, last = _block(area, 0, faulted=faulted[0]), _block(area, 10, faulted=faulted[2])
    moved = _moved(relocate, area, _block(area, _AWAY, faulted=faulted[1]), 5, flags)
    if moved is not None:
        plain, relocated = _PERMUTATIONS[faulted]
        expect_layout(area, relocated if flags else plain, "all three may merge, as far as anon_vmas and offsets allow")
        _still_works(first, moved, last)


@plain_or_must
def test_the_middle_of_a_mapping(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 41 (partial-middle): the middle of a faulted mapping moves next to unfaulted memory.

    ::

        page   0         5         10        15        20        25        30
               |fffffffff|sssssssss|fffffffff|         |uuuuuuuuu|
               |fffffffff|         |fffffffff|         |uuuuuuuuu|sssssssss|   four; relocated: three

    Unpatched: the source is split in two, and the moved part stays alone after a plain move.
    Patched: the source is split in two, and the moved part merges at its new place.
    """
    whole = area.map(0, 15).fill()
    neighbour = _block(area, 20, faulted=False)
    moved = _moved(relocate, area, whole.part(5, 5), 25, flags)
    if moved is not None:
        there = [(20, 10)] if flags else [(20, 5), (25, 5)]
        expect_layout(area, [(0, 5), (10, 5), *there], "the middle was moved next to unfaulted memory")
        _still_works(moved, whole.part(0, 5), whole.part(10, 5), neighbour)


def test_relocating_and_keeping_the_source(relocate: bool, area: CarveOut) -> None:
    """Row 42 (dontunmap-relocate): faulted memory is relocated with DONTUNMAP next to unfaulted memory.

    ::

        page   0         5         20        25        30
               |sssssssss|         |uuuuuuuuu|
               |    0    |         |uuuuuuuuu|sssssssss|    relocated: merged at its new place

    Unpatched: EINVAL, and nothing changes.
    Patched: the moved memory merges at its new place; the source is mapped, reads as zero and can be used.
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
    """Row 42 (dontunmap-relocate): part of a mapping is relocated with DONTUNMAP to the place right beside that
    mapping.

    ::

        page   10        15        20        25
               |sssssssss|fffffffff|
               |    0    |fffffffff|sssssssss|    two

    Unpatched: EINVAL, and nothing changes.
    Patched: two mappings: the source is no neighbour to merge with.
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
    """Row 43 (grow-move): five pages are relocated and grow to ten, because the carve-out's reservation leaves no room
    in place.

    ::

        page   0         5         15        20        25        30
               |sssssssss|         |uuuuuuuuu|
                                   |uuuuuuuuu|sssssssss 000000000|    relocated: one

    Unpatched: EINVAL, and nothing changes.
    Patched: the first five pages keep their frames, the other five are zero, and all merge with an unfaulted neighbour.
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
    """Row 44 (mremap-shrink-move): ten pages are relocated to a place and shrink to five.

    ::

        page   0         5         10        15        20        25
               |sssssssss sssssssss|         |uuuuuuuuu|
                                             |uuuuuuuuu|sssssssss|    relocated: one

    Unpatched: EINVAL, and nothing changes.
    Patched: five pages arrive and merge with an unfaulted neighbour; nothing is mapped at the source.
    """
    source, neighbour = area.map(0, 10).fill(), _block(area, 15, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON, pages=5)
    if moved is not None:
        expect_layout(area, [(15, 10)], "five of ten pages were relocated")
        assert not maps.vmas_between(source.address, source.end), "the source is still mapped"
        _still_works(moved, neighbour)


def test_a_neighbour_of_another_name(relocate: bool, area: CarveOut) -> None:
    """Row 45 (named-vma): faulted memory is relocated next to memory of another name (PR_SET_VMA_ANON_NAME).

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different names; one as soon as the names are equal

    Unpatched: EINVAL, and nothing changes.
    Patched: two mappings, and one as soon as the names are equal.
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
    """Row 46 (mempolicy-differs): faulted memory is relocated next to memory of another memory policy (mbind()).

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different policies; one as soon as the policies are equal

    Unpatched: EINVAL, and nothing changes.
    Patched: two mappings, and one as soon as the policies are equal.
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
