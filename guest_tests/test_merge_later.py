# SPDX-License-Identifier: GPL-2.0
"""Mappings that become equal after something moved: by mprotect(), and by advice to KSM.

Nothing moves when attributes change. vma_modify() (mm/vma.c of 6.12 and 7.3) merges what has become equal, by the same
rules as a move. Pictures show pages of the carve-out: ``f`` faulted, ``u`` unfaulted, ``s`` the source of a move, all
in blocks of five pages.
"""

from __future__ import annotations

from itertools import product
from typing import Final

import pytest

from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import pagemap, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import PROT_EXEC, PROT_READ, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found, assert_found_at, places_of
from guest_tests.support.ksm_scenes import SAME, assert_merged, assert_unmerged
from guest_tests.support.merging import BLOCK, THREE, Layout
from guest_tests.support.moves import move_or_refused, ways

pytestmark = pytest.mark.shared_guest


def _joins_untouched() -> bool:
    """Whether a faulted mapping that becomes equal to an unfaulted one merges with it: since 6.16 (879bca0a2c4f)."""
    return system.release() >= (6, 16, 0)


# --- a read-only source ------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("history", ["written", "read"])
def test_a_read_only_source_becomes_writable(relocate: bool, area: CarveOut, flags: int, history: str) -> None:
    """Row 34 (mprotect-later): read-only memory moves, is made writable at its new place, is written, and is forked.

    It was written before, or was never writable and holds the zero page. In the second case it has no anon_vma, takes
    the offset of its new place, and merges after a plain move as well.

    ::

        page   0         5         20        25        30
               |sssssssss|         |uuuuuuuuu|
                                   |uuuuuuuuu|sssssssss|    moved read-only: two
                                   |uuuuuuuuu|sssssssss|    writable: two if it was written; relocated: one

    Unpatched: two mappings after a plain move of what was written, one if it was only read. Writing copies no page that
    was written before, and the kernel finds each page in parent and child.
    Patched: the same, and one mapping after a relocation. Before 6.16 two: see :func:`_joins_untouched`.
    """
    if history == "written":
        source = area.map(0, BLOCK).fill().mprotect(PROT_READ)
    else:
        source = area.map(0, BLOCK, prot=PROT_READ).touch_read()
    neighbour = area.map(20, BLOCK)
    moved = move_or_refused(relocate, area, source, area.page(25), flags)
    if moved is None:
        return
    expect_layout(area, [(20, 5), (25, 5)], "different protections do not merge")
    moved.mprotect(PROT_RW)
    merges = history == "read" or (bool(flags) and _joins_untouched())
    expect_layout(area, [(20, 10)] if merges else [(20, 5), (25, 5)], f"{history}, moved, and then made writable")
    frames = pagemap.pfns(moved.address, moved.pages)
    for index in range(BLOCK):
        moved.write(index, b"written at the new place %d " % index)
    if history == "written":
        now = pagemap.pfns(moved.address, moved.pages)
        assert now == frames, f"writing pages that no other process has copied them: frames {frames} became {now}"
    neighbour.fill(seed=20)
    _fork_and_find(moved)
    assert_found(moved, neighbour)


def _fork_and_find(mapping: Mapping) -> None:
    """Fork, find each page in both processes, and again after each of them has written a page."""
    with Child() as child:
        for address in mapping.page_addresses:
            assert_found_at(Place(address), Place(address, child))
        theirs = child.call(_written, mapping, 0, b"written by the child ")
        mapping.write(1, b"written by the parent ")
        mapping.check()
        child.call(theirs.check)
        for address in mapping.page_addresses[2:]:
            assert_found_at(Place(address), Place(address, child))
        for index in range(2):
            for place in (Place(mapping.page(index)), Place(mapping.page(index), child)):
                assert_found_at(place)
        mapping.check()
        child.call(theirs.check)


def _written(mapping: Mapping, index: int, data: bytes) -> Mapping:
    mapping.write(index, data)
    return mapping


# --- three blocks ------------------------------------------------------------------------------------------------

_ONE: Final[Layout] = [(0, 15)]
_LEFT: Final[Layout] = [(0, 10), (10, 5)]
_RIGHT: Final[Layout] = [(0, 5), (5, 10)]

#: Which blocks mprotect() was called for, and which of left, middle and right are faulted: the mappings since 6.16, and
#: before it where they differ.
_EQUAL: Final[dict[tuple[str, str], tuple[Layout, Layout | None]]] = {
    ("middle", "uuu"): (_ONE, None),
    ("middle", "uuf"): (_ONE, None),
    ("middle", "ufu"): (_ONE, THREE),
    ("middle", "uff"): (_ONE, _RIGHT),
    ("middle", "fuu"): (_ONE, None),
    ("middle", "fuf"): (_LEFT, None),
    ("middle", "ffu"): (_ONE, _LEFT),
    ("middle", "fff"): (_ONE, None),
    ("sides", "uuu"): (_ONE, None),
    ("sides", "uuf"): (_ONE, _LEFT),
    ("sides", "ufu"): (_ONE, None),
    ("sides", "uff"): (_ONE, None),
    ("sides", "fuu"): (_ONE, _RIGHT),
    ("sides", "fuf"): (_LEFT, THREE),
    ("sides", "ffu"): (_ONE, None),
    ("sides", "fff"): (_ONE, None),
}


@pytest.mark.parametrize("faulted", ["".join(each) for each in product("uf", repeat=3)])
@pytest.mark.parametrize("called", ["middle", "sides"])
def test_three_blocks_become_equal(area: CarveOut, called: str, faulted: str) -> None:
    """Row 40 (8-permutations): mprotect() makes three blocks of one mapping equal, for all combinations of faulted and
    unfaulted. It is called for the middle block, or for the left and then the right one.

    Blocks that are faulted in beside each other share an anon_vma, also while their protections differ
    (find_mergeable_anon_vma(), mm/vma.c). With an unfaulted block between them each gets its own, and they cannot be
    one mapping. Before 6.16 (879bca0a2c4f) a faulted block for which mprotect() is called does not merge with an
    unfaulted neighbour.

    ::

        page   0         5         10        15
               |  left   | middle  |  right  |      executable: the middle one, or the two others
               |-----------------------------|      none is

    Every kernel: one mapping, but two where only left and right are faulted. Before 6.16 faulted blocks for which
    mprotect() is called merge with faulted neighbours only. Every page is found.
    """
    blocks = [area.map(0, 15).part(at, BLOCK) for at in (0, 5, 10)]
    changed = [blocks[1]] if called == "middle" else [blocks[0], blocks[2]]
    # Not read-only: then the unfaulted blocks would lose VM_ACCOUNT, and would never be equal to the others.
    for block in changed:
        block.mprotect(PROT_RW | PROT_EXEC)
    for number, (block, kind) in enumerate(zip(blocks, faulted, strict=True)):
        if kind == "f":
            block.fill(seed=number)
    expect_layout(area, THREE, "different protections do not merge")
    for block in changed:
        block.mprotect(PROT_RW)
    now, before = _EQUAL[called, faulted]
    wanted = now if before is None or _joins_untouched() else before
    expect_layout(area, wanted, f"mprotect() of {called} made three blocks equal, faulted (f) or not (u): {faulted}")
    for number, block in enumerate(blocks):
        block.check()
        block.fill(seed=10 + number)
    assert_found(*blocks)


# --- advice to KSM -----------------------------------------------------------------------------------------------


def test_advice_to_ksm_for_one_half(ksm: Ksm, area: CarveOut) -> None:
    """Row 36 (away-and-back): half of a mapping moves away, is made mergeable by KSM, and moves back. Then the advice
    is made equal, different, and equal again.

    ::

        page   0         5         10        20        25
               |fffffffff|fffffffff|                        one
               |fffffffff|         |         |sssssssss|    mergeable
               |fffffffff|sssssssss|                        back: two, because VM_MERGEABLE differs
               |sssssssss|sssssssss|                        both mergeable: one
               |sssssssss|fffffffff|                        the right half unmergeable: two
               |fffffffff|fffffffff|                        both unmergeable: one

    Every kernel: one mapping whenever the advice is equal, and two otherwise. KSM merges the pages of what is
    mergeable, and the walk finds all of them, in either layout.
    """
    whole = area.map(0, 2 * BLOCK).fill_same(SAME)
    left = whole.part(0, BLOCK)
    away = move(whole.part(BLOCK, BLOCK), area.page(20)).madvise(syscalls.MADV_MERGEABLE)
    area.reserve(BLOCK, BLOCK)
    right = move(away, area.page(BLOCK))
    expect_layout(area, [(0, 5), (5, 5)], "only the half that moved is mergeable")
    ksm.scan()
    assert_merged(places_of(right))
    assert not any(mm_ksm.merged(left.address, BLOCK)), "KSM merged pages of a mapping that is not mergeable"
    assert_found_at(*places_of(right))

    left.madvise(syscalls.MADV_MERGEABLE)
    expect_layout(area, [(0, 10)], "both halves are mergeable")
    ksm.scan()
    assert_merged(places_of(left, right))
    assert_found_at(*places_of(left, right))

    right.madvise(syscalls.MADV_UNMERGEABLE)
    expect_layout(area, [(0, 5), (5, 5)], "only the left half is mergeable")
    assert_unmerged(right, [left])
    assert_merged(places_of(left))
    assert_found_at(*places_of(left))

    left.madvise(syscalls.MADV_UNMERGEABLE)
    expect_layout(area, [(0, 10)], "no half is mergeable")
    assert_unmerged(whole)
    assert_found(whole)


@ways
def test_a_neighbour_with_other_advice_to_ksm(relocate: bool, ksm: Ksm, area: CarveOut, flags: int) -> None:
    """Row 34 (mprotect-later): memory moves next to memory that KSM may merge, and gets the same advice there.

    ::

        page   0         5         15        20        25
               |sssssssss|         |uuuuuuuuu|
                                   |uuuuuuuuu|sssssssss|    only u mergeable: two
                                   |uuuuuuuuu|sssssssss|    both mergeable: two; relocated: one

    Unpatched: two mappings after a plain move, with either advice.
    Patched: two mappings, and one after a relocation as soon as the advice is equal, from 6.16 on. On each kernel the
    walk finds all pages that KSM merges afterwards, and those of the moved half after they were un-merged.
    """
    source = area.map(0, BLOCK).fill_same(SAME)
    neighbour = area.map(15, BLOCK).madvise(syscalls.MADV_MERGEABLE)
    moved = move_or_refused(relocate, area, source, area.page(20), flags)
    if moved is None:
        return
    apart: Layout = [(15, 5), (20, 5)]
    expect_layout(area, apart, "only the neighbour is mergeable")
    moved.madvise(syscalls.MADV_MERGEABLE)
    one = bool(flags) and _joins_untouched()
    expect_layout(area, [(15, 10)] if one else apart, "moved, and then made mergeable like its neighbour")
    neighbour.fill_same(SAME)
    ksm.scan()
    assert_merged(places_of(neighbour, moved))
    assert_found_at(*places_of(neighbour, moved))
    moved.madvise(syscalls.MADV_UNMERGEABLE)
    expect_layout(area, apart, "only the neighbour is mergeable")
    assert_unmerged(moved, [neighbour])
    assert_merged(places_of(neighbour))
    assert_found(moved)
    neighbour.check()
