# SPDX-License-Identifier: GPL-2.0
"""Whether memory can be relocated that other processes or threads use as well: rows 47 to 55 and 64.

Relocation rewrites pages, so that no other process may use them. Memory that is shared by fork is not relocated,
neither in the parent nor in the child. Flag 8 ("best effort") moves it like a plain move. Flag 16 ("must") fails with
EFAULT and changes nothing.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.support.checks import counted, expect_layout
from guest_tests.support.found import assert_found, assert_found_at
from guest_tests.support.moves import lenient_ways, move_or_refused, refused_move, relocate_or_refused, ways

pytestmark = pytest.mark.shared_guest

#: pages in the mapping under test
_PAGES = 5
#: page of the carve-out it moves to
_TO = 20


def _must_not_relocate(relocate: bool, area: CarveOut, mapping: Mapping) -> None:
    """Assert, in the process that calls this, that flag 16 is refused, and that every page is found."""
    with counted(relocate, refused_forked=1, relocated=0, undone=0):
        refused_move(relocate, area, mapping, area.page(_TO))
    assert_found(mapping, pageout=False)


# --- who else uses the memory ------------------------------------------------------------------------------------


def test_a_parent(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 47 (fork-parent): a process with a living child relocates memory that the child inherited, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes.
    """
    with Child() as child:
        _must_not_relocate(relocate, area, source)
        child.call(source.check)


def test_a_child(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 48 (fork-child): a child relocates memory that it inherited, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes.
    """
    with Child() as child:
        child.call(_must_not_relocate, relocate, area, source)
        source.check()


@lenient_ways
@pytest.mark.parametrize("mover", ["parent", "child"])
def test_best_effort_after_fork(relocate: bool, area: CarveOut, flags: int, mover: str) -> None:
    """Row 49 (fork-best-effort): the parent or the child moves memory that both share copy-on-write.

    ::

        page        0         5         10             20        25
        stays       |sssssssss|uuuuuuuuu|
        moves                 |uuuuuuuuu|sssssssss|         not merged: it keeps the offset of its old place

    Unpatched: after a plain move it does not merge at its new place. The kernel finds each page in both processes, and
    no write shows in the other process.
    Patched: flag 8 moves it like a plain move, without relocating it.
    """
    source = area.map(0, _PAGES).fill()
    area.map(5, _PAGES)
    with Child() as child:
        result = _in(child, mover, _move_best_effort, relocate, area, source, flags)
        if result is None:
            return
        if mover == "parent":
            here, there = result, source
        else:
            here, there = source, result
        for index in range(_PAGES):
            assert_found_at(Place(here.page(index)), Place(there.page(index), child))
        # A write of one process must not show in the other.
        here.write(0, b"written by the parent")
        child.call(there.check)
        child.call(there.write, 1, b"written by the child")
        here.check()
        child.call(there.part(2, 3).check)
        assert_found(here, pageout=False)


def _in(child: Child, who: str, function: object, *args: object) -> Mapping | None:
    assert callable(function)
    result = child.call(function, *args) if who == "child" else function(*args)
    assert result is None or isinstance(result, Mapping)
    return result


def _move_best_effort(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> Mapping | None:
    with counted(relocate, relocated=0, refused_forked=1 if flags else 0):
        result = move_or_refused(relocate, area, source, area.page(10), flags)
    if result is not None:
        expect_layout(area, [(5, 5), (10, 5)], "forked memory is not relocated, so that it does not merge")
    return result


def test_a_child_that_is_a_parent(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 50 (fork-twice): a process, its child and its grandchild each relocate the same memory with flag 16.

    The anon_vma of the child is no root, and an anon_vma that is no root does not count itself among its children
    (found by Wei Yang, 20250430004703.63rumj4znewlbc2h@master).

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT for all three, and nothing changes.
    """
    with Child() as child, child.fork() as grandchild:
        child.call(_must_not_relocate, relocate, area, source)
        grandchild.call(_must_not_relocate, relocate, area, source)
        _must_not_relocate(relocate, area, source)
        for each in (child, grandchild):
            each.call(source.check)


def test_anon_vmas_that_are_used_again(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 51 (reuse-3): a chain of four forks in which the first two children end before the memory is relocated with
    flag 16.

    A fork reuses the anon_vma of an ancestor that has no memory left and at most one child (anon_vma_clone(),
    mm/rmap.c), so that the tree of anon_vmas says little about which processes share memory.

    ::

        this process ── first (ends) ── second (ends) ── third ── fourth

    Unpatched: EINVAL in every process, and nothing changes.
    Patched: EFAULT in every process, and nothing changes.
    """
    with Child() as first:
        second = first.fork(outlive_parent=True)
        third = second.fork(outlive_parent=True)
        first.kill()
        second.kill()
        fourth = third.fork()
        try:
            for each in (third, fourth):
                each.call(source.check)
                each.call(_must_not_relocate, relocate, area, source)
            _must_not_relocate(relocate, area, source)
        finally:
            for each in (fourth, third, second):
                each.close()


@pytest.mark.parametrize("forks", [False, True], ids=["no-child", "child"])
def test_memory_that_joined_that_of_a_parent(relocate: bool, area: CarveOut, forks: bool) -> None:
    """No row: memory that no child has is relocated to where it merges with memory that a child may have inherited.
    Then it is to move on, with flag 16.

    ::

        page        0         5         10        15    20        25
        before      |ppppppppp|         |uuuuuuuuu|
        joined      |ppppppppp:uuuuuuuuu|
        on          |ppppppppp|                         |uuuuuuuuu|

    Both parts of the merged mapping have one anon_vma, which does not say what a child has.

    Unpatched: EINVAL, and nothing changes.
    Patched: without a child it is relocated twice. With one the second move is refused with EFAULT, and changes
    nothing.
    """
    area.map(0, _PAGES).fill()
    with ExitStack() as stack:
        if forks:
            stack.enter_context(Child())
        joined = move_or_refused(
            relocate, area, area.map(10, _PAGES).fill(seed=1), area.page(5), MREMAP_MUST_RELOCATE_ANON
        )
        if joined is None:
            return
        expect_layout(area, [(0, 2 * _PAGES)], "relocated beside memory of a process with a child")
        assert_found(joined, pageout=False)
        if forks:
            _must_not_relocate(relocate, area, joined)
        else:
            relocate_or_refused(relocate, area, joined, area.page(_TO), MREMAP_MUST_RELOCATE_ANON, pageout=False)


@ways
def test_a_parent_whose_child_is_gone(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 52 (child-exited): a process moves memory after the only child that inherited it has ended.

    Unpatched: a plain move, and every page is found.
    Patched: both flags relocate it: no process shares the memory any more.
    """
    with Child() as child:
        child.call(source.check)
    relocate_or_refused(relocate, area, source, area.page(_TO), flags)


def test_a_child_whose_parent_is_gone(relocate: bool, area: CarveOut) -> None:
    """Row 53 (parent-exited): a child moves inherited memory after its parent has ended.

    The memory belongs to the child alone, but its VMA is still linked to the parent's anon_vma, which holds the pages
    from before the fork.

    Unpatched: EINVAL with flag 16; a plain move, and every page is found.
    Patched: EFAULT with flag 16; flag 8 moves it plainly.
    """
    with Child() as parent:
        source = parent.call(_mapped, area)
        child = parent.fork(outlive_parent=True)
        try:
            parent.kill()
            child.call(_must_not_relocate, relocate, area, source)
            child.call(_move_best_effort_alone, relocate, area, source)
        finally:
            child.close()


def _mapped(area: CarveOut) -> Mapping:
    return area.map(0, _PAGES).fill()


def _move_best_effort_alone(relocate: bool, area: CarveOut, source: Mapping) -> None:
    flags = MREMAP_RELOCATE_ANON if relocate else 0
    assert_found(move(source, area.page(_TO), flags).check())


@ways
def test_memory_that_is_not_forked(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 54 (dontfork): a process with a living child moves memory that the child did not inherit (MADV_DONTFORK).

    Unpatched: a plain move, and every page is found.
    Patched: both flags relocate it.
    """
    source.madvise(syscalls.MADV_DONTFORK)
    with Child():
        relocate_or_refused(relocate, area, source, area.page(_TO), flags)


@ways
def test_threads(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 55 (threads): memory moves while another thread of the process exists.

    Unpatched: a plain move; the other thread reads the data at the new place.
    Patched: both flags relocate it; the other thread reads the data at the new place.
    """
    here = threading.Event()
    there = threading.Event()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            source.check()
            here.set()
            there.wait(30)
            if results[0] is not None:
                results[0].check()
        except BaseException as error:
            failed.append(error)

    results: list[Mapping | None] = []
    thread = threading.Thread(target=look)
    thread.start()
    here.wait(30)
    try:
        results.append(relocate_or_refused(relocate, area, source, area.page(_TO), flags))
    finally:
        there.set()
        thread.join()
    assert not failed, f"another thread does not read the right data: {failed[0]}"


# --- what a refusal costs ----------------------------------------------------------------------------------------


@lenient_ways
def test_a_fixed_destination_is_replaced(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 64 (fixed-must-fail): forked memory moves onto a place that is in use, plainly and with flag 8.

    Unpatched: a plain move replaces what was there.
    Patched: the same with flag 8.
    """
    area.map(_TO, _PAGES).fill(seed=1)
    with Child() as child:
        result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        child.call(source.check)
    if result is not None:
        expect_layout(area, [(_TO, _PAGES)], "the source replaces what was at the destination")
        assert_found(result)


def test_a_fixed_destination_survives_a_refusal(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 64 (fixed-must-fail): forked memory is to move with flag 16 onto a place that is in use.

    The kernel has to look at the source before it unmaps the destination. One that unmaps first leaves a hole.

    Unpatched: EINVAL; source and destination are as before.
    Patched: EFAULT; source and destination are as before.
    """
    destination = area.map(_TO, _PAGES).fill(seed=1)
    with Child():
        refused_move(relocate, area, source, destination.address)
        destination.check()
    assert_found(source, destination)
