# SPDX-License-Identifier: GPL-2.0
"""Which pages an operation is about, and whether it makes sense at all."""

from __future__ import annotations

from typing import Final

from harness.programs.language import (
    FAILING,
    PARTS,
    PROCESSES,
    SINGLE,
    SLOTLESS,
    SLOTS,
    TOS,
    Kind,
    Part,
    To,
    Wire,
    number,
    numbers,
)
from harness.programs.memory import (
    ARENA_PAGES,
    FILED,
    FORKED,
    GUARD,
    HELD,
    LAZY,
    LOCKED,
    MAPPED,
    MERGEABLE,
    MERGED,
    PLACE_PAGES,
    PROTECTED,
    READ,
    REGISTERED,
    SHARED,
    TOUCHED,
    WRITE,
    Machine,
    Pages,
    Step,
)


def _part(part: int, start: int, pages: int) -> tuple[int, int]:
    if part == _ALL or pages == 1:
        return start, pages
    half = pages // 2
    if part == _FIRST_HALF:
        return start, half
    if part == _SECOND_HALF:
        return start + half, pages - half
    if part == _FIRST:
        return start, 1
    if part == _LAST:
        return start + pages - 1, 1
    return (start + 1, pages - 2) if pages > 2 else (start, pages)


_ALL, _FIRST_HALF, _SECOND_HALF, _FIRST, _LAST = (
    PARTS.index(each) for each in (Part.ALL, Part.FIRST_HALF, Part.SECOND_HALF, Part.FIRST, Part.LAST)
)
_PLACE, _HOME, _AFTER, _BEFORE, _ONTO, _GAP = (
    TOS.index(each) for each in (To.PLACE, To.HOME, To.AFTER, To.BEFORE, To.ONTO, To.GAP)
)


def _place(pages: Pages, to: int, near: int, source: int, new: int) -> int | None:
    """The first page of the place that ``to`` and ``near`` mean for ``new`` pages; None if there is none.

    :param source: the first page that moves; negative for a new mapping, which has no home.
    """
    if to == _PLACE:
        return (near + 1) * PLACE_PAGES
    if to == _HOME:
        return pages.home[source] if source >= 0 else None
    slot = pages.slots[near] if near < SLOTS else None
    if slot is None:
        return None
    begin, length = slot
    if to == _AFTER:
        return begin + length
    if to == _BEFORE:
        return begin - new
    if to == _ONTO:
        return begin
    if to == _GAP:
        return begin + length + 1
    return begin + pages.home[source] - pages.home[begin] if source >= 0 else None


def resolve(machine: Machine, wire: Wire) -> Step | None:
    """The pages that an operation is about; None if it makes no sense now.

    An operation makes sense if the memory that it is about is mapped, may be accessed as it says, and if its place lies
    within the arena and does not overlap its own memory.
    """
    kind, process, slot, part, to, near, _into, arg = wire
    pages = machine.processes[process]
    if pages is None:
        return None
    if kind in _SLOTLESS:
        if kind == _FORK:
            possible = process == 0 and 0 < arg < PROCESSES and machine.processes[arg] is None
        elif kind == _EXIT:
            possible = process > 0
        elif kind == _SCAN:
            # ksmd sleeps, and completes no scan, while no memory is mergeable.
            possible = process == 0 and any(
                each is not None and not each.none_has(0, ARENA_PAGES, MERGEABLE) for each in machine.processes
            )
        else:
            possible = process == 0
        return Step(kind, process, 0, 0, 0, 0, wire) if possible else None
    if kind in MAPS:
        dst = _place(pages, to, near, -1, arg)
        if dst is None or arg == 0 or dst < 0 or dst + arg > ARENA_PAGES:
            return None
        if kind == _MAP_SHARED and machine.next_cell + arg > 256:
            return None
        return Step(kind, process, dst, 0, dst, arg, wire)
    where = pages.slots[slot]
    if where is None:
        return None
    start, length = _part(_ALL if kind in _WHOLE else part, *where)
    if kind in _SINGLE:
        length = 1
    end = start + length
    # Unmapping alone makes sense where nothing is mapped.
    if kind != _UNMAP and not pages.all_have(start, end, MAPPED):
        return None
    if kind in _FIRST_ONLY and process:
        return None
    if kind == _WALK and not pages.more_of_none(start, end, HELD):
        return None  # a page with further references does not move
    if kind in _WRITES and not pages.more_of_none(start, end, PROTECTED):
        return None  # the fault would wait for an answer of the userfaultfd
    if kind == _SOFT_OFFLINE and not pages.more[start] & TOUCHED:
        return None  # the zero page, or a page of a file
    if kind in _UFFD and not pages.kept_by_none(start, end, FILED):
        return None
    if kind in _MARKS and not all(kept & REGISTERED for kept in pages.kept[start:end]):
        return None
    needs, forbids = _ACCESS.get(kind, (0, 0))
    if (needs or forbids) and not (pages.all_have(start, end, needs) and pages.none_has(start, end, forbids)):
        return None
    if kind in _ADVICES and not (pages.alike(start, end, LOCKED | SHARED) and pages.alike_kept(start, end, FILED)):
        return None
    # A child's mappings remain apart where only the parent's locks differed.
    if stops_between(pages, kind, start, end) and (process or not pages.one_mapping(start, end)):
        return None
    if kind == _UFFD_MOVE:
        place = _place(pages, to, near, start, 1)
        if place is None or not _takes(pages, start, place):
            return None
        return Step(kind, process, start, 1, place, 1, wire)
    if kind in MOVES:
        new = length
        if kind in _RESIZES:
            new = length + arg if kind in _GROWS else length // 2
            # A refused call may already have unmapped the tail: it must not be refused for crossing mappings.
            if new == 0 or not pages.uniform(start, end) or not pages.none_has(start, end, SHARED):
                return None
        if kind in _IN_PLACE:
            return Step(kind, process, start, length, start, new, wire) if start + new <= ARENA_PAGES else None
        place = _place(pages, to, near, start, new)
        if place is None or place < 0 or place + new > ARENA_PAGES or (place < end and start < place + new):
            return None
        return Step(kind, process, start, length, place, new, wire)
    return Step(kind, process, start, length, start, length, wire)


def stops_between(pages: Pages, kind: int, start: int, end: int) -> bool:
    """Whether a move may end after some of its mappings, if it has several: more than the model can follow.

    From 6.17 on, remap_move() moves several mappings one by one (mm/mremap.c). One that cannot be relocated, or that is
    registered with a userfaultfd and not the first, ends the call with EFAULT, and those before it have moved.
    """
    return kind in _MUSTS or (kind in MOVES and not pages.kept_by_none(start, end, REGISTERED))


def _takes(pages: Pages, start: int, place: int) -> bool:
    """Whether a page is registered memory to which a userfaultfd may move another one."""
    if not 0 <= place < ARENA_PAGES or place == start:
        return False
    attr, kept = pages.attr[place], pages.kept[place]
    return bool(attr & MAPPED and kept & REGISTERED) and not (attr & (SHARED | GUARD) or kept & FILED)


def undone(machine: Machine, step: Step) -> bool:
    """Whether a step is a move that will probably be undone: it has a folio that is made to fail."""
    pages = machine.processes[step.process]
    assert pages is not None
    if step.kind != _UNDONE or not pages.kept_by_none(step.start, step.end, FILED):
        return False
    return sum(more & TOUCHED for more in pages.more[step.start : step.end]) >= step.wire[-1]


def likely_refused(machine: Machine, step: Step) -> bool:
    """Whether the kernel will probably refuse a step: a move of several mappings, or advice for such memory."""
    pages = machine.processes[step.process]
    assert pages is not None
    if step.kind == _GROW:
        return any(pages.attr[step.end : step.start + step.new])
    if step.kind in _ANONYMOUS and not pages.kept_by_none(step.start, step.end, FILED):
        return True
    if step.kind in _MUSTS and not pages.kept_by_none(step.start, step.end, REGISTERED):
        return True
    if step.kind == _SOFT_OFFLINE:
        return bool(pages.more[step.start] & HELD)
    if step.kind == _UFFD_MOVE:
        # Only a page that is the process's alone moves, to where none is, between mappings that are equal in this.
        here, there = pages.attr[step.start], pages.attr[step.dst]
        more = pages.more[step.start]
        unfit = (here ^ there) & (READ | WRITE | LOCKED) or not here & WRITE
        return bool(
            unfit or not more & TOUCHED or more & (FORKED | MERGED) or pages.more[step.dst] & (TOUCHED | PROTECTED)
        )
    if step.kind in MOVES:
        return not pages.uniform(step.start, step.end)
    return step.kind in _PRIVATE and not pages.none_has(step.start, step.end, LOCKED | SHARED)


_FORK, _EXIT, _UNMAP, _MAP_SHARED = map(number, (Kind.FORK, Kind.EXIT, Kind.UNMAP, Kind.MAP_SHARED))
_GROW, _SCAN, _HOLD, _WALK = map(number, (Kind.GROW, Kind.SCAN, Kind.HOLD, Kind.WALK))
_UFFD_MOVE, _SOFT_OFFLINE, _UNDONE = map(number, (Kind.UFFD_MOVE, Kind.SOFT_OFFLINE, Kind.MOVE_UNDONE))
#: moves with flag 16
_MUSTS = numbers(Kind.MOVE_MUST_RELOCATE, Kind.MOVE_UNDONE)
_MARKS = numbers(Kind.UFFD_PROTECT, Kind.UFFD_UNPROTECT)
_UFFD = _MARKS | numbers(Kind.UFFD_REGISTER, Kind.UFFD_UNREGISTER, Kind.UFFD_MOVE)
#: what children do not do: they have neither the pipes nor a userfaultfd of their own, and do not learn what is to fail
_FIRST_ONLY = _UFFD | {_HOLD} | numbers(*FAILING)
#: what writes to pages, or faults them in for writing
_WRITES = numbers(Kind.WRITE, Kind.WRITE_SAME, Kind.POKE, Kind.POPULATE, Kind.LOCK)
_SLOTLESS = numbers(*SLOTLESS)
_SINGLE = numbers(*SINGLE)
#: all forms of mmap()
MAPS = numbers(Kind.MAP, Kind.MAP_SHARED, Kind.MAP_FILE)
_WHOLE = numbers(Kind.GROW, Kind.SHRINK)
_GROWS = numbers(Kind.GROW, Kind.MOVE_GROW)
_IN_PLACE = numbers(Kind.GROW, Kind.SHRINK)
_RESIZES = numbers(Kind.GROW, Kind.SHRINK, Kind.MOVE_GROW, Kind.MOVE_SHRINK)
#: advice that is refused for locked or for shared memory
_PRIVATE = numbers(Kind.DONTNEED, Kind.FREE, Kind.PAGEOUT, Kind.COLD, Kind.GUARD, Kind.WIPEONFORK, Kind.KEEPONFORK)
#: what is refused for a private file
_ANONYMOUS = numbers(
    Kind.FREE,
    Kind.GUARD,
    Kind.WIPEONFORK,
    Kind.NAME,
    Kind.UNNAME,
    Kind.MOVE_RELOCATE,
    Kind.MOVE_MUST_RELOCATE,
    *FAILING,
)
#: moves that give the memory the page offset of its new place, if they succeed
RELOCATES = _MUSTS | numbers(Kind.MOVE_RELOCATE)
#: all forms of mremap()
MOVES = _RESIZES | RELOCATES | numbers(Kind.MOVE, Kind.MOVE_DONTUNMAP, Kind.MOVE_FALLBACK)
#: Advice is given mapping by mapping (madvise_walk_vmas(), mm/madvise.c), and some is refused for locked or for shared
#: memory: a call that is refused in the middle has changed the mappings before.
_ADVICES = numbers(
    Kind.MERGEABLE,
    Kind.UNMERGEABLE,
    Kind.DONTNEED,
    Kind.FREE,
    Kind.HUGEPAGE,
    Kind.NOHUGEPAGE,
    Kind.PAGEOUT,
    Kind.COLD,
    Kind.DONTFORK,
    Kind.DOFORK,
    Kind.WIPEONFORK,
    Kind.KEEPONFORK,
    Kind.GUARD,
    Kind.UNGUARD,
    Kind.POPULATE,
    Kind.NAME,
    Kind.UNNAME,
)
#: what each page must have, and must not have, for an operation to make sense
_ACCESS: Final[dict[int, tuple[int, int]]] = {
    number(kind): bits
    for kind, bits in {
        Kind.WRITE: (WRITE, GUARD),
        Kind.WRITE_SAME: (WRITE, GUARD),
        Kind.READ: (READ, GUARD),
        Kind.POPULATE: (WRITE, GUARD),
        # mlock() fails where it cannot fault pages in, but locks the mapping all the same (mm/mlock.c).
        Kind.LOCK: (READ, GUARD),
        Kind.HOLD: (READ, GUARD | SHARED),
        Kind.UFFD_REGISTER: (0, SHARED),
        Kind.UFFD_UNREGISTER: (0, SHARED),
        # What MADV_FREE was given for may vanish together with its mark.
        Kind.UFFD_PROTECT: (0, SHARED | GUARD | LAZY),
        Kind.UFFD_UNPROTECT: (0, SHARED),
        Kind.UFFD_MOVE: (0, SHARED | GUARD | LAZY),
        Kind.POKE: (0, SHARED | GUARD),
        Kind.SOFT_OFFLINE: (READ, SHARED | GUARD | LAZY),
    }.items()
}
