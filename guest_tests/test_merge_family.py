# SPDX-License-Identifier: GPL-2.0
"""Pieces of one mapping that move separately, and moves in processes that share memory by fork.

A child's copy of a VMA gets an anon_vma of its own, and its chain has that one and all of the parent's. The VMA of the
parent is linked to one anon_vma only, as before. A VMA with more than one in its chain neither takes in a VMA without
any nor gives its own to one (vma_is_fork_child(), mm/vma.c of 7.3). Two VMAs with the same anon_vma always merge.
"""

from __future__ import annotations

from itertools import permutations
from typing import Final

import pytest

from guest_tests.mm import pagemap, system
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON, PROT_EXEC, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found, assert_found_at
from guest_tests.support.merging import BLOCK, Layout
from guest_tests.support.moves import lenient_ways, move_or_refused, refused_move

pytestmark = pytest.mark.shared_guest

# --- pieces ------------------------------------------------------------------------------------------------------

#: where the three pieces of a mapping wait: none beside another
_AWAY: Final = (17, 24, 31)


@pytest.mark.parametrize("flags", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])
@pytest.mark.parametrize(
    "order", list(permutations(range(3))), ids=lambda order: "".join("lmr"[each] for each in order)
)
def test_pieces_come_back_in_any_order(relocate: bool, area: CarveOut, flags: int, order: tuple[int, ...]) -> None:
    """Row 36 (away-and-back): the left, middle and right piece of a mapping move away, all of them, and come back in
    each order, with and without flag 8 on both ways.

    After plain moves all pieces have the anon_vma and the offsets of the mapping. After relocations a piece shares the
    anon_vma of a neighbour that is there when it comes back. If the middle one comes last, left and right have
    different ones, and find_mergeable_anon_vma() (mm/vma.c) takes that of the mapping behind.

    ::

        page   0         5         10        15  17        22  24        29  31        36
               |  left   | middle  |  right  |
                                                 |  left   |   | middle  |   |  right  |
               |  left   | middle  |  right  |   one; relocated, the middle one last: (0, 5), (5, 10)

    Unpatched: one mapping again after plain moves, with the same frames; EINVAL with the flag.
    Patched: the same after plain moves; after relocations one, or two if the middle piece comes last.
    """
    whole = area.map(0, 3 * BLOCK).fill()
    frames = pagemap.pfns(whole.address, whole.pages)
    pieces: list[Mapping] = []
    for number, to in enumerate(_AWAY):
        piece = move_or_refused(relocate, area, whole.part(number * BLOCK, BLOCK), area.page(to), flags)
        if piece is None:
            return
        pieces.append(piece)
    expect_layout(area, [(to, BLOCK) for to in _AWAY], "every piece was moved away")
    area.reserve(0, 3 * BLOCK)
    for number in order:
        move(pieces[number], area.page(number * BLOCK), flags).check()
    split = bool(flags) and order[-1] == 1
    why = "relocated back between two pieces with anon_vmas of their own" if split else "every piece was moved back"
    expect_layout(area, [(0, 5), (5, 10)] if split else [(0, 15)], why)
    whole.check()
    now = pagemap.pfns(whole.address, whole.pages)
    assert now == frames, f"moving pieces away and back changed page frames {frames} to {now}"
    assert_found(whole)


def test_pieces_that_change_places_stay_apart(area: CarveOut) -> None:
    """Row 36 (away-and-back): the three pieces of a mapping move side by side in another order, and home from there.

    ::

        page   0         5         10        15        20        25        30        35
               |  left   | middle  |  right  |
                                                       |  right  |  left   | middle  |   two: left and middle
               |  left   | middle  |  right  |                                           one again

    Every kernel: what follows each other as it did in the mapping merges, also away from home; the offset of the right
    piece does not continue before that of the left one. At home all are one mapping again.
    """
    whole = area.map(0, 3 * BLOCK).fill()
    right, left, middle = (move(whole.part(at, BLOCK), area.page(to)) for at, to in ((10, 20), (0, 25), (5, 30)))
    expect_layout(area, [(20, 5), (25, 10)], "left and middle follow each other, right and left do not")
    assert_found(right, left, middle)
    area.reserve(0, 3 * BLOCK)
    for piece, to in ((middle, 5), (right, 10), (left, 0)):
        move(piece, area.page(to)).check()
    expect_layout(area, [(0, 15)], "every piece was moved home")
    whole.check()
    assert_found(whole)


# --- parts of shared memory --------------------------------------------------------------------------------------


@lenient_ways
def test_parent_and_child_move_different_parts(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 49 (fork-best-effort): after a fork the parent moves the middle of a mapping away, and the child its right
    part. Both write to what they moved, and move it back.

    ::

        page          0         5         10        15        20        25        30
        parent        |  left   |         |  right  |         | middle  |
        child         |  left   | middle  |                             |  right  |
        both, after   |  left   | middle  |  right  |                                  one mapping each

    Unpatched: after plain moves each page is found in both processes, no write shows in the other one, and what comes
    back merges in both; EINVAL with the flag.
    Patched: flag 8 moves both parts like a plain move; flag 16 is refused with EFAULT.
    """
    whole = area.map(0, 15).fill()
    parts = [whole.part(at, BLOCK) for at in (0, 5, 10)]
    with Child() as child:
        theirs = child.call(_move_part, relocate, area, parts[2], 25, flags)
        ours = _move_part(relocate, area, parts[1], 20, flags)
        if ours is None or theirs is None:
            return
        expect_layout(area, [(0, 5), (10, 5), (20, 5)], "the parent moved the middle")
        child.call(expect_layout, area, [(0, 10), (25, 5)], "the child moved the right part")
        _found_in_both(child, (parts[0], parts[0]), (ours, parts[1]), (parts[2], theirs))
        ours.write(0, b"written by the parent ")
        theirs = child.call(_written, theirs, 0, b"written by the child ")
        child.call(parts[1].check)
        parts[2].check()
        ours = move(ours, area.page(5)).check()
        theirs = child.call(_moved_and_checked, theirs, area.page(10))
        for layout in (expect_layout, lambda *args: child.call(expect_layout, *args)):
            layout(area, [(0, 15)], "the part was moved back to where it was at the fork")
        rest = [(each.part(1, 4), other.part(1, 4)) for each, other in ((ours, parts[1]), (parts[2], theirs))]
        _found_in_both(child, (parts[0], parts[0]), *rest)
        # Of the first page of both parts each process has its own.
        for address in (ours.address, theirs.address):
            assert_found_at(Place(address))
            assert_found_at(Place(address, child))
        for mapping in (parts[0], ours, parts[2]):
            mapping.check()
        for mapping in (parts[0], parts[1], theirs):
            child.call(mapping.check)


def _found_in_both(child: Child, *pairs: tuple[Mapping, Mapping]) -> None:
    """Find each page that this process has at the first place of a pair, and the child at the second."""
    for ours, theirs in pairs:
        for here, there in zip(ours.page_addresses, theirs.page_addresses, strict=True):
            assert_found_at(Place(here), Place(there, child))


def _move_part(relocate: bool, area: CarveOut, part: Mapping, to: int, flags: int) -> Mapping | None:
    refused_move(relocate, area, part, area.page(to))
    return move_or_refused(relocate, area, part, area.page(to), flags)


def _written(mapping: Mapping, index: int, data: bytes) -> Mapping:
    written = mapping.part(0, mapping.pages)  # what the other process should see stays as it is
    written.write(index, data)
    return written


def _moved_and_checked(mapping: Mapping, to: int) -> Mapping:
    return move(mapping, to).check()


# --- neighbours --------------------------------------------------------------------------------------------------


def _run(child: Child, who: str, function: object, *args: object) -> Mapping | None:
    assert callable(function)
    result = child.call(function, *args) if who == "child" else function(*args)
    assert result is None or isinstance(result, Mapping)
    return result


@pytest.mark.parametrize("how", ["plain", "must", "mprotect"])
@pytest.mark.parametrize("who", ["parent", "child"])
def test_untouched_memory_beside_forked_memory(relocate: bool, area: CarveOut, who: str, how: str) -> None:
    """Rows 47 (fork-parent) and 48 (fork-child): a parent or a child moves untouched memory next to memory that both
    share, or makes the two equal by mprotect().

    ::

        page   0         5         10
               |fffffffff|uuuuuuuuu|     parent: one; child: two

    Unpatched: one mapping in the parent, two in the child; EINVAL with flag 16.
    Patched: the same, also with flag 16: there is nothing to relocate.
    """
    if how == "mprotect":
        whole = area.map(0, 2 * BLOCK)
        forked, untouched = whole.part(0, BLOCK), whole.part(BLOCK, BLOCK).mprotect(PROT_RW | PROT_EXEC)
    else:
        forked, untouched = area.map(0, BLOCK), area.map(30, BLOCK)
    forked.fill()
    with Child() as child:
        new = _run(child, who, _join_untouched, relocate, area, untouched, how, who == "parent")
        if new is None:
            return
        _found_in_both(child, (forked, forked))
        _run(child, who, _found_alone, new)
        forked.check()
        child.call(forked.check)


def _join_untouched(relocate: bool, area: CarveOut, untouched: Mapping, how: str, merges: bool) -> Mapping | None:
    new: Mapping | None = untouched
    if how == "mprotect":
        untouched.mprotect(PROT_RW)
    else:
        flags = MREMAP_MUST_RELOCATE_ANON if how == "must" else 0
        new = move_or_refused(relocate, area, untouched, area.page(BLOCK), flags)
    if new is not None:
        wanted: Layout = [(0, 10)] if merges else [(0, 5), (5, 5)]
        why = (
            "the parent's VMA has one anon_vma" if merges else "the child's VMA is linked to the parent's anon_vma too"
        )
        expect_layout(area, wanted, why)
        new.fill(seed=5)
    return new


def _found_alone(mapping: Mapping) -> None:
    assert_found(mapping.check())


#: what a move of memory that is lost to the reverse map fails with
_LOST: Final = "reverse walk does not find"


@pytest.mark.parametrize(
    "how",
    [pytest.param("move", marks=pytest.mark.finding("merged-with-untouched", match=_LOST)), "mprotect"],
)
@pytest.mark.parametrize("who", ["parent", "child"])
def test_forked_memory_beside_untouched_memory(area: CarveOut, who: str, how: str) -> None:
    """Rows 47 (fork-parent) and 48 (fork-child): a parent or a child moves shared memory away and back while untouched
    memory appears beside it, or makes the two equal by mprotect() of the shared half.

    ::

        page   0         5         10
               |uuuuuuuuu|fffffffff|     parent: one since 6.16; child: two

    Every kernel: two in the child. In the parent one since 6.16, which lets faulted memory merge with unfaulted memory
    in every position (879bca0a2c4f). Every page is found in both processes. After the move this fails on some kernels:
    finding merged-with-untouched.
    """
    whole = area.map(0, 2 * BLOCK)
    untouched, forked = whole.part(0, BLOCK), whole.part(BLOCK, BLOCK)
    if how == "mprotect":
        forked.mprotect(PROT_RW | PROT_EXEC)
    else:
        untouched.unmap()
    forked.fill()
    with Child() as child:
        _run(child, who, _join_forked, area, untouched, forked, how)
        _found_in_both(child, (forked, forked))
        merges = who == "parent" and system.release() >= (6, 16, 0)
        wanted: Layout = [(0, 10)] if merges else [(0, 5), (5, 5)]
        _run(child, who, expect_layout, area, wanted, f"shared memory of the {who} beside untouched memory")
        new = _run(child, who, _filled, untouched)
        assert new is not None
        _run(child, who, _found_alone, new)
        forked.check()
        child.call(forked.check)


def _join_forked(area: CarveOut, untouched: Mapping, forked: Mapping, how: str) -> None:
    if how == "mprotect":
        forked.mprotect(PROT_RW)
        return
    away = move(forked, area.page(30))
    area.map(0, BLOCK)
    area.reserve(BLOCK, BLOCK)
    move(away, forked.address).check()


def _filled(mapping: Mapping) -> Mapping:
    return mapping.fill(seed=7)


@pytest.mark.parametrize("split", ["before", "after"])
@pytest.mark.parametrize("who", ["parent", "child"])
def test_halves_of_a_forked_mapping(area: CarveOut, who: str, split: str) -> None:
    """Rows 47 (fork-parent) and 48 (fork-child): the halves of a faulted mapping differ in protection before or only
    after a fork, and a parent or a child makes them equal again.

    At a fork each VMA of the child gets an anon_vma of its own (anon_vma_fork(), mm/rmap.c). Two halves of one VMA
    share it, two VMAs do not.

    ::

        page   0         5         10
               |fffffffff|fffffffff|     one; two in the child if they were two at the fork

    Every kernel: one mapping in the parent. In the child one, or two if the halves differed at the fork. Every page is
    found in both processes.
    """
    whole = area.map(0, 2 * BLOCK).fill()
    half = whole.part(BLOCK, BLOCK)
    if split == "before":
        half.mprotect(PROT_RW | PROT_EXEC)
    with Child() as child:
        if split == "after":
            _run(child, who, _protect, half, PROT_RW | PROT_EXEC)
        _run(child, who, expect_layout, area, [(0, 5), (5, 5)], "different protections do not merge")
        _run(child, who, _protect, half, PROT_RW)
        apart = who == "child" and split == "before"
        wanted: Layout = [(0, 5), (5, 5)] if apart else [(0, 10)]
        _run(
            child, who, expect_layout, area, wanted, f"halves that were split {split} the fork, made equal by the {who}"
        )
        _found_in_both(child, (whole, whole))
        written = _run(child, who, _written, whole, 4, b"written at the seam ")
        assert written is not None
        _run(child, who, _found_shared, written)
        child.call(whole.check) if who == "parent" else whole.check()


def _protect(mapping: Mapping, prot: int) -> None:
    mapping.mprotect(prot)


def _found_shared(mapping: Mapping) -> None:
    assert_found(mapping.check(), pageout=False)
