# SPDX-License-Identifier: GPL-2.0
"""What memory should look like after the operations that succeeded: a model of the pages of each process.

The guest's emulated processor runs this for every operation, so that pages are bytes in ``bytearray`` objects, and
ranges of them are copied and translated rather than looped over.

The model follows what the kernel did: :func:`apply` is called for an operation that succeeded. It does not say which
operations must succeed.
"""

from __future__ import annotations

from array import array
from typing import Final

from harness.programs.language import KINDS, PARTS, PLACES, PROCESSES, SLOTS, TOS, Kind, Part, To, Wire

#: pages from one place to the next
PLACE_PAGES: Final = 16
#: pages of the arena, which has the room of a place on both sides of the places
ARENA_PAGES: Final = (PLACES + 2) * PLACE_PAGES

# --- bits of Pages.attr: what the kernel keeps of a mapping, and two that it keeps of a page -----------------------

MAPPED: Final = 1
SHARED: Final = 2
READ: Final = 4
WRITE: Final = 8
MERGEABLE: Final = 16
LOCKED: Final = 32
#: a guard marker
GUARD: Final = 64
#: MADV_FREE was given: either its contents or zeros
LAZY: Final = 128

# --- bits of Pages.more: what happened to a page -------------------------------------------------------------------

#: it was written to, so that it has a page of its own
TOUCHED: Final = 1
#: a fork shared it
FORKED: Final = 2
#: KSM scanned it and may have merged it
MERGED: Final = 4
#: it may have been swapped out
SWAPPED: Final = 8
DONTFORK: Final = 16
WIPEONFORK: Final = 32
#: a pipe may hold a reference to it
HELD: Final = 64

#: the contents that :data:`Kind.WRITE_SAME` writes; other writes count upwards from here
SAME: Final = 1


def _without(bits: int) -> bytes:
    return bytes(value & ~bits for value in range(256))


def _with(bits: int) -> bytes:
    return bytes(value | bits for value in range(256))


def _if(condition: int, change: bytes) -> bytes:
    """The change for values that have all bits of ``condition``."""
    return bytes(change[value] if value & condition == condition else value for value in range(256))


class Pages:
    """The arena of one process, by page."""

    __slots__ = ("attr", "home", "more", "slots", "tags")

    def __init__(self) -> None:
        self.attr = bytearray(ARENA_PAGES)
        self.more = bytearray(ARENA_PAGES)
        #: the byte that a page holds at its beginning and end; of shared memory its number in :attr:`Machine.cells`
        self.tags = bytearray(ARENA_PAGES)
        #: the page of the arena that the page offset of the mapping says
        self.home = array("h", range(ARENA_PAGES))
        #: first page and number of pages
        self.slots: list[tuple[int, int] | None] = [None] * SLOTS

    def copy(self) -> Pages:
        """The same pages, independent of these."""
        other = Pages.__new__(Pages)
        other.attr, other.more, other.tags = self.attr[:], self.more[:], self.tags[:]
        other.home, other.slots = self.home[:], self.slots[:]
        return other

    def clear(self, start: int, end: int) -> None:
        """Unmap a range."""
        zeros = bytes(end - start)
        self.attr[start:end] = zeros
        self.more[start:end] = zeros
        self.tags[start:end] = zeros

    def all_have(self, start: int, end: int, bits: int) -> bool:
        """Whether each page of a range has all of ``bits`` in :attr:`attr`."""
        return 0 not in self.attr[start:end].translate(_HAS[bits])

    def none_has(self, start: int, end: int, bits: int) -> bool:
        """Whether no page of a range has any of ``bits`` in :attr:`attr`."""
        return not any(self.attr[start:end].translate(_ONLY[bits]))

    def alike(self, start: int, end: int, bits: int) -> bool:
        """Whether all pages of a range have the same of ``bits``."""
        attr = self.attr[start:end].translate(_ONLY[bits])
        return attr.count(attr[0]) == len(attr)

    def uniform(self, start: int, end: int) -> bool:
        """Whether the pages may be one mapping: they differ in nothing that the kernel keeps of a mapping."""
        attr = self.attr[start:end].translate(_ONLY[0xFF & ~(GUARD | LAZY)])
        more = self.more[start:end].translate(_ONLY[DONTFORK | WIPEONFORK])
        return attr.count(attr[0]) == len(attr) and more.count(more[0]) == len(more)


_ONLY: Final = [bytes(value & bits for value in range(256)) for bits in range(256)]


class Machine:
    """All processes of a program."""

    __slots__ = ("cells", "next_cell", "next_tag", "processes")

    def __init__(self) -> None:
        self.processes: list[Pages | None] = [Pages(), *[None] * (PROCESSES - 1)]
        #: the contents of shared pages, by number
        self.cells = bytearray(256)
        self.next_cell = 1
        #: how many pages were written, in the numbers that tags are made of
        self.next_tag = 0

    def contents(self, pages: Pages, start: int, end: int) -> bytes:
        """The byte that each page of a mapped range should hold."""
        tags = pages.tags[start:end]
        if any(pages.attr[start:end].translate(_ONLY[SHARED])):
            shared = tags.translate(bytes(self.cells))
            return bytes(
                cell if attr & SHARED else tag
                for cell, tag, attr in zip(shared, tags, pages.attr[start:end], strict=True)
            )
        return bytes(tags)


class Step:
    """An operation with its operands resolved to pages of the arena."""

    __slots__ = ("dst", "kind", "new", "pages", "process", "start", "wire")

    def __init__(self, kind: int, process: int, start: int, pages: int, dst: int, new: int, wire: Wire) -> None:
        #: number of the kind
        self.kind = kind
        self.process = process
        #: first page that it is about
        self.start = start
        self.pages = pages
        #: first page of the place that it moves to or maps
        self.dst = dst
        #: how many pages there are afterwards
        self.new = new
        self.wire = wire

    @property
    def end(self) -> int:
        """The page behind the last one."""
        return self.start + self.pages


# --- which pages an operation is about -----------------------------------------------------------------------------


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
    if kind in _MAPS:
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
    end = start + length
    # Unmapping alone makes sense where nothing is mapped.
    if kind != _UNMAP and not pages.all_have(start, end, MAPPED):
        return None
    needs, forbids = _ACCESS.get(kind, (0, 0))
    if (needs or forbids) and not (pages.all_have(start, end, needs) and pages.none_has(start, end, forbids)):
        return None
    if kind in _ADVICES and not pages.alike(start, end, LOCKED | SHARED):
        return None
    if kind in _MOVES:
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


def _numbers(*kinds: Kind) -> frozenset[int]:
    return frozenset(KINDS.index(each) for each in kinds)


_FORK, _EXIT, _UNMAP, _MAP_SHARED = (KINDS.index(each) for each in (Kind.FORK, Kind.EXIT, Kind.UNMAP, Kind.MAP_SHARED))
_SLOTLESS = _numbers(Kind.FORK, Kind.EXIT, Kind.SCAN, Kind.UNMERGE_ALL, Kind.RELEASE, Kind.RECLAIM)
_MAPS = _numbers(Kind.MAP, Kind.MAP_SHARED)
_WHOLE = _numbers(Kind.GROW, Kind.SHRINK)
_GROWS = _numbers(Kind.GROW, Kind.MOVE_GROW)
_IN_PLACE = _numbers(Kind.GROW, Kind.SHRINK)
_RESIZES = _numbers(Kind.GROW, Kind.SHRINK, Kind.MOVE_GROW, Kind.MOVE_SHRINK)
_RELOCATES = _numbers(Kind.MOVE_RELOCATE, Kind.MOVE_MUST_RELOCATE)
_MOVES = _RESIZES | _RELOCATES | _numbers(Kind.MOVE, Kind.MOVE_DONTUNMAP)
#: Advice is given mapping by mapping (madvise_walk_vmas(), mm/madvise.c), and some is refused for locked or for shared
#: memory: a call that is refused in the middle has changed the mappings before.
_ADVICES = _numbers(
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
)
#: what each page must have, and must not have, for an operation to make sense
_ACCESS: Final[dict[int, tuple[int, int]]] = {
    KINDS.index(kind): bits
    for kind, bits in {
        Kind.WRITE: (WRITE, GUARD),
        Kind.WRITE_SAME: (WRITE, GUARD),
        Kind.READ: (READ, GUARD),
        Kind.POPULATE: (WRITE, GUARD),
        # mlock() fails where it cannot fault pages in, but locks the mapping all the same (mm/mlock.c).
        Kind.LOCK: (READ, GUARD),
        Kind.HOLD: (READ, GUARD | SHARED),
    }.items()
}

# --- what an operation changes -------------------------------------------------------------------------------------

#: kinds that only set or clear bits: the change of attr, and of more
_CHANGES: Final[dict[int, tuple[bytes | None, bytes | None]]] = {
    KINDS.index(kind): change
    for kind, change in {
        Kind.PROTECT_NONE: (_without(READ | WRITE), None),
        Kind.PROTECT_READ: (bytes(value & ~WRITE | READ for value in range(256)), None),
        Kind.PROTECT_WRITE: (_with(READ | WRITE), None),
        # ksm_madvise() ignores shared memory and says nothing (mm/ksm.c).
        Kind.MERGEABLE: (bytes(value if value & SHARED else value | MERGEABLE for value in range(256)), None),
        Kind.UNMERGEABLE: (_without(MERGEABLE), _without(MERGED)),
        Kind.FREE: (_with(LAZY), None),
        Kind.PAGEOUT: (None, _if(TOUCHED, _with(SWAPPED))),
        Kind.DONTFORK: (None, _with(DONTFORK)),
        Kind.DOFORK: (None, _without(DONTFORK)),
        Kind.WIPEONFORK: (None, _with(WIPEONFORK)),
        Kind.KEEPONFORK: (None, _without(WIPEONFORK)),
        Kind.UNGUARD: (_without(GUARD), None),
        Kind.LOCK: (_with(LOCKED), None),
        Kind.UNLOCK: (_without(LOCKED), None),
        Kind.HOLD: (None, _with(HELD)),
        Kind.POPULATE: (None, _with(TOUCHED)),
    }.items()
}
_WRITE, _WRITE_SAME, _READ, _LOCK, _DONTNEED, _GUARD, _SCAN, _UNMERGE, _RELEASE, _RECLAIM, _DONTUNMAP = (
    KINDS.index(each)
    for each in (
        Kind.WRITE,
        Kind.WRITE_SAME,
        Kind.READ,
        Kind.LOCK,
        Kind.DONTNEED,
        Kind.GUARD,
        Kind.SCAN,
        Kind.UNMERGE_ALL,
        Kind.RELEASE,
        Kind.RECLAIM,
        Kind.MOVE_DONTUNMAP,
    )
)
_NOT_LAZY = _without(LAZY)
_EMPTY = _without(TOUCHED | MERGED | SWAPPED | FORKED | HELD)
_WRITTEN = bytes(value & ~(MERGED | SWAPPED | FORKED) | TOUCHED for value in range(256))
_READ_BACK = _without(SWAPPED)
_FORKS = _if(TOUCHED, _with(FORKED))


def new_tags(machine: Machine, step: Step) -> bytes:
    """The bytes that a write puts into its pages."""
    if step.kind == _WRITE_SAME:
        return bytes((SAME,)) * step.pages
    first = machine.next_tag
    # Large enough for the pages of a program, so that no two pages hold the same by accident.
    tags = bytes((first + index) % (256 - SAME - 1) + SAME + 1 for index in range(step.pages))
    machine.next_tag = (first + step.pages) % (256 - SAME - 1)
    return tags


def apply(machine: Machine, step: Step, tags: bytes = b"") -> None:
    """Change the model as an operation did that succeeded.

    :param tags: what a write wrote, from :func:`new_tags`.
    """
    kind, start, end = step.kind, step.start, step.end
    pages = machine.processes[step.process]
    assert pages is not None
    change = _CHANGES.get(kind)
    if change is not None:
        _change(pages, start, end, *change)
    if kind in _MOVES:
        _move(pages, step)
    elif kind in (_WRITE, _WRITE_SAME):
        _write(machine, pages, step, tags)
    elif kind == _READ:
        pages.more[start:end] = pages.more[start:end].translate(_READ_BACK)
    elif kind in _MAPS:
        _map(machine, pages, step)
    elif kind == _UNMAP:
        pages.clear(start, end)
    elif kind in (_DONTNEED, _GUARD):
        _discard(pages, start, end, guard=kind == _GUARD)
    elif kind == _LOCK:
        _populate(pages, start, end)
    elif kind == _FORK:
        machine.processes[step.wire[-1]] = _forked(pages)
    elif kind == _EXIT:
        machine.processes[step.process] = None
    elif kind in _EVERYWHERE:
        for each in machine.processes:
            if each is not None:
                each.more[:] = each.more.translate(_EVERYWHERE[kind])


_EVERYWHERE: Final[dict[int, bytes]] = {
    _UNMERGE: _without(MERGED),
    _RELEASE: _without(HELD),
    _RECLAIM: _if(TOUCHED, _with(SWAPPED)),
    _SCAN: _if(TOUCHED, _with(MERGED)),
}


def _change(pages: Pages, start: int, end: int, attr: bytes | None, more: bytes | None) -> None:
    if attr is not None:
        pages.attr[start:end] = pages.attr[start:end].translate(attr)
    if more is not None:
        pages.more[start:end] = pages.more[start:end].translate(more)


def _map(machine: Machine, pages: Pages, step: Step) -> None:
    start, end, count = step.dst, step.dst + step.new, step.new
    pages.clear(start, end)
    shared = step.kind == _MAP_SHARED
    pages.attr[start:end] = bytes((MAPPED | READ | WRITE | (SHARED if shared else 0),)) * count
    pages.home[start:end] = array("h", range(start, end))
    if shared:
        pages.tags[start:end] = bytes(range(machine.next_cell, machine.next_cell + count))
        machine.next_cell += count
    pages.slots[step.wire[6]] = (start, count)


def _write(machine: Machine, pages: Pages, step: Step, tags: bytes) -> None:
    start, end = step.start, step.end
    for index, tag in enumerate(tags, start):
        if pages.attr[index] & SHARED:
            machine.cells[pages.tags[index]] = tag
        else:
            pages.tags[index] = tag
    pages.attr[start:end] = pages.attr[start:end].translate(_NOT_LAZY)
    pages.more[start:end] = pages.more[start:end].translate(_WRITTEN)


def _discard(pages: Pages, start: int, end: int, *, guard: bool) -> None:
    for index in range(start, end):
        attr = pages.attr[index] & ~LAZY
        pages.attr[index] = attr | GUARD if guard else attr
        # Shared memory keeps its contents in its file.
        if not attr & SHARED:
            pages.tags[index] = 0
    pages.more[start:end] = pages.more[start:end].translate(_EMPTY)


def _populate(pages: Pages, start: int, end: int) -> None:
    """mlock() faults pages in, for writing where that is allowed."""
    for index in range(start, end):
        if pages.attr[index] & WRITE:
            pages.more[index] |= TOUCHED


def _move(pages: Pages, step: Step) -> None:
    start, end, dst, new = step.start, step.end, step.dst, step.new
    kept = min(step.pages, new)
    natural = step.kind in _RELOCATES or not any(each & TOUCHED for each in pages.more[start:end])
    parts = (pages.attr[start : start + kept], pages.more[start : start + kept], pages.tags[start : start + kept])
    home = pages.home[start]
    last_attr, last_more = pages.attr[end - 1], pages.more[end - 1]
    if dst != start:
        if step.kind == _DONTUNMAP:
            _leave_empty(pages, start, end)
        else:
            pages.clear(start, end)
    elif new < step.pages:
        pages.clear(start + new, end)
    pages.attr[dst : dst + kept], pages.more[dst : dst + kept], pages.tags[dst : dst + kept] = parts
    if new > kept:
        grown = new - kept
        pages.attr[dst + kept : dst + new] = bytes((last_attr & ~(GUARD | LAZY),)) * grown
        pages.more[dst + kept : dst + new] = bytes((last_more & (DONTFORK | WIPEONFORK),)) * grown
        pages.tags[dst + kept : dst + new] = bytes(grown)
        if last_attr & LOCKED:
            _populate(pages, dst + kept, dst + new)
    if dst != start and natural:
        home = dst
    pages.home[dst : dst + new] = array("h", range(home, home + new))
    pages.slots[step.wire[2] if dst == start else step.wire[6]] = (dst, new)


def _leave_empty(pages: Pages, start: int, end: int) -> None:
    # dontunmap_complete() clears VM_LOCKED of the mapping that stays behind (mm/mremap.c).
    pages.attr[start:end] = pages.attr[start:end].translate(_LEFT)
    pages.more[start:end] = pages.more[start:end].translate(_EMPTY)
    for index in range(start, end):
        if not pages.attr[index] & SHARED:
            pages.tags[index] = 0


_LEFT = _without(LOCKED | GUARD | LAZY)
_NOT_LOCKED = _without(LOCKED)


def _forked(pages: Pages) -> Pages:
    """The child's pages."""
    pages.more[:] = pages.more.translate(_FORKS)
    child = pages.copy()
    child.attr[:] = child.attr.translate(_NOT_LOCKED)
    for index, more in enumerate(child.more):
        if more & DONTFORK:
            child.clear(index, index + 1)
        elif more & WIPEONFORK:
            # The child's page tables are not filled at all, so that guard markers go as well (dup_mmap()).
            child.attr[index] &= ~(GUARD | LAZY)
            child.tags[index] = 0
            child.more[index] = more & WIPEONFORK
    return child


def runs(pages: Pages, bits: int = MAPPED) -> list[tuple[int, int]]:
    """The ranges of pages that have all of ``bits``, as first page and the page behind the last."""
    has = pages.attr.translate(_HAS[bits])
    found = []
    start = has.find(1)
    while start >= 0:
        end = has.find(0, start)
        if end < 0:
            end = ARENA_PAGES
        found.append((start, end))
        start = has.find(1, end)
    return found


_HAS: Final = [bytes(value & bits == bits for value in range(256)) for bits in range(256)]
