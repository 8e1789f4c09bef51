# SPDX-License-Identifier: GPL-2.0
"""What operations that succeeded change in the model's memory.

The model follows what the kernel did. It does not say which operations must succeed.
"""

from __future__ import annotations

from array import array
from typing import Final

from harness.programs.language import Kind, number
from harness.programs.memory import (
    BOUND,
    DONTFORK,
    FILED,
    FORKED,
    GUARD,
    HELD,
    HUGE,
    LAZY,
    LOCKED,
    MAPPED,
    MERGEABLE,
    MERGED,
    NAMED,
    PROTECTED,
    READ,
    REGISTERED,
    SAME,
    SHARED,
    SMALL,
    SWAPPED,
    TOUCHED,
    UNKNOWN,
    WIPEONFORK,
    WRITE,
    Machine,
    Pages,
    Step,
    plus,
    where,
    without,
)
from harness.programs.operands import MAPS, MOVES, RELOCATES

#: kinds that only set or clear bits: the change of attr, and of more
_CHANGES: Final[dict[int, tuple[bytes | None, bytes | None]]] = {
    number(kind): change
    for kind, change in {
        Kind.PROTECT_NONE: (without(READ | WRITE), None),
        Kind.PROTECT_READ: (bytes(value & ~WRITE | READ for value in range(256)), None),
        Kind.PROTECT_WRITE: (plus(READ | WRITE), None),
        # ksm_madvise() ignores shared memory and says nothing (mm/ksm.c).
        Kind.MERGEABLE: (bytes(value if value & SHARED else value | MERGEABLE for value in range(256)), None),
        Kind.UNMERGEABLE: (without(MERGEABLE), without(MERGED)),
        Kind.FREE: (plus(LAZY), None),
        Kind.PAGEOUT: (None, where(TOUCHED, plus(SWAPPED))),
        Kind.UNGUARD: (without(GUARD), None),
        Kind.LOCK: (plus(LOCKED), None),
        Kind.UNLOCK: (without(LOCKED), None),
        Kind.HOLD: (None, plus(HELD)),
        Kind.POPULATE: (None, plus(TOUCHED)),
        Kind.SOFT_OFFLINE: (None, without(SWAPPED)),
        Kind.UFFD_PROTECT: (None, plus(PROTECTED)),
        Kind.UFFD_UNPROTECT: (None, without(PROTECTED)),
        Kind.UFFD_UNREGISTER: (None, without(PROTECTED)),
    }.items()
}
#: kinds that only set or clear a bit of kept
_KEEPS: Final[dict[int, bytes]] = {
    number(kind): change
    for kind, change in {
        Kind.DONTFORK: plus(DONTFORK),
        Kind.DOFORK: without(DONTFORK),
        Kind.WIPEONFORK: plus(WIPEONFORK),
        Kind.KEEPONFORK: without(WIPEONFORK),
        Kind.BIND: plus(BOUND),
        Kind.UNBIND: without(BOUND),
        Kind.NAME: plus(NAMED),
        Kind.UNNAME: without(NAMED),
        Kind.HUGEPAGE: bytes(value & ~SMALL | HUGE for value in range(256)),
        Kind.NOHUGEPAGE: bytes(value & ~HUGE | SMALL for value in range(256)),
        Kind.UFFD_REGISTER: plus(REGISTERED),
        Kind.UFFD_UNREGISTER: without(REGISTERED),
    }.items()
}
(
    _FORK,
    _EXIT,
    _UNMAP,
    _MAP_SHARED,
    _MAP_FILE,
    _WRITE,
    _WRITE_SAME,
    _READ,
    _LOCK,
    _DONTNEED,
    _GUARD,
    _SCAN,
    _UNMERGE,
    _RELEASE,
    _RECLAIM,
    _DONTUNMAP,
    _UFFD_MOVE,
    _POKE,
    _SWAPOFF,
    _FALLBACK,
) = (
    number(each)
    for each in (
        Kind.FORK,
        Kind.EXIT,
        Kind.UNMAP,
        Kind.MAP_SHARED,
        Kind.MAP_FILE,
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
        Kind.UFFD_MOVE,
        Kind.POKE,
        Kind.SWAPOFF,
        Kind.MOVE_FALLBACK,
    )
)
_NOT_LAZY = without(LAZY)
_EMPTY = without(TOUCHED | MERGED | SWAPPED | FORKED | HELD | PROTECTED)
_WRITTEN = bytes(value & ~(MERGED | SWAPPED | FORKED) | TOUCHED for value in range(256))
_READ_BACK = without(SWAPPED)
_FORKS = where(TOUCHED, plus(FORKED))


def new_tags(machine: Machine, step: Step) -> bytes:
    """The bytes that a write puts into its pages; none for operations that do not write."""
    if step.kind == _WRITE_SAME:
        return bytes((SAME,)) * step.pages
    if step.kind not in (_WRITE, _POKE):
        return b""
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
    if kind in _KEEPS:
        pages.kept[start:end] = pages.kept[start:end].translate(_KEEPS[kind])
    if kind in MOVES:
        _move(pages, step)
    elif kind in (_WRITE, _WRITE_SAME, _POKE):
        _write(machine, pages, step, tags)
    elif kind == _READ:
        pages.more[start:end] = pages.more[start:end].translate(_READ_BACK)
    elif kind == _UFFD_MOVE:
        _move_page(pages, start, step.dst)
    elif kind in MAPS:
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


def unmapped_by_refusal(step: Step) -> list[tuple[int, int]]:
    """What a refused move may have unmapped: its destination, and the tail of one that shrinks. The guest always does.

    mremap_to() unmaps both before it looks at the source (mm/mremap.c).

    :returns: the first page and the number of pages of each range.
    """
    if step.kind not in MOVES or step.dst == step.start:
        return []
    tail = [(step.start + step.new, step.pages - step.new)] if step.new < step.pages else []
    return [(step.dst, step.new), *tail]


def refuse(machine: Machine, step: Step) -> None:
    """Change the model as an operation did that was refused."""
    pages = machine.processes[step.process]
    assert pages is not None
    for start, count in unmapped_by_refusal(step):
        pages.clear(start, start + count)


_EVERYWHERE: Final[dict[int, bytes]] = {
    _UNMERGE: without(MERGED),
    _RELEASE: without(HELD),
    _RECLAIM: where(TOUCHED, plus(SWAPPED)),
    _SWAPOFF: without(SWAPPED),
    _SCAN: where(TOUCHED, plus(MERGED)),
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
    pages.kept[start:end] = bytes((FILED if step.kind == _MAP_FILE else 0,)) * count
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
    of_file = pages.attr[start] & SHARED or pages.kept[start] & FILED
    # The series relocates no memory whose marks are lost on the way.
    relocated = step.kind in RELOCATES and not pages.kept[start] & REGISTERED
    natural = not of_file and (relocated or not any(each & TOUCHED for each in pages.more[start:end]))
    parts = [each[start : start + kept] for each in (pages.attr, pages.more, pages.kept, pages.tags)]
    home = pages.home[start]
    last_attr, last_kept = pages.attr[end - 1], pages.kept[end - 1]
    if dst != start:
        # A userfaultfd that has not asked for the event of a move loses the memory (mremap_userfaultfd_prep()).
        parts = [part.translate(change) for part, change in zip(parts, _LEAVES, strict=True)]
        last_kept &= ~REGISTERED
        if step.kind == _DONTUNMAP:
            _leave_empty(pages, start, end)
        else:
            pages.clear(start, end)
    elif new < step.pages:
        pages.clear(start + new, end)
    for values, part in zip((pages.attr, pages.more, pages.kept, pages.tags), parts, strict=True):
        values[dst : dst + kept] = part
    if new > kept:
        grown = new - kept
        pages.attr[dst + kept : dst + new] = bytes((last_attr & ~(GUARD | LAZY),)) * grown
        pages.more[dst + kept : dst + new] = bytes(grown)
        pages.kept[dst + kept : dst + new] = bytes((last_kept,)) * grown
        pages.tags[dst + kept : dst + new] = bytes(grown)
        if last_attr & LOCKED:
            _populate(pages, dst + kept, dst + new)
    if dst != start and natural:
        home = dst
    if home == UNKNOWN or (step.kind == _FALLBACK and not (natural or of_file)):
        # Whether the relocation failed is not known: a folio may have several pages.
        pages.home[dst : dst + new] = array("h", (UNKNOWN,) * new)
    else:
        pages.home[dst : dst + new] = array("h", range(home, home + new))
    pages.slots[step.wire[2] if dst == start else step.wire[6]] = (dst, new)


def _move_page(pages: Pages, start: int, dst: int) -> None:
    """UFFDIO_MOVE of one page: both mappings stay."""
    pages.tags[dst], pages.tags[start] = pages.tags[start], 0
    pages.more[dst] = pages.more[start] & ~PROTECTED
    pages.more[start] &= _EMPTY[0xFF]
    pages.attr[dst] &= ~LAZY


def _leave_empty(pages: Pages, start: int, end: int) -> None:
    # dontunmap_complete() clears VM_LOCKED of the mapping that stays behind (mm/mremap.c).
    pages.attr[start:end] = pages.attr[start:end].translate(_LEFT)
    pages.more[start:end] = pages.more[start:end].translate(_EMPTY)
    for index in range(start, end):
        if not pages.attr[index] & SHARED:
            pages.tags[index] = 0


_LEFT = without(LOCKED | GUARD | LAZY)
_UNPROTECTED = without(PROTECTED)
_UNREGISTERED = without(REGISTERED)
#: what memory leaves behind of attr, more, kept and tags when it moves
_LEAVES = (without(0), _UNPROTECTED, _UNREGISTERED, without(0))
_NOT_LOCKED = without(LOCKED)


def _forked(pages: Pages) -> Pages:
    """The child's pages."""
    pages.more[:] = pages.more.translate(_FORKS)
    child = pages.copy()
    child.attr[:] = child.attr.translate(_NOT_LOCKED)
    # The userfaultfd has not asked for the event of a fork (dup_userfaultfd()).
    child.more[:] = child.more.translate(_UNPROTECTED)
    child.kept[:] = child.kept.translate(_UNREGISTERED)
    for index, kept in enumerate(child.kept):
        if kept & DONTFORK:
            child.clear(index, index + 1)
        elif kept & WIPEONFORK:
            # The child's page tables are not filled at all, so that guard markers go as well (dup_mmap()).
            child.attr[index] &= ~(GUARD | LAZY)
            child.tags[index] = 0
            child.more[index] = 0
    return child
