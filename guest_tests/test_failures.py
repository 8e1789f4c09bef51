# SPDX-License-Identifier: GPL-2.0
"""Calls that run out of memory, at each of their allocations in turn: what was charged and allocated is given back.

Mappings are so large that one charge which is not given back shows beside what other processes commit. Only few of
their pages are touched.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Final

import pytest

from guest_tests.mm import maps, syscalls, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_DONTUNMAP, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_READ, PROT_RW
from guest_tests.support.checks import expect_layout
from guest_tests.support.failing import failing, fails_at
from guest_tests.support.folios import thp
from guest_tests.support.found import assert_found

#: bytes that a mapping is larger than what others commit meanwhile
_MUCH: Final = 64 << 20
#: the same in pages
_MANY: Final = _MUCH // PAGE_SIZE
#: pages that hold data
_USED: Final = 8
#: more allocations than one of these calls makes
_MOST_CHANCES: Final = 200


def _table() -> int:
    """How many pages a page table maps. Skips where that is more than the mappings here have."""
    pages = PAGE_SIZE // 8
    if pages > _MANY:
        pytest.skip(f"needs page tables that map 64 MB at most, these map {pages * PAGE_SIZE >> 20} MB")
    return pages


def _committed() -> int:
    """What the system has promised, in bytes."""
    return vmstat.meminfo()["Committed_AS"] << 10


def _mremap(source: Mapping, to: int | None, pages: int, flags: int = 0) -> None:
    """Move by the system call alone: what watches moves reads files, which needs memory too."""
    flags |= MREMAP_MAYMOVE | (0 if to is None else MREMAP_FIXED)
    syscalls.call("mremap", source.address, source.length, pages * PAGE_SIZE, flags, to or 0)


def _each_allocation(
    call: Callable[[], object],
    *,
    failed: Callable[[], object],
    succeeded: Callable[[], object],
    needs_memory: bool = True,
) -> None:
    """Make a call again and again, failing at each allocation in turn until there are none left to fail.

    :param failed: called when it has failed.
    :param succeeded: called when it has succeeded, also without the memory; undoes it.
    :param needs_memory: whether it is an error if no allocation fails, because the call always makes one.
    """
    failures = 0
    for number in range(1, _MOST_CHANCES):
        before = _committed()
        injected, code = fails_at(number, call)
        if code:
            assert injected, f"nothing was made to fail, but the call failed: {errno.errorcode.get(code, code)}"
            assert code == errno.ENOMEM, f"out of memory is {errno.errorcode.get(code, code)}"
            kept = _committed() - before
            assert abs(kept) < _MUCH // 2, (
                f"the call failed at its allocation {number}, and changed Committed_AS by {kept >> 10} kB"
            )
            failed()
            failures += 1
            continue
        succeeded()
        if not injected:
            if not (failures or needs_memory):
                pytest.skip("the call needed no memory this time: the tree of mappings had room")
            assert failures, "no allocation failed: is fault injection in order?"
            return
    raise AssertionError(f"the call has more than {_MOST_CHANCES} chances to fail")


#: how a mapping of eight pages is to take 64 MiB more: the kind of allocation, and whether it moves; flags
_GROWTHS: Final = {
    "in-place": ("slab", False),
    "elsewhere-slab": ("slab", True),
    "elsewhere-page-table": ("page-table", True),
}


@pytest.mark.parametrize("how", _GROWTHS)
def test_growing_out_of_memory(how: str) -> None:
    """Row 95 (fault-inject-anon-vma): a mapping grows by 64 MiB, in place or elsewhere, and each memory allocation of
    that fails in turn.

    ::

        page table    0               1                               n
                                   |ssss|                     |ddd|            in place it grows up to d
                                   |ssss|                     |ddd|    |--> here

    The pages are in two page tables in each place.

    Every kernel: ENOMEM, the mapping is as before, and no more memory is committed.
    """
    kind, moves = _GROWTHS[how]
    table = _table()
    first, there = table - _USED // 2, 4 * _MANY + table - _USED // 2
    with thp("madvise"), carve_out(6 * _MANY) as area:
        area.hole(0, area.pages)
        source = area.map(first, _USED).fill()
        length = _USED + _MANY
        # Growing over all of a gap mostly needs memory for the tree of mappings, growing into it does not. Neighbours
        # in the same page tables keep a move from handing over whole ones, which needs none (try_realign_addr()).
        others = [(first - 2, 1), (first + _USED + 1, 1)] if moves else [(first + length, 1)]
        for at, pages in others:
            area.map(at, pages, shared=True)

        def grow() -> None:
            _mremap(source, area.page(there) if moves else None, length)

        def failed() -> None:
            expect_layout(area, sorted([(first, _USED), *others]), "growing failed")
            source.check()

        def succeeded() -> None:
            place = there if moves else first
            now = Mapping(area.page(place), length, source.contents[:])
            expect_layout(area, sorted([*others, (place, length)]), "growing succeeded")
            now.part(_USED, _MANY).unmap()
            if moves:
                move(now.part(0, _USED), area.page(first))
            source.check()

        with failing(kind):
            # In place it depends on how full the node of the maple tree is.
            _each_allocation(grow, failed=failed, succeeded=succeeded, needs_memory=moves)
        assert_found(source.check())


@pytest.mark.parametrize("kind", ["slab", "page-table"])
def test_dontunmap_out_of_memory(kind: str) -> None:
    """Row 95 (fault-inject-anon-vma): a mapping of 64 MiB moves with DONTUNMAP, and each memory allocation of that
    fails in turn.

    Every kernel: ENOMEM, the mapping is as before, and no more memory is committed.
    """
    table = _table()
    # One page off, so that no page table can be moved by itself.
    first, there = table - _USED // 2, 4 * _MANY + table - _USED // 2 + 1
    with thp("madvise"), carve_out(6 * _MANY) as area:
        area.hole(0, area.pages)
        source = Mapping(area.map(first, _MANY).address, _MANY)
        used = source.part(0, _USED).fill()

        def copy() -> None:
            _mremap(source, area.page(there), _MANY, MREMAP_DONTUNMAP)

        def failed() -> None:
            expect_layout(area, [(first, _MANY)], "a move with DONTUNMAP failed")
            used.check()

        def succeeded() -> None:
            expect_layout(area, [(first, _MANY), (there, _MANY)], "a move with DONTUNMAP succeeded")
            move(Mapping(area.page(there), _MANY), area.page(first))

        with failing(kind):
            _each_allocation(copy, failed=failed, succeeded=succeeded)
        assert_found(used.check())


# --- a source that cannot be unmapped ----------------------------------------------------------------------------


def test_a_source_that_cannot_be_unmapped() -> None:
    """Row 95 (fault-inject-anon-vma): 64 MiB in the middle of a mapping move, and each memory allocation of that fails
    in turn. The source must be split to be unmapped, when its pages have moved.

    ::

        page   0                                             n
               |sssss|sssssssss|sssss|     ->    |sssssssss|     moved
               |sssss|000000000|sssss|                           if the source cannot be split, it stays, and is empty

    Every kernel: ENOMEM, and no more memory is committed; or the pages have moved, and what stays mapped is committed
    as well as what was moved.
    """
    stayed = 0
    with carve_out(8 * _MANY) as area, failing("slab"):
        for number in range(1, _MOST_CHANCES):
            area.hole(0, area.pages)
            source = area.map(0, 3 * _MANY)
            used = source.part(_MANY, _USED).fill()
            before = _committed()
            part = Mapping(source.page(_MANY), _MANY)
            injected, code = fails_at(number, partial(_mremap, part, area.page(5 * _MANY), _MANY))
            changed = _committed() - before
            assert code in (0, errno.ENOMEM), f"out of memory is {errno.errorcode.get(code, code)}"
            kept = sum(
                min(vma.end, part.end) - max(vma.start, part.address)
                for vma in maps.vmas_between(part.address, part.end)
            )
            now = used if code else Mapping(area.page(5 * _MANY), _USED, used.contents)
            wanted = _MUCH if kept and not code else 0
            assert abs(changed - wanted) < _MUCH // 2, (
                f"a move that failed at its allocation {number} gave {errno.errorcode.get(code, 'success')} and left "
                f"{kept >> 10} kB of the source mapped, but changed Committed_AS by {changed >> 10} kB"
            )
            assert_found(now.check())
            stayed += bool(wanted)
            if not injected:
                break
    if not stayed:
        pytest.skip("the source could be unmapped without memory each time")


_MORE_COMMITTED: Final = "kB more in Committed_AS after all was unmapped"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("writable", marks=pytest.mark.finding("failed-unmap-committed", match=_MORE_COMMITTED)),
        pytest.param("read-only", marks=pytest.mark.finding("failed-unmap-overcharged", match=_MORE_COMMITTED)),
    ],
)
def test_what_a_failed_unmapping_leaves(kind: str) -> None:
    """Row 95 (fault-inject-anon-vma): 64 MiB in the middle of a mapping move, each memory allocation of that fails in
    turn, and then everything is unmapped. The kernel commits no memory for a read-only mapping.

    Every kernel: as much memory is committed as before the mapping was made. This fails on 7.3: findings
    failed-unmap-committed and failed-unmap-overcharged.
    """
    prot = PROT_READ if kind == "read-only" else PROT_RW
    with carve_out(8 * _MANY) as area, failing("slab"):
        for number in range(1, _MOST_CHANCES):
            area.hole(0, area.pages)
            before = _committed()
            source = area.map(0, 3 * _MANY, prot=prot)
            part = Mapping(source.page(_MANY), _MANY)
            injected, code = fails_at(number, partial(_mremap, part, area.page(5 * _MANY), _MANY))
            assert code in (0, errno.ENOMEM), f"out of memory is {errno.errorcode.get(code, code)}"
            area.hole(0, area.pages)
            left = _committed() - before
            assert abs(left) < _MUCH // 2, (
                f"a move of {kind} memory whose allocation {number} failed left {left >> 10} {_MORE_COMMITTED}"
            )
            if not injected:
                break


# --- fork --------------------------------------------------------------------------------------------------------

#: mappings of 64 MiB that a child copies
_FORKED: Final = 24


def test_a_fork_out_of_memory() -> None:
    """No row: a process with many large mappings forks, and memory allocations of that fail in turn.

    Every kernel: ENOMEM, and no more memory is committed.
    """
    with Child() as child:
        child.call(_fork_out_of_memory)


def _fork_out_of_memory() -> None:
    with carve_out(2 * _FORKED * _MANY) as area, failing("slab"):
        for number in range(_FORKED):
            area.map(2 * number * _MANY, _MANY)
        failures = 0
        # Every fifth: there are two for each mapping, with the gap behind it.
        for number in range(1, _MOST_CHANCES, 5):
            before = _committed()
            injected, code = fails_at(number, _fork)
            assert code in (0, errno.ENOMEM), f"out of memory is {errno.errorcode.get(code, code)}"
            kept = _committed() - before
            assert abs(kept) < _MUCH // 2, (
                f"fork() that failed at its allocation {number} changed Committed_AS by {kept >> 10} kB"
            )
            failures += bool(code)
            if not injected:
                break
        assert failures, "no fork() failed: is fault injection in order?"


def _fork() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


#: how many processes are between the one that touched the memory and the one that splits its mapping
_DEPTH: Final = 8
#: how often each allocation fails
_REPEATS: Final = 15
#: bytes of an anon_vma_chain, at least
_CHAIN: Final = 64


def test_splitting_out_of_memory(area: CarveOut, own_group: Memcg | None) -> None:
    """No row: a mapping that was forked eight times is split, and each memory allocation of that fails in turn, fifteen
    times.

    The mapping has an anon_vma_chain for each of its ancestors. A split copies all of them, or must free those it has
    copied (anon_vma_clone(), mm/rmap.c). They are charged to the control group. 6.12 first allocates each of them
    without waiting, and then with: one failure does not make the split fail there. 7.3 allocates each of them once.

    Every kernel: ENOMEM or success, and the control group's kernel memory does not grow.
    """
    if own_group is None:
        pytest.skip("needs CONFIG_MEMCG and cgroup version 2 mounted, with the memory controller")
    source = area.map(0, 10).fill()
    with ExitStack() as stack, failing("slab"):
        child = stack.enter_context(Child())
        for _ in range(_DEPTH):
            child = child.fork()
        child.call(_splitting_out_of_memory, source, own_group)
        child.call(source.check)
    assert_found(source.check())


def _splitting_out_of_memory(source: Mapping, group: Memcg) -> None:
    """Split in five rounds at most, until one loses nothing: the group's statistics are late by up to two seconds."""
    for _ in range(5):
        kept, splits, failures = _kept_of_splits(source.part(4, 3), group)
        met = f"{splits} splits met a failed allocation, and {failures} of them failed: is fault injection in order?"
        assert splits > _DEPTH, met
        assert failures >= _REPEATS, met
        if kept < failures * _CHAIN:
            return
    raise AssertionError(f"{failures} splits that failed left {kept} bytes of kernel memory allocated, five times")


def _kept_of_splits(part: Mapping, group: Memcg) -> tuple[int, int, int]:
    """Split off ``part`` with each of the allocations failing: the bytes that stay allocated, how many splits met a
    failed allocation, and how many of them failed."""
    splits = failures = 0
    before = group.stat()["slab_unreclaimable"]
    for number in range(1, _MOST_CHANCES):
        for _ in range(_REPEATS):
            injected, code = fails_at(number, lambda: part.mprotect(PROT_READ))
            assert code in (0, errno.ENOMEM), f"out of memory is {errno.errorcode.get(code, code)}"
            splits += injected
            if not code:
                break
            failures += 1
        part.mprotect(PROT_RW)
        if not injected:
            break
    return group.stat()["slab_unreclaimable"] - before, splits, failures
