# SPDX-License-Identifier: GPL-2.0
"""Which mappings become one when faulted memory moves next to one or two neighbours: rows 25 to 34.

Anonymous memory that was never faulted in gets the page offset (``vm_pgoff``) of the place that it moves to, so that it
merges with compatible neighbours. Memory that was faulted in keeps the offset of the place where that happened, because
the reverse map finds its pages by that offset. At another place no neighbour continues the offset, and nothing merges.
Relocation rewrites the pages, so that the memory can get the offset of its new place.

The rules are copy_vma(), vma_merge_new_range() and is_mergeable_anon_vma() in mm/vma.c of Linux 6.12 and 7.3. Pictures
show pages of the carve-out: ``f`` faulted, ``u`` unfaulted, ``s`` the faulted source, all in blocks of five pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from guest_tests.mm.mapping import CarveOut
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, PROT_READ, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.merging import AWAY, THREE, Layout, block, move_to_page, plain_or_must, still_works

pytestmark = pytest.mark.shared_guest


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
    neighbours = [block(area, at) for at in faulted] + [block(area, at, faulted=False) for at in unfaulted]
    source = block(area, AWAY)
    moved = move_to_page(relocate, area, source, to, flags)
    if moved is not None:
        why = (
            "relocated memory merges like native memory" if flags else "moved memory keeps the offset of its old place"
        )
        expect_layout(area, relocated if flags else plain, why)
        still_works(moved, *neighbours)


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
    _move_between(relocate, area, flags, unfaulted=[0, 10], to=5, plain=THREE, relocated=[(0, 15)])


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
    _move_between(relocate, area, flags, faulted=[0], unfaulted=[10], to=5, plain=THREE, relocated=[(0, 15)])


@plain_or_must
def test_between_unfaulted_and_faulted(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 31 (between-unfaulted-faulted): faulted memory moves between an unfaulted and a faulted mapping.

    ::

        page   0         5         10        15
               |uuuuuuuuu|sssssssss|fffffffff|          three; relocated: one

    Unpatched: three mappings after a plain move: the offset of the source fits neither neighbour.
    Patched: one mapping of 15 pages.
    """
    _move_between(relocate, area, flags, faulted=[10], unfaulted=[0], to=5, plain=THREE, relocated=[(0, 15)])


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
    _move_between(relocate, area, flags, faulted=[0, 10], to=5, plain=THREE, relocated=[(0, 5), (5, 10)])


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
    neighbours = {"before": block(area, 10), "after": block(area, 20)}
    neighbours[unlike].mprotect(PROT_READ)
    moved = move_to_page(relocate, area, block(area, AWAY), 15, MREMAP_MUST_RELOCATE_ANON)
    if moved is not None:
        merged: Layout = [(10, 10), (20, 5)] if unlike == "after" else [(10, 5), (15, 10)]
        expect_layout(area, merged, f"relocated memory merges, except with the read-only neighbour {unlike} it")
        still_works(moved, *neighbours.values())


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
    source = block(area, AWAY)
    moved = move_to_page(relocate, area, source, 5, flags)
    if moved is not None:
        expect_layout(area, [(0, 15)] if flags else THREE, "a stranger between two that share their anon_vma")
        still_works(whole.part(0, 5), moved, whole.part(10, 5))


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
    neighbour = block(area, 0, faulted=faulted).mprotect(PROT_READ)
    moved = move_to_page(relocate, area, block(area, AWAY), 5, flags)
    if moved is not None:
        expect_layout(area, [(0, 5), (5, 5)], "different protections do not merge")
        neighbour.mprotect(PROT_RW)
        expect_layout(area, [(0, 10)] if flags else [(0, 5), (5, 5)], "moved, and then given equal protections")
        still_works(moved, neighbour)
