# SPDX-License-Identifier: GPL-2.0
"""Merges of relocated memory, also when it grows or shrinks, and attributes that keep it apart: rows 37 to 46.

Pictures as in :mod:`guest_tests.test_merge`.
"""

from __future__ import annotations

import pytest

from guest_tests.mm import maps, numa, pagemap, syscalls, system
from guest_tests.mm.mapping import CarveOut, move
from guest_tests.mm.syscalls import MREMAP_DONTUNMAP, MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.support.checks import expect_layout
from guest_tests.support.merging import AWAY, THREE, Layout, block, move_to_page, plain_or_must, still_works
from guest_tests.support.moves import move_or_refused

pytestmark = pytest.mark.shared_guest


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
    moved = move_or_refused(relocate, area, whole.part(5, 5), area.page(AWAY), MREMAP_RELOCATE_ANON)
    if moved is not None:
        area.reserve(5, 5)
        move(moved, area.page(5), back)
        expect_layout(area, [(0, 15)] if back else THREE, "relocated away, and moved back with or without the flag")
        still_works(whole)


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
    moved = move_to_page(relocate, area, block(area, 0), 20, flags)
    if moved is not None:
        expect_layout(area, [(20, 5)], "there was nothing to merge with")
        at = 25 if side == "after" else 15
        fresh = block(area, at, faulted=False)
        apart = sorted([(20, 5), (at, 5)])
        expect_layout(area, [(min(20, at), 10)] if flags else apart, "new memory beside what was moved")
        still_works(moved, fresh)


def test_an_unfaulted_source_must_relocate(relocate: bool, area: CarveOut) -> None:
    """Row 39 (must-unfaulted): unfaulted memory moves with flag 16 next to a faulted neighbour.

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|      moved there with "must": one

    Unpatched: EINVAL, and nothing changes.
    Patched: success, although there is nothing to relocate; one mapping of ten pages.
    """
    neighbour = block(area, 0)
    source = block(area, AWAY, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(5), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(0, 10)], "unfaulted memory takes the offset of its new place")
        still_works(moved, neighbour)


#: Row 40: which of left, middle and right are faulted; the mappings after a plain move and after a relocation
_PERMUTATIONS: dict[tuple[bool, bool, bool], tuple[Layout, Layout]] = {
    (False, False, False): ([(0, 15)], [(0, 15)]),
    (False, False, True): ([(0, 15)], [(0, 15)]),
    (True, False, False): ([(0, 15)], [(0, 15)]),
    (True, False, True): ([(0, 10), (10, 5)], [(0, 10), (10, 5)]),
    (False, True, False): (THREE, [(0, 15)]),
    (False, True, True): (THREE, [(0, 15)]),
    (True, True, False): (THREE, [(0, 15)]),
    (True, True, True): (THREE, [(0, 5), (5, 10)]),
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
    first, last = block(area, 0, faulted=faulted[0]), block(area, 10, faulted=faulted[2])
    moved = move_to_page(relocate, area, block(area, AWAY, faulted=faulted[1]), 5, flags)
    if moved is not None:
        plain, relocated = _PERMUTATIONS[faulted]
        expect_layout(area, relocated if flags else plain, "all three may merge, as far as anon_vmas and offsets allow")
        still_works(first, moved, last)


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
    neighbour = block(area, 20, faulted=False)
    moved = move_to_page(relocate, area, whole.part(5, 5), 25, flags)
    if moved is not None:
        there = [(20, 10)] if flags else [(20, 5), (25, 5)]
        expect_layout(area, [(0, 5), (10, 5), *there], "the middle was moved next to unfaulted memory")
        still_works(moved, whole.part(0, 5), whole.part(10, 5), neighbour)


def test_relocating_and_keeping_the_source(relocate: bool, area: CarveOut) -> None:
    """Row 42 (dontunmap-relocate): faulted memory is relocated with DONTUNMAP next to unfaulted memory.

    ::

        page   0         5         20        25        30
               |sssssssss|         |uuuuuuuuu|
               |    0    |         |uuuuuuuuu|sssssssss|    relocated: merged at its new place

    Unpatched: EINVAL, and nothing changes.
    Patched: the moved memory merges at its new place; the source is mapped, reads as zero and can be used.
    """
    source, neighbour = block(area, 0), block(area, 20, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(25), MREMAP_MUST_RELOCATE_ANON | MREMAP_DONTUNMAP)
    if moved is not None:
        expect_layout(area, [(0, 5), (20, 10)], "relocated from a source that stays")
        assert pagemap.pfns(source.address, 5) == [None] * 5, "the source kept pages that were moved"
        source.check()
        still_works(moved, source, neighbour)


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
        still_works(moved, source.part(5 - first, 5))


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
    source, neighbour = block(area, 0), block(area, 15, faulted=False)
    before = pagemap.pfns(source.address, 5)
    to = area.page(20) if fixed else None
    moved = move_or_refused(relocate, area, source, to, MREMAP_MUST_RELOCATE_ANON, pages=10)
    if moved is not None:
        assert moved.address != source.address, "there was no room in place"
        expect_layout(area, [(15, 15)] if fixed else [(15, 5)], "five pages were relocated and grew to ten")
        assert pagemap.pfns(moved.address, 5) == before, "relocation changed page frames"
        still_works(moved.part(0, 5), moved.part(5, 5), neighbour)
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
    source, neighbour = area.map(0, 10).fill(), block(area, 15, faulted=False)
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON, pages=5)
    if moved is not None:
        expect_layout(area, [(15, 10)], "five of ten pages were relocated")
        assert not maps.vmas_between(source.address, source.end), "the source is still mapped"
        still_works(moved, neighbour)


def _once_equal() -> Layout:
    """Unfaulted pages 15 to 20 and relocated ones behind them, which a call made equal to them.

    It is not the relocation that merges them. So the rule of the kernel counts: before Linux 6.16, a faulted mapping
    that is changed did not merge with an unfaulted one (879bca0a2c4f).
    """
    return [(15, 10)] if system.release() >= (6, 16, 0) else [(15, 5), (20, 5)]


def test_a_neighbour_of_another_name(relocate: bool, area: CarveOut) -> None:
    """Row 45 (named-vma): faulted memory is relocated next to memory of another name (PR_SET_VMA_ANON_NAME).

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different names; one as soon as the names are equal

    Unpatched: EINVAL, and nothing changes.
    Patched: two mappings, and one as soon as the names are equal, since Linux 6.16.
    """
    system.require_vma_names()
    neighbour, source = block(area, 15, faulted=False), block(area, 0)
    syscalls.name_anonymous(neighbour.address, neighbour.length, "neighbour")
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(15, 5), (20, 5)], "different names do not merge")
        syscalls.name_anonymous(moved.address, moved.length, "neighbour")
        expect_layout(area, _once_equal(), "relocated, then equal names")
        still_works(moved, neighbour)


def test_a_neighbour_of_another_memory_policy(relocate: bool, area: CarveOut) -> None:
    """Row 46 (mempolicy-differs): faulted memory is relocated next to memory of another memory policy (mbind()).

    ::

        page   15        20        25
               |uuuuuuuuu|sssssssss|     two of different policies; one as soon as the policies are equal

    Unpatched: EINVAL, and nothing changes.
    Patched: two mappings, and one as soon as the policies are equal, since Linux 6.16.
    """
    system.require_config("NUMA")
    neighbour, source = block(area, 15, faulted=False), block(area, 0)
    node = numa.nodes()[0]
    numa.mbind(neighbour.address, neighbour.length, numa.MPOL_BIND, [node])
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        expect_layout(area, [(15, 5), (20, 5)], "different memory policies do not merge")
        numa.mbind(moved.address, moved.length, numa.MPOL_BIND, [node])
        expect_layout(area, _once_equal(), "relocated, then equal memory policies")
        numa.mbind(moved.address, moved.length, numa.MPOL_DEFAULT, [])  # the check migrates to the other node
        still_works(moved, neighbour)
