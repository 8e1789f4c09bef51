# SPDX-License-Identifier: GPL-2.0
"""Merges in which something differs between the parts: page offsets, soft-dirty marks, guard pages.

mprotect() merges a range with a mapping beside it that is equal then (vma_merge_existing_range(), mm/vma.c).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from guest_tests.mm import pagemap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.probes.place import touch
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MADV_GUARD_INSTALL, PROT_READ, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused, ways

pytestmark = pytest.mark.shared_guest


@pytest.fixture
def file() -> Iterator[int]:
    """A file of ten pages of zeros, in memory."""
    fd = syscalls.memfd_create("parts")
    os.ftruncate(fd, 10 * PAGE_SIZE)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("written", ["first", "second"])
def test_parts_of_a_private_file_mapping(area: CarveOut, file: int, written: str) -> None:
    """No row: two private mappings of one file, one of which is written, move to places side by side. Then the other
    one is written.

    ::

        page   0         5        10        15        20        25        30
               |fffffffff|         |unnnnnnnn|         |fffffffff|unnnnnnnn|     in the order of the file

    Every kernel: all written pages are found, whether the two merge or not.
    """
    first = area.map_file(0, 5, file)
    second = area.map_file(10, 5, file, offset=5 * PAGE_SIZE)
    (first if written == "first" else second).fill()
    first, second = move(first, area.page(20)), move(second, area.page(25))
    (second if written == "first" else first).fill(seed=1)
    assert_found(first.check(), second.check())


def test_the_head_of_a_mapping_joins_its_neighbour(area: CarveOut) -> None:
    """No row: the head of a faulted mapping gets the protection of the mapping before it, and then the rest as well.

    ::

        page   0         5         10        15
               |rrrrrrrrr|sssssssssssssssssss|     two
               |rrrrrrrrrrrrrrrrrrr|sssssssss|     two, when the head is read-only
               |rrrrrrrrrrrrrrrrrrrrrrrrrrrrr|     one

    Every kernel: they merge each time, and all pages are found.
    """
    whole = area.map(0, 15).fill()
    whole.part(0, 5).mprotect(PROT_READ)
    expect_layout(area, [(0, 5), (5, 10)], "a read-only head")
    whole.part(5, 5).mprotect(PROT_READ)
    expect_layout(area, [(0, 10), (10, 5)], "a longer read-only head")
    assert_found(whole.part(10, 5))
    whole.part(10, 5).mprotect(PROT_READ)
    expect_layout(area, [(0, 15)], "all of it read-only")
    assert_found(whole)


@pytest.mark.parametrize("faulted", [False, True], ids=["untouched", "faulted"])
def test_a_mapping_grows_up_to_its_neighbour(area: CarveOut, faulted: bool) -> None:
    """No row: a mapping grows in place into the hole before untouched memory of the same kind.

    ::

        before   |aaaa|    |nnnn|
        after    |aaaaggggnnnn|

    Every kernel: they are one mapping afterwards; if the first was faulted, from 6.16 on.
    """
    first, behind = area.map(0, 4), area.map(8, 4)
    if faulted:
        first.fill()
    area.hole(4, 4)
    syscalls.call("mremap", first.address, first.length, 2 * first.length, 0, 0)
    one = not faulted or system.release() >= (6, 16, 0)
    expect_layout(area, [(0, 12)] if one else [(0, 8), (8, 4)], "a mapping that grew up to its neighbour")
    assert_found(first.fill(), behind.fill(seed=1))


@pytest.mark.parametrize("faulted", ["none", "p", "n"])
def test_the_middle_becomes_equal(area: CarveOut, faulted: str) -> None:
    """No row: the middle one of three mappings is read-only, at most one of the others is faulted, and mprotect() makes
    the middle one writable.

    ::

        before   |pppp|mmmm|nnnn|
        after    |ppppmmmmnnnn|

    Every kernel: they are one mapping (if one was faulted, from 6.16 on), and every page is found, of whichever part it
    was.
    """
    parts = {"p": area.map(0, 4), "m": area.map(4, 4), "n": area.map(8, 4)}
    parts["m"].mprotect(PROT_READ)
    if faulted in parts:
        parts[faulted].fill()  # only now, or the parts that mprotect() makes would share its anon_vma
    expect_layout(area, [(0, 4), (4, 4), (8, 4)], "a read-only mapping between two others")
    parts["m"].mprotect(PROT_RW)
    if faulted == "none" or system.release() >= (6, 16, 0):
        expect_layout(area, [(0, 12)], "three mappings that are equal")
    if faulted in parts:
        assert_found(parts[faulted].check())
    assert_found(*(part.fill(seed=1) for part in parts.values()))


@pytest.mark.parametrize("faulted", ["none", "p", "n"])
def test_new_memory_closes_a_hole(area: CarveOut, faulted: str) -> None:
    """No row: memory is mapped into the hole between two mappings, of which at most one is faulted.

    ::

        before   |pppp|    |nnnn|
        after    |ppppmmmmnnnn|

    Every kernel: they are one mapping (if one was faulted, from 6.12 on), and every page is found, of whichever part it
    was.
    """
    parts = {"p": area.map(0, 4), "n": area.map(8, 4)}
    if faulted in parts:
        parts[faulted].fill()
    new = area.map(4, 4)
    if faulted == "none" or system.release() >= (6, 12, 0):  # 6.1 makes two of them
        expect_layout(area, [(0, 12)], "new memory between two mappings that it may merge with")
    if faulted in parts:
        assert_found(parts[faulted].check())
    assert_found(*(part.fill(seed=1) for part in (*parts.values(), new)))


def test_memory_that_forks_wipe_keeps_to_itself(area: CarveOut) -> None:
    """No row: new memory is mapped beside memory with MADV_WIPEONFORK, and is written.

    Every kernel: the two stay apart, and a child has the data of the new one.
    """
    wiped = area.map(0, 4).madvise(syscalls.MADV_WIPEONFORK)
    new = area.map(4, 4).fill()
    expect_layout(area, [(0, 4), (4, 4)], "memory that a fork wipes and memory that it keeps")
    with Child() as child:
        child.call(new.check)
    assert_found(wiped.fill(seed=1), new)


def test_new_memory_stays_soft_dirty(area: CarveOut) -> None:
    """No row: soft-dirty marks are cleared, memory is mapped beside old memory, and merges with it by mprotect()
    (6.19, 6707915e030a).

    New memory is marked by its mapping, because there is no page that could be (VM_SOFTDIRTY in VMA_STICKY_FLAGS,
    include/linux/mm.h).

    Every kernel: new pages are soft-dirty, also after the merge.
    """
    system.require_kernel(6, 19, "merged mappings are soft-dirty if one of them was")
    old = area.map(0, 5).fill()
    pagemap.clear_soft_dirty(old.address, old.pages)
    new = area.map(5, 5, prot=PROT_READ)
    expect_layout(area, [(0, 5), (5, 5)], "a read-only mapping beside one that may be written")
    marks = pagemap.soft_dirty(new.address, new.pages)
    assert all(marks), f"new memory must be soft-dirty, but is: {marks}"
    new.mprotect(PROT_RW)
    expect_layout(area, [(0, 10)], "new memory of the same protection")
    marks = pagemap.soft_dirty(new.address, new.pages)
    assert all(marks), f"new memory must be soft-dirty also after it has merged, but is: {marks}"
    assert_found(old.check(), new.fill(seed=1))


def test_guard_pages_of_a_file_are_forked(area: CarveOut, file: int) -> None:
    """No row: a private file mapping with guard pages merges with one that has none, and is forked (6.15).

    ::

        page   0         5    7    9    10
               |rrrrrrrrr|ssss|guard|sss|     one, when all of it is read-only; then a child

    The page tables of a file mapping are copied only if it has something that the file does not tell
    (vma_needs_copy(), mm/memory.c).

    Every kernel: the guard pages cannot be read in the child either.
    """
    system.require_kernel(6, 15, "guard pages in file mappings")
    whole = area.map_file(0, 10, file)
    whole.part(0, 5).mprotect(PROT_READ)
    whole.part(7, 2).madvise(MADV_GUARD_INSTALL)
    whole.part(5, 5).mprotect(PROT_READ)
    wanted = [not 7 <= index < 9 for index in range(10)]
    assert _readable(whole) == wanted, f"of the pages these can be read: {_readable(whole)}"
    with Child() as child:
        readable = child.call(_readable, whole)
    assert readable == wanted, f"of the pages a child can read these: {readable}, expected {wanted}"


def _readable(mapping: Mapping) -> list[bool]:
    return [touch(address) for address in mapping.page_addresses]


@ways
@pytest.mark.parametrize(("source_at", "other_at"), [(10, 0), (0, 10)], ids=["other-before", "source-before"])
def test_a_move_into_the_gap_beside_its_own_source(
    relocate: bool, area: CarveOut, flags: int, source_at: int, other_at: int
) -> None:
    """Rows 28 (after-faulted) and 29 (before-faulted): faulted memory moves into the gap between its own place and
    other faulted memory.

    Its source is a neighbour at the new place while it moves, but is gone afterwards. So the moved memory has to take
    the anon_vma of the other one.

    ::

        page   0         5         10        15
               |ooooooooo|         |sssssssss|
               |ooooooooo|sssssssss|              plain: two; relocated: one

    Unpatched: two mappings after a plain move; EINVAL with a flag, and nothing changes.
    Patched: one mapping with either flag; every page is found.
    """
    source, other = area.map(source_at, 5).fill(), area.map(other_at, 5).fill(seed=1)
    result = move_or_refused(relocate, area, source, area.page(5), flags)
    if result is not None:
        low = min(other_at, 5)
        two = [(low, 5), (low + 5, 5)]
        expect_layout(area, [(low, 10)] if flags else two, "a move into the gap between its source and other memory")
    assert_found(source if result is None else result, other)
