# SPDX-License-Identifier: GPL-2.0
"""What mremap() does to the sizes of a process: VmSize, VmData, VmStk and VmLck, and to Committed_AS of the system.

Memory that may be written privately counts as data, and what grows downwards as stack (vm_stat_account(), mm/mmap.c of
7.3). Locked memory counts as both, and new pages of it are present at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, syscalls, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, map_anonymous, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_DONTUNMAP, MREMAP_MUST_RELOCATE_ANON
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused

pytestmark = pytest.mark.shared_guest

#: pages of the source
_PAGES: Final = 10
#: The interpreter and other processes allocate memory at the same time. One of so many tries without that is enough.
_TRIES: Final = 5
#: a mapping that grows downwards, as a stack does (include/uapi/linux/mman.h)
_MAP_GROWSDOWN: Final = 0x0100


@dataclass(frozen=True)
class Books:
    """Sizes in pages, or how far they changed."""

    #: all of the process
    size: int
    #: what it may write privately
    data: int
    #: what grows downwards
    stack: int
    #: what is locked
    locked: int
    #: what the system has promised
    committed: int

    @classmethod
    def now(cls) -> Books:
        """The present sizes."""
        status, committed = vmstat.status(), vmstat.meminfo()["Committed_AS"]
        sizes = (status["VmSize"], status["VmData"], status["VmStk"], status["VmLck"], committed)
        return cls(*(size * 1024 // PAGE_SIZE for size in sizes))

    def __sub__(self, other: Books) -> Books:
        return Books(*(getattr(self, field.name) - getattr(other, field.name) for field in fields(Books)))


@dataclass(frozen=True)
class Operation:
    """A call of mremap() on a source of ten pages at the beginning of the carve-out."""

    #: the pages of the source that it is about: the first one, and how many
    part: tuple[int, int] = (0, _PAGES)
    #: where they go, in pages of the carve-out; None leaves the place to the kernel
    to: int | None = 20
    #: how many they are afterwards; None for as many as before
    pages: int | None = None
    #: further ``MREMAP_*`` flags
    flags: int = 0

    @property
    def more(self) -> int:
        """How many pages more are mapped afterwards."""
        if self.flags & MREMAP_DONTUNMAP:
            return self.part[1]
        return 0 if self.pages is None else self.pages - self.part[1]

    @property
    def more_locked(self) -> int:
        """How many pages more are locked afterwards, if the source was: DONTUNMAP unlocks what it leaves."""
        return 0 if self.flags & MREMAP_DONTUNMAP else self.more


_OPERATIONS: Final[dict[str, Operation]] = {
    "shrink": Operation(to=None, pages=6),
    "grow": Operation(to=None, pages=15),
    "shrink-there": Operation(pages=6),
    "grow-there": Operation(pages=15),
    "move": Operation(),
    "move-part": Operation(part=(3, 4)),
    "dontunmap": Operation(flags=MREMAP_DONTUNMAP),
    "dontunmap-part": Operation(part=(3, 4), flags=MREMAP_DONTUNMAP),
}


def _locked(area: CarveOut) -> Mapping:
    source = area.map(0, _PAGES).fill()
    syscalls.mlock(source.address, source.length)
    return source


def _stack(area: CarveOut) -> Mapping:
    return area.map(0, _PAGES, flags=_MAP_GROWSDOWN).fill()


_KINDS: Final[dict[str, Callable[[CarveOut], Mapping]]] = {"locked": _locked, "stack": _stack}


# The messages say what changed: not Committed_AS, locked memory too, or Committed_AS alone.
_SHRUNK: Final = pytest.mark.finding("shrink-move-committed", match="committed=0) in pages, expected")
_LOCKED_TWICE: Final = pytest.mark.finding(
    "dontunmap-locked",
    match=("locked=10, committed=10) in pages, expected", "locked=4, committed=4) in pages, expected"),
)
_NOT_UNCHARGED: Final = pytest.mark.finding("dontunmap-committed", match="stack=0, locked=0, committed=10) in pages")
#: what shows a finding, by operation and kind of memory
_FINDINGS: Final = {
    ("shrink-there", "locked"): _SHRUNK,
    ("shrink-there", "stack"): _SHRUNK,
    ("dontunmap", "locked"): _LOCKED_TWICE,
    ("dontunmap-part", "locked"): _LOCKED_TWICE,
    ("dontunmap", "stack"): _NOT_UNCHARGED,
    ("dontunmap-part", "stack"): _NOT_UNCHARGED,
}


def _cases() -> Sequence[object]:
    """Every operation plainly on each kind, and those that move locked memory with flag 16."""
    plain = [
        pytest.param(name, kind, 0, id=f"{name}-{kind}", marks=_FINDINGS.get((name, kind), ()))
        for name in _OPERATIONS
        for kind in _KINDS
    ]
    moves = [name for name, operation in _OPERATIONS.items() if operation.to is not None]
    return plain + [pytest.param(name, "locked", MREMAP_MUST_RELOCATE_ANON, id=f"{name}-locked-must") for name in moves]


@pytest.mark.parametrize(("name", "kind", "flags"), _cases())
def test_sizes_add_up(relocate: bool, area: CarveOut, name: str, kind: str, flags: int) -> None:
    """Row 91 (accounting): locked memory, or memory that grows downwards, shrinks, grows, moves in whole or in part, or
    moves with DONTUNMAP; in place, and elsewhere also with flag 16.

    ::

        page   0         10        15        20        30        35
               |ssss|                                                  shrink
               |sssssssss|000000000|                                   grow
                                             |sssssssss|000000000|     grow-there
               |ss|  |sss|                   |ssss|                    move-part
               |    0    |                   |sssssssss|               dontunmap: what stays is not locked

    Unpatched: each size changes by as many pages as were added or taken away, and is as before when all is unmapped.
    What locked memory grows by is present at once. EINVAL with the flag. This fails from 6.15 on: findings
    shrink-move-committed, dontunmap-locked and dontunmap-committed.
    Patched: the same with either kind of move.
    """
    operation = _OPERATIONS[name]
    seen: list[tuple[Books, Books]] = []
    more = operation.more
    wanted = Books(
        size=more,
        data=more if kind == "locked" else 0,
        stack=more if kind == "stack" else 0,
        locked=operation.more_locked if kind == "locked" else 0,
        committed=more,
    )
    for _ in range(_TRIES):
        pair = _measure(relocate, area, operation, kind, flags)
        if pair is None:
            return
        seen.append(pair)
        if pair == (wanted, _NOTHING):
            break
    changed, left = seen[-1]
    assert changed == wanted, f"{name} of {kind} memory changed the sizes by {changed} in pages, expected {wanted}"
    assert left == _NOTHING, f"{name} of {kind} memory, and then unmapping everything, left a change of {left} in pages"
    source = _KINDS[kind](area)
    moved = _do(relocate, area, operation, source, flags)
    assert moved is not None
    _look(area, operation, kind, source, moved)


@pytest.mark.finding("dontunmap-part-unlocks", match="did not move, and is not locked any more")
@pytest.mark.parametrize(("first", "pages"), [(0, 4), (3, 4), (6, 4)], ids=["head", "middle", "tail"])
def test_what_did_not_move_stays_locked(area: CarveOut, first: int, pages: int) -> None:
    """Row 91 (accounting): a part of locked memory moves with DONTUNMAP.

    ::

        page   0         10        20
        locked |LLLLLLLLL|         |     |
        moved  |LL|---|LL|         |LLL|       the middle: what it leaves is empty and not locked

    Every kernel: what did not move is locked as before. This fails on many kernels: finding dontunmap-part-unlocks.
    """
    source = _locked(area)
    area.hole(20, pages)
    move(source.part(first, pages), area.page(20), MREMAP_DONTUNMAP)
    for page in [page for page in range(_PAGES) if not first <= page < first + pages]:
        vma = maps.vma_at(source.page(page), detailed=True)
        assert "lo" in vma.vm_flags, f"page {page} did not move, and is not locked any more: {vma}"


_NOTHING: Final = Books(0, 0, 0, 0, 0)


def _measure(relocate: bool, area: CarveOut, operation: Operation, kind: str, flags: int) -> tuple[Books, Books] | None:
    """How far an operation changes the sizes, and what is left of that after unmapping; None if it was refused."""
    area.reserve(0, area.pages)
    empty = Books.now()
    source = _KINDS[kind](area)
    if operation.to is None:
        area.hole(_PAGES, 5)
    else:
        area.hole(operation.to, 15)
    before = Books.now()
    moved = _do(relocate, area, operation, source, flags)
    after = Books.now()
    area.reserve(0, area.pages)
    return None if moved is None else (after - before, Books.now() - empty)


def _do(relocate: bool, area: CarveOut, operation: Operation, source: Mapping, flags: int) -> Mapping | None:
    first, pages = operation.part
    if operation.to is None:
        area.hole(_PAGES, 5)
    to = None if operation.to is None else area.page(operation.to)
    part = source.part(first, pages)
    return move_or_refused(relocate, area, part, to, operation.flags | flags, pages=operation.pages)


def _look(area: CarveOut, operation: Operation, kind: str, source: Mapping, moved: Mapping) -> None:
    """Assert that what was locked is locked and present, that data stayed where it should, and find every page."""
    first, pages = operation.part
    stayed = [source.part(0, first)] if first else []
    if operation.to is not None and first + pages < _PAGES:
        stayed.append(source.part(first + pages, _PAGES - first - pages))
    if kind == "locked":
        for mapping in (moved, *stayed):
            vma = maps.vma_at(mapping.address, detailed=True)
            assert "lo" in vma.vm_flags, f"{vma} is not locked any more"
            assert vma.size("Locked") == vma.length >> 10, f"{vma.size('Locked')} kB of {vma} are locked, not all of it"
            absent = [n for n, entry in enumerate(pagemap.entries(mapping.address, mapping.pages)) if not entry.present]
            assert not absent, f"pages {absent} of {vma} are not present, though it is locked"
    if operation.flags & MREMAP_DONTUNMAP:
        vma = maps.vma_at(source.page(first), detailed=True)
        assert "lo" not in vma.vm_flags, f"{vma}, which DONTUNMAP left empty, is still locked"
        assert pagemap.pfns(source.page(first), pages) == [None] * pages, f"{vma} kept pages that were moved"
    assert_found(moved, *stayed, pageout=kind != "locked")


def test_the_peak_of_a_move(area: CarveOut) -> None:
    """Row 91 (accounting): memory moves while the process is as large as it has ever been.

    Every kernel: VmPeak stays VmSize, although old and new mapping exist side by side during the move.
    """
    with Child() as child:  # whose peak begins anew (dup_mm(), kernel/fork.c)
        child.call(_peak_of_a_move, area)


def _peak_of_a_move(area: CarveOut) -> None:
    source = area.map(0, _PAGES).fill()
    area.hole(20, _PAGES)
    before = vmstat.status()
    # As much as brings VmSize to its peak, and a page more.
    filler = map_anonymous((before["VmPeak"] - before["VmSize"] << 10) // PAGE_SIZE + 1)
    full = vmstat.status()
    assert full["VmPeak"] == full["VmSize"], "the process is not as large as it has ever been"
    moved = move(source, area.page(20))
    after = vmstat.status()
    filler.unmap()
    assert after["VmPeak"] == max(full["VmPeak"], after["VmSize"]), (
        f"a move raised VmPeak from {full['VmPeak']} to {after['VmPeak']} kB, though VmSize is {after['VmSize']} kB"
    )
    assert_found(moved.check())
