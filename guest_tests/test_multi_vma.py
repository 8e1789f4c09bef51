# SPDX-License-Identifier: GPL-2.0
"""Several mappings in one call: rows 142 to 145.

Linux 6.17 (d23cb648e365) lets mremap() move a range that holds several mappings, if it is given a place and keeps its
length. Before, a range had to lie within one mapping. The call failed with EFAULT only after it had unmapped the
destination (mremap_to() in mm/mremap.c of 6.12). The rules of 6.17 are in remap_move() and vma_multi_allowed() of the
same file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from guest_tests.mm import maps, pagemap, syscalls, system, userfault
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Content, Mapping, carve_out
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_FIXED, MREMAP_MAYMOVE, MREMAP_MUST_RELOCATE_ANON, PROT_READ, PROT_RW
from guest_tests.mm.userfault import Userfault
from guest_tests.support.checks import State, counted, expect_layout, fails, refused
from guest_tests.support.found import assert_found
from guest_tests.support.holds import pinned
from guest_tests.support.moves import lenient_ways

pytestmark = pytest.mark.shared_guest

_MOVE = MREMAP_MAYMOVE | MREMAP_FIXED


@pytest.fixture
def target() -> Iterator[CarveOut]:
    """A second carve-out, for the destination."""
    with carve_out(40) as carved:
        yield carved


def _several() -> bool:
    return system.release() >= (6, 17, 0)


def _blocks(area: CarveOut, *starts: int, pages: int = 3) -> list[Mapping]:
    """Faulted mappings at the pages ``starts`` and nothing between them; no two of them merge."""
    area.hole(0, 20)
    blocks = []
    for number, start in enumerate(starts):
        block = area.map(start, pages).fill(first_number=start)
        if number % 2:
            block.mprotect(PROT_READ)
        blocks.append(block)
    return blocks


def _move(area: CarveOut, pages: int, target: CarveOut, *, new_pages: int | None = None, flag: int = 0) -> int:
    new_length = (pages if new_pages is None else new_pages) * PAGE_SIZE
    return syscalls.mremap(area.address, pages * PAGE_SIZE, new_length, _MOVE | flag, target.address)


def _at(target: CarveOut, area: CarveOut, block: Mapping) -> Mapping:
    """Where ``block`` of ``area`` is expected after a move of the whole area to ``target``."""
    return Mapping(target.address + block.address - area.address, block.pages, block.contents)


def _frames(*blocks: Mapping) -> list[list[int | None]]:
    return [pagemap.pfns(block.address, block.pages) for block in blocks]


def _refused_too_late(area: CarveOut, target: CarveOut, pages: int, what: str, *blocks: Mapping, flag: int = 0) -> None:
    """Assert what kernels before 6.17 do: EFAULT with the source whole and the destination unmapped."""
    refused(area, errno.EFAULT, lambda: _move(area, pages, target, flag=flag), what, *blocks)
    left = maps.vmas_between(target.address, target.page(pages))
    assert not left, f"{what} was refused before the destination was unmapped, expected that to come first: {left}"


@pytest.mark.parametrize(
    ("starts", "pages"),
    [
        pytest.param((0, 3, 6), 9, id="no-gaps"),
        pytest.param((0, 5, 8), 11, id="one-gap"),
        pytest.param((0, 4, 9), 12, id="gaps"),
        pytest.param((0, 4, 9), 16, id="gap-at-the-end"),
    ],
)
def test_gaps_are_kept(area: CarveOut, target: CarveOut, starts: tuple[int, ...], pages: int) -> None:
    """Row 142 (multi-gap): one call moves three mappings, with and without gaps between them.

    ::

        page     0     3     5     8    11
                 |fffff|     |fffff|fffff|         source: one call moves all of it
                 |fffff|     |fffff|fffff|         destination

    Every kernel: since 6.17 all three arrive with their gaps and frames, and every page is found; before, EFAULT with
    the source whole and the destination unmapped.
    """
    blocks = _blocks(area, *starts)
    if not _several():
        _refused_too_late(area, target, pages, "a move of three mappings", *blocks)
        return
    before = _frames(*blocks)
    assert _move(area, pages, target) == target.address, "the call returns where the first mapping went"
    moved = [_at(target, area, block).check() for block in blocks]
    expect_layout(target, [(start, 3) for start in starts], "gaps are kept")
    expect_layout(area, [], "all of the source was moved")
    assert _frames(*moved) == before, "the move changed page frames"
    assert_found(*moved)


def test_what_lies_in_a_gap_of_the_destination_stays(area: CarveOut, target: CarveOut) -> None:
    """Row 142 (multi-gap): one call moves two mappings with a gap onto a mapping that covers the destination (6.17).

    ::

        page     0     3     6     9
                 |fffff|     |fffff|         source
                 |xxxxxxxxxxxxxxxxx|         destination before
                 |fffff|xxxxx|fffff|         destination after

    Every kernel: the old mapping is replaced where the two arrive, and stays in the gap.
    """
    system.require_kernel(6, 17, "several mappings in one call")
    blocks = _blocks(area, 0, 6)
    old = target.map(0, 9, shared=True).fill(seed=7)
    _move(area, 9, target)
    expect_layout(target, [(0, 3), (3, 3), (6, 3)], "two mappings around what was in the gap")
    old.part(3, 3).check()
    moved = [_at(target, area, block).check() for block in blocks]
    assert_found(*moved)


def test_part_of_a_mapping_at_either_end(area: CarveOut, target: CarveOut) -> None:
    """Row 142 (multi-gap): the range begins and ends inside of mappings, which are split (6.17).

    ::

        page     0  1  2  3     5        8
                 |fffffff|     |fffffff|         source
                    |------------|               the range: pages 1 to 6
                 |f|                |f|          what is left

    Every kernel: two pages of each mapping and the gap arrive, one page of each stays, and every page is found.
    """
    system.require_kernel(6, 17, "several mappings in one call")
    first, last = _blocks(area, 0, 5)
    address = syscalls.mremap(area.page(1), 6 * PAGE_SIZE, 6 * PAGE_SIZE, _MOVE, target.page(10))
    assert address == target.page(10)
    expect_layout(area, [(0, 1), (7, 1)], "the range left one page at either end")
    expect_layout(target, [(10, 2), (14, 2)], "two pages of each, and the gap")
    moved = [Mapping(target.page(10), 2, first.contents[1:]), Mapping(target.page(14), 2, last.contents[:2])]
    assert_found(first.part(0), *moved, last.part(2))


def test_moving_several_back_merges_them(area: CarveOut, target: CarveOut) -> None:
    """Row 142 (multi-gap): three mappings that were one move away and back, and are made equal by mprotect() (6.17).

    ::

        page     0     3     6     9
                 |fffffffffffffffff|         one
                 |fffff|rrrrr|fffff|         three, the middle one read-only; moved away and back
                 |fffffffffffffffff|         one, when all are writable

    Every kernel: they are one mapping again.
    """
    system.require_kernel(6, 17, "several mappings in one call")
    area.hole(0, 20)
    whole = area.map(0, 9).fill()
    whole.part(3, 3).mprotect(PROT_READ)
    _move(area, 9, target)
    expect_layout(target, [(0, 3), (3, 3), (6, 3)], "three mappings were moved")
    syscalls.mremap(target.address, whole.length, whole.length, _MOVE, area.address)
    expect_layout(area, [(0, 3), (3, 3), (6, 3)], "three mappings were moved back")
    whole.part(3, 3).mprotect(PROT_RW)
    expect_layout(area, [(0, 9)], "three mappings at the place where they were one")
    assert_found(whole.check())


def test_a_gap_at_the_beginning(area: CarveOut, target: CarveOut) -> None:
    """Row 143 (multi-lead-gap): the range begins where nothing is mapped.

    ::

        page     0  1     4     6
                    |fffff|     |fffff|         source
                 |--------------------|         the range begins in a hole

    Every kernel: EFAULT before anything is unmapped.
    """
    blocks = _blocks(area, 1, 6)
    destination = State.of(target)
    refused(area, errno.EFAULT, lambda: _move(area, 9, target), "a move of a range that begins in a hole", *blocks)
    destination.expect(target, "a move that was refused for its source")


def test_a_userfaultfd_in_the_middle(area: CarveOut, target: CarveOut) -> None:
    """Row 144 (multi-uffd): the middle one of three mappings is registered with userfaultfd.

    ::

        page     0     3  4     7  8     11
                 |fffff|  |userf|  |fffff|         source
                          |userf|  |fffff|         left; before 6.17 all of it

    Every kernel: EFAULT. Since 6.17 the mapping before it has moved by then; before, nothing has moved, but the
    destination is unmapped.
    """
    system.require_config("USERFAULTFD")
    blocks = _blocks(area, 0, 4, 8)
    with Userfault() as fault:
        fault.register(blocks[1], userfault.MODE_MISSING)
        if not _several():
            _refused_too_late(area, target, 11, "a move of three mappings, one with userfaultfd", *blocks)
            return
        before = _frames(*blocks)
        fails(errno.EFAULT, lambda: _move(area, 11, target), "a move of several mappings, one with userfaultfd")
        expect_layout(area, [(4, 3), (8, 3)], "the one with userfaultfd and what follows stay")
        expect_layout(target, [(0, 3)], "what lies before the one with userfaultfd was moved")
        now = [_at(target, area, blocks[0]), *blocks[1:]]
        assert _frames(*now) == before, "a move that stopped half way changed page frames"
        assert_found(*now)


def test_a_userfaultfd_at_the_beginning(area: CarveOut, target: CarveOut) -> None:
    """Row 144 (multi-uffd): the first of two mappings is registered with userfaultfd.

    ::

        page     0     3  4     7
                 |userf|  |fffff|         source

    Every kernel: EFAULT, and nothing moves; the first mapping can be moved alone.
    """
    system.require_config("USERFAULTFD")
    blocks = _blocks(area, 0, 4)
    with Userfault() as fault:
        fault.register(blocks[0], userfault.MODE_MISSING)
        what = "a move of two mappings, the first with userfaultfd"
        refused(area, errno.EFAULT, lambda: _move(area, 7, target), what, *blocks)
        _move(area, 3, target)
        expect_layout(target, [(0, 3)], "alone, a mapping with userfaultfd moves")
        expect_layout(area, [(4, 3)], "the other mapping stays")
        assert_found(_at(target, area, blocks[0]).check())


def test_a_userfaultfd_before_a_gap(area: CarveOut, target: CarveOut) -> None:
    """Row 144 (multi-uffd): a mapping that is registered with userfaultfd and the hole behind it are to move.

    ::

        page     0     3     5
                 |userf|               source
                 |-----------|         the range ends in a hole

    Every kernel: EFAULT, and the source is whole: such a mapping is moved only by itself.
    """
    system.require_config("USERFAULTFD")
    (block,) = _blocks(area, 0)
    with Userfault() as fault:
        fault.register(block, userfault.MODE_MISSING)
        what = "a move of a mapping with userfaultfd and of the hole behind it"
        refused(area, errno.EFAULT, lambda: _move(area, 5, target), what, block)
    assert_found(block)


def test_a_seal_in_the_middle(area: CarveOut, target: CarveOut) -> None:
    """Row 144 (multi-uffd): the middle one of three mappings is sealed (6.17).

    ::

        page     0     3  4     7  8     11
                 |fffff|  |seald|  |fffff|         source
                          |seald|  |fffff|         left

    Every kernel: EPERM. The mapping before it has moved by then; the sealed one and what follows stay, with all pages.
    """
    system.require_kernel(6, 17, "several mappings in one call")
    with Child() as child:  # seals last until the process ends
        child.call(_seal_in_the_middle, area, target)


def _seal_in_the_middle(area: CarveOut, target: CarveOut) -> None:
    blocks = _blocks(area, 0, 4, 8)
    syscalls.mseal(blocks[1].address, blocks[1].length)
    before = _frames(*blocks)
    fails(errno.EPERM, lambda: _move(area, 11, target), "a move of three mappings, the middle one sealed")
    expect_layout(area, [(4, 3), (8, 3)], "the sealed one and what follows stay")
    now = [_at(target, area, blocks[0]).check(), blocks[1].check(), blocks[2].check()]
    assert _frames(*now) == before, "a move that stopped half way changed page frames"
    assert_found(*now)


@pytest.mark.parametrize("fixed", [True, False], ids=["to-a-place", "anywhere"])
def test_two_mappings_do_not_grow(area: CarveOut, target: CarveOut, fixed: bool) -> None:
    """Row 145 (multi-resize): a range of two mappings is to grow, to a given place or to any.

    ::

        page     0     3     6  7
                 |fffff|fffff|            source
                 |--------------|         new length

    Every kernel: EFAULT with the source whole; since 6.17 the destination is intact too.
    """
    blocks = _blocks(area, 0, 3)
    destination = State.of(target)
    flags, to = (_MOVE, target.address) if fixed else (MREMAP_MAYMOVE, 0)

    def grow() -> int:
        return syscalls.mremap(area.address, 6 * PAGE_SIZE, 7 * PAGE_SIZE, flags, to)

    refused(area, errno.EFAULT, grow, "growing two mappings at once", *blocks)
    if not fixed or _several():
        destination.expect(target, "a move that was refused for its source")


def test_two_mappings_do_not_shrink_to_more_than_one(area: CarveOut, target: CarveOut) -> None:
    """Row 145 (multi-resize): a range of two mappings is to shrink to a length that still covers both.

    Before 6.17 mremap_to() unmaps the tail of the source and the destination before it looks at the source.

    ::

        page     0     3     6
                 |fffff|fffff|         source
                 |--------|            new length

    Every kernel: EFAULT; since 6.17 nothing changes, before it the tail of the source and the destination are unmapped.
    """
    blocks = _blocks(area, 0, 3)
    source, destination = State.of(area), State.of(target)
    fails(errno.EFAULT, lambda: _move(area, 6, target, new_pages=4), "shrinking two mappings to four pages")
    if _several():
        source.expect(area, "a resizing move that was refused")
        destination.expect(target, "a resizing move that was refused")
    else:
        expect_layout(area, [(0, 3), (3, 1)], "the tail is unmapped before the move is refused")
    blocks[0].check()
    blocks[1].part(0).check()


def test_two_mappings_shrink_to_one(area: CarveOut, target: CarveOut) -> None:
    """Row 145 (multi-resize): a range of two mappings shrinks to a part of the first.

    ::

        page     0     3     6
                 |fffff|fffff|         source
                 |---|                 new length

    Every kernel: success: only what moves must be one mapping.
    """
    first, _ = _blocks(area, 0, 3)
    before = pagemap.pfns(first.address, 2)
    _move(area, 6, target, new_pages=2)
    expect_layout(target, [(0, 2)], "two pages were moved")
    expect_layout(area, [], "the rest of both mappings was unmapped")
    moved = Mapping(target.address, 2, first.contents[:2]).check()
    assert pagemap.pfns(moved.address, 2) == before, "the move changed page frames"
    assert_found(moved)


def test_several_mappings_are_relocated(relocate: bool, area: CarveOut, target: CarveOut) -> None:
    """Row 142 (multi-gap): one call moves two mappings with flag 16, and new memory is mapped into their gap.

    ::

        page     0     3     6     9
                 |fffff|     |rrrrr|         source
                 |fffff|uuuuu|rrrrr|         destination, and new memory in its gap: two

    Unpatched: EINVAL, and nothing changes.
    Patched: both arrive with their frames, and the new memory joins the one of equal protection. Before 6.17 EFAULT.
    """
    blocks = _blocks(area, 0, 6)
    before = _frames(*blocks)
    what = "relocating two mappings"
    if not relocate:
        refused(area, errno.EINVAL, lambda: _move(area, 9, target, flag=MREMAP_MUST_RELOCATE_ANON), what, *blocks)
        return
    if not _several():
        _refused_too_late(area, target, 9, what, *blocks, flag=MREMAP_MUST_RELOCATE_ANON)
        return
    _move(area, 9, target, flag=MREMAP_MUST_RELOCATE_ANON)
    moved = [_at(target, area, block).check() for block in blocks]
    expect_layout(target, [(0, 3), (6, 3)], "two mappings and a gap")
    assert _frames(*moved) == before, "relocation changed page frames"
    fresh = target.map(3, 3)
    expect_layout(target, [(0, 6), (6, 3)], "new memory joins relocated memory of equal protection")
    assert_found(*moved, fresh.fill(seed=9))


@lenient_ways
@pytest.mark.parametrize("second", ["pinned", "file"])
def test_each_mapping_is_relocated_or_not(
    relocate: bool, area: CarveOut, target: CarveOut, flags: int, second: str
) -> None:
    """Row 142 (multi-gap): one call moves a mapping that can be relocated and one that cannot, plainly and with flag 8
    (6.17). The second one has a pinned page, or is a private mapping of a file that was not touched.

    ::

        page     0     3     6     9
                 |fffff|     |sPsss|         source
                 |fffff|     |sPsss|         destination: the first is relocated, the second moves plainly

    Unpatched: a plain move; EINVAL with the flag, and nothing changes.
    Patched: the first mapping is relocated. The second moves plainly without a try, and a file shows the same part of
    it; every page is found.
    """
    system.require_kernel(6, 17, "several mappings in one call")
    with ExitStack() as stack:
        area.hole(0, 20)
        first = area.map(0, 3).fill()
        if second == "pinned":
            other = area.map(6, 3).fill(seed=1)
            stack.enter_context(pinned(other.page(1)))
            refusals = {"refused_pinned": 1}
        else:
            other = area.map_file(6, 3, _file(stack, 8), offset=2 * PAGE_SIZE)
            other.contents = [_content(number) for number in (2, 3, 4)]
            refusals = {"refused_vma": 1}
        offset = maps.vma_at(other.address).offset
        if flags and not relocate:
            what = "a move of two mappings with flag 8"
            refused(area, errno.EINVAL, lambda: _move(area, 9, target, flag=flags), what, first, other)
            return
        with counted(relocate, **({"relocated": 1, "undone": 0, **refusals} if flags else {"relocated": 0})):
            _move(area, 9, target, flag=flags)
        moved, other = _at(target, area, first).check(), _at(target, area, other)
        now = maps.vma_at(other.address).offset
        assert now == offset, f"a mapping of the file from {offset:#x} maps it from {now:#x} after the move"
        other.check()
    assert_found(moved, other.fill(seed=2))


def _content(number: int) -> Content:
    return Content(repeated=b"page %d of the file " % number)


def _file(stack: ExitStack, pages: int) -> int:
    """A file in memory, each page of which holds its number."""
    fd = syscalls.memfd_create("numbered")
    stack.callback(os.close, fd)
    os.pwrite(fd, b"".join(_content(number).data for number in range(pages)), 0)
    return fd
