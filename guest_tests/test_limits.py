# SPDX-License-Identifier: GPL-2.0
"""Limits that mremap() must respect: of address space, data, locked memory and mappings, and seals.

What is refused changes nothing. Each test also shows that it was the limit which refused, by what succeeds beside it.
Limits of a process are set in a child, and only during the call, because the interpreter needs memory too.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, ZERO, CarveOut, Mapping, carve_out, map_anonymous, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import (
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MREMAP_MUST_RELOCATE_ANON,
    PROT_READ,
    PROT_RW,
)
from guest_tests.support.checks import State, expect_layout, fails, refused, same_accounts
from guest_tests.support.folios import knob
from guest_tests.support.found import assert_found

pytestmark = pytest.mark.shared_guest

#: bytes that a limit leaves free, so that the interpreter has room during a call
_SPARE: Final = 4 << 20
#: pages of a mapping that is larger than that
_BIG: Final = (16 << 20) // PAGE_SIZE
#: the pages at its beginning that hold data
_USED: Final = 8
#: a user without privileges
_NOBODY: Final = 65534


@contextmanager
def _limit(which: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(which)
    resource.setrlimit(which, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(which, before)


@contextmanager
def _unprivileged() -> Iterator[None]:
    """Without capabilities: those of the effective user go and come with its number (capabilities(7))."""
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def _refused(area: CarveOut, code: int, call: Callable[[], object], what: str, *watched: Mapping) -> None:
    """Assert that a call is refused and changes nothing: mappings, frames, data, accounting."""
    refused(area, code, call, what, *watched)
    same_accounts(lambda: fails(code, call, what), f"{what}, though it is refused,")


# --- address space and data --------------------------------------------------------------------------------------

#: how a mapping takes more room: where it goes, and its new length, in its own lengths; flags
_GROWTHS: Final[dict[str, tuple[int | None, int, int]]] = {
    "in-place": (None, 2, 0),
    "elsewhere": (3, 2, 0),
    "dontunmap": (3, 1, MREMAP_DONTUNMAP),
}


@pytest.mark.parametrize("growth", _GROWTHS)
@pytest.mark.parametrize(("name", "counter"), [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_limit_of_size(name: str, counter: str, growth: str) -> None:
    """Row 91 (accounting): a mapping of 16 MiB is to take 16 MiB more where a limit of the process leaves 4 MiB: it
    grows in place or elsewhere, or moves with DONTUNMAP.

    Every kernel: ENOMEM, and nothing changes. A move of the same length succeeds, and growing by a page; without the
    limit the call succeeds. RLIMIT_DATA is none for read-only memory.
    """
    with Child() as child:
        child.call(_limit_of_size, getattr(resource, name), counter, growth)


def _limit_of_size(which: int, counter: str, growth: str) -> None:
    to, length, flags = _GROWTHS[growth]
    with carve_out(6 * _BIG) as area:
        area.hole(0, 6 * _BIG)
        mapping = Mapping(area.map(0, _BIG).address, _BIG)
        mapping.contents[:_USED] = mapping.part(0, _USED).fill().contents
        soft = vmstat.status()[counter] * 1024 + _SPARE

        def grow() -> Mapping:
            place = None if to is None else area.page(to * _BIG)
            with _limit(which, soft):
                return move(mapping, place, flags, pages=length * _BIG)

        _refused(area, errno.ENOMEM, grow, f"taking more {counter} than the limit allows ({growth})", mapping)
        with _limit(which, soft):
            mapping = move(mapping, area.page(3 * _BIG)).check()
            mapping = move(mapping, area.page(0), pages=_BIG + 1).check()
        mapping = move(mapping, None, pages=_BIG)
        if counter == "VmData" and not flags:
            mapping.mprotect(PROT_READ)
            mapping = move(grow(), None, pages=_BIG)
            if to is not None:
                mapping = move(mapping, area.page(0))
            mapping.mprotect(PROT_RW)
        soft = resource.RLIM_INFINITY
        grown = grow()
        expected = [(0, 2 * _BIG)] if to is None else [(to * _BIG, length * _BIG)]
        expect_layout(area, [(0, _BIG), *expected] if flags else expected, f"{growth} without a limit")
        assert_found(grown.part(0, _USED).check())


# --- committed memory --------------------------------------------------------------------------------------------

_OVERCOMMIT: Final = Path("/proc/sys/vm")


@pytest.mark.parametrize("growth", _GROWTHS)
def test_the_limit_of_committed_memory(growth: str) -> None:
    """Row 91 (accounting): with vm.overcommit_memory=2, a mapping of 16 MiB is to take 16 MiB more where CommitLimit
    leaves 8 MiB: it grows in place or elsewhere, or moves with DONTUNMAP.

    Every kernel: ENOMEM, and nothing changes. Where CommitLimit leaves 64 MiB the call succeeds.
    """
    to, length, flags = _GROWTHS[growth]
    with carve_out(6 * _BIG) as area:
        area.hole(0, 6 * _BIG)
        mapping = Mapping(area.map(0, _BIG).address, _BIG)
        mapping.contents[:_USED] = mapping.part(0, _USED).fill().contents

        def grow(spare: int) -> Mapping:
            place = None if to is None else area.page(to * _BIG)
            with _commit_limit(spare):
                return move(mapping, place, flags, pages=length * _BIG)

        what = f"committing more than CommitLimit allows ({growth})"
        _refused(area, errno.ENOMEM, lambda: grow(_BIG * PAGE_SIZE // 2), what, mapping)
        grown = grow(4 * _BIG * PAGE_SIZE)
        assert_found(grown.part(0, _USED).check())


@contextmanager
def _commit_limit(spare: int) -> Iterator[None]:
    """Let the system commit only ``spare`` bytes more than it has."""
    # CommitLimit includes all swap (vm_commit_limit(), mm/util.c). As much untouched memory makes up for it.
    swap = vmstat.meminfo()["SwapTotal"]
    filler = map_anonymous((swap << 10) // PAGE_SIZE + 1)
    # __vm_enough_memory() keeps a 32nd of the size of the process for the user's other processes (mm/util.c).
    reserve = min(vmstat.status()["VmSize"] // 32, int((_OVERCOMMIT / "user_reserve_kbytes").read_text()))
    allowed = vmstat.meminfo()["Committed_AS"] - swap + (spare >> 10) + reserve
    with ExitStack() as stack:
        stack.callback(filler.unmap)
        stack.enter_context(knob(_OVERCOMMIT / "overcommit_ratio", "0"))
        stack.enter_context(knob(_OVERCOMMIT / "overcommit_kbytes", str(allowed)))
        stack.enter_context(knob(_OVERCOMMIT / "overcommit_memory", "2"))
        yield


# --- locked memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("growth", ["in-place", "elsewhere"])
def test_a_limit_of_locked_memory(area: CarveOut, growth: str) -> None:
    """Row 60 (mlocked): locked memory of eight pages is to grow by eight where RLIMIT_MEMLOCK leaves four.

    Every kernel: EAGAIN without CAP_IPC_LOCK, and nothing changes. Growing by four pages succeeds, moving does even
    beyond the limit, and with the capability growing does too.
    """
    with Child() as child:
        child.call(_limit_of_locked_memory, area, growth)


def _limit_of_locked_memory(area: CarveOut, growth: str) -> None:
    # where it goes in each of three calls; None is in place
    third = area.page(20)
    first, second = (None, None) if growth == "in-place" else (third, area.page(0))
    mapping = area.map(0, 8).fill()
    syscalls.mlock(mapping.address, mapping.length)
    soft = (vmstat.status()["VmLck"] << 10) + 4 * PAGE_SIZE
    area.hole(8, area.pages - 8)

    def grow(pages: int, to: int | None, *, privileged: bool = False) -> Mapping:
        flags = MREMAP_MAYMOVE | (0 if to is None else MREMAP_FIXED)
        with _limit(resource.RLIMIT_MEMLOCK, soft), nullcontext() if privileged else _unprivileged():
            # Not through move(): what watches moves reads files that are only for root.
            address = syscalls.call("mremap", mapping.address, mapping.length, pages * PAGE_SIZE, flags, to or 0)
        return Mapping(address, pages, [*mapping.contents, *[ZERO] * (pages - mapping.pages)])

    what = "growing locked memory beyond RLIMIT_MEMLOCK"
    _refused(area, errno.EAGAIN, lambda: grow(16, first), what, mapping)
    mapping = grow(12, first).check()
    assert vmstat.status()["VmLck"] << 10 == soft, "growing up to the limit did not lock all of it"
    mapping = grow(16, second, privileged=True).check()
    mapping = grow(16, third).check()
    absent = [index for index, entry in enumerate(pagemap.entries(mapping.address, 16)) if not entry.present]
    assert not absent, f"pages {absent} of locked memory are not present"
    assert vmstat.status()["VmLck"] << 10 == 16 * PAGE_SIZE, "not all pages of the mapping count as locked"
    assert_found(mapping, pageout=False)


# --- mappings ----------------------------------------------------------------------------------------------------

#: how many mappings more than it has a process may get, at most, before a move must succeed
_ENOUGH: Final = 12


def _mappings() -> int:
    # [vsyscall] does not count as one.
    return sum(vma.path != "[vsyscall]" for vma in maps.vmas())


@pytest.mark.parametrize("how", ["part", "part-dontunmap", "into-a-mapping"])
def test_the_number_of_mappings(area: CarveOut, how: str) -> None:
    """Row 99 (map-count): the middle of a mapping moves where the limit of mappings leaves room for none more, for one,
    for two and so on, until it succeeds. It moves to free space, or into the middle of another mapping.

    ::

        page   0         8         16        24
               |sssssssss|         |ddddddddd|
               |ss|   |ss|         |dd|sss|dd|     two more for the source, two more for the destination

    Every kernel: ENOMEM, and nothing changes, until there is room. Then all of it happens, and the process has no more
    mappings than it may have.
    """
    source, other = area.map(0, 8).fill(), area.map(16, 8).fill(seed=16)
    part = source.part(2, 4)
    flags = MREMAP_DONTUNMAP if how == "part-dontunmap" else 0
    to = area.page(18 if how == "into-a-mapping" else 30)
    before, refusals = State.of(area), 0
    moved = None
    for room in range(_ENOUGH):
        count = _mappings() + room
        # The limit holds for the whole system, so it is restored at once.
        with knob("/proc/sys/vm/max_map_count", str(count)):
            try:
                moved = move(part, to, flags)
                now = _mappings()
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
        if moved is not None:
            assert now <= count, f"{now} mappings, and the limit was {count}"
            break
        refusals += 1
        before.expect(area, f"a move that was refused with room for {room} more mappings")
        source.check()
        other.check()
    assert moved is not None, f"the move is refused with room for {_ENOUGH} more mappings"
    assert refusals, "the move succeeded with room for no more mappings, though it makes some"
    ends = [(0, 2), (6, 2)] if not flags else [(0, 8)]
    there = [(16, 2), (18, 4), (22, 2)] if how == "into-a-mapping" else [(16, 8), (30, 4)]
    expect_layout(area, [*ends, *there], f"{how} with enough room")
    assert_found(moved.check(), source.part(0, 2).check(), source.part(6, 2).check())
    assert_found(other.part(0, 2).check(), other.part(6, 2).check())


# --- seals -------------------------------------------------------------------------------------------------------

#: what is sealed, in pages of the carve-out; the source, the new place and the new length; flags
_SEALED: Final[dict[str, tuple[tuple[int, int], tuple[int, int], int | None, int, int]]] = {
    "move": ((0, 8), (0, 8), 20, 8, 0),
    "move-part": ((0, 8), (2, 4), 20, 4, 0),
    "dontunmap": ((0, 8), (0, 8), 20, 8, MREMAP_DONTUNMAP),
    "grow": ((0, 8), (0, 8), None, 12, 0),
    "grow-there": ((0, 8), (0, 8), 20, 12, 0),
    "shrink": ((0, 8), (0, 8), None, 4, 0),
    "shrink-there": ((0, 8), (0, 8), 20, 4, 0),
    "shrink-sealed-tail": ((4, 4), (0, 8), None, 4, 0),
    "onto-sealed": ((16, 8), (0, 8), 18, 8, 0),
}


@pytest.mark.parametrize(
    ("what", "flags"),
    [
        *(pytest.param(what, 0, id=what) for what in _SEALED),
        *(pytest.param(what, MREMAP_MUST_RELOCATE_ANON, id=f"{what}-must") for what in ("move", "onto-sealed")),
    ],
)
def test_a_seal(relocate: bool, area: CarveOut, what: str, flags: int) -> None:
    """Row 19 (sealed): sealed memory is to move, shrink or grow, or is in the way of memory that moves (6.10).

    ::

        page   0         8         16        24
               |sssssssss|         |ddddddddd|     one of them is sealed, or the second half of s

    Unpatched: EPERM, and nothing changes; EINVAL with flag 16.
    Patched: EPERM for both, and nothing changes.
    """
    system.require_kernel(6, 10, "mseal")
    with Child() as child:  # seals last until the process ends
        child.call(_seal, area, what, flags, errno.EINVAL if flags and not relocate else errno.EPERM)


def _seal(area: CarveOut, what: str, flags: int, code: int) -> None:
    (at, length), (first, pages), to, new, more = _SEALED[what]
    source, other = area.map(0, 8).fill(), area.map(16, 8).fill(seed=16)
    # Before 6.17 what is at a new place is unmapped before anything is checked. Only sealed memory is expected to stay.
    if to == 20:
        area.hole(16, area.pages - 16)
    else:
        area.hole(8, 8)
    syscalls.mseal(area.page(at), length * PAGE_SIZE)
    place = None if to is None else area.page(to)
    watched = [source] if to == 20 else [source, other]

    def call() -> Mapping:
        return move(source.part(first, pages), place, flags | more, pages=new)

    _refused(area, code, call, f"{what} of sealed memory with flags {flags | more:#x}", *watched)
    assert_found(*watched)
