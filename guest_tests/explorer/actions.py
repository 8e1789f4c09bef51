# SPDX-License-Identifier: GPL-2.0
"""Does one step of a program, in the process that calls."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from guest_tests.explorer.arena import BASE, PAGE, Arena
from guest_tests.explorer.calls import STORE
from guest_tests.mm import ksm, memcg, numa, swap, syscalls, userfault
from guest_tests.support.failing import RELOCATION, failing_relocation
from guest_tests.support.holds import Spliced
from harness.programs import effects
from harness.programs.language import FAILING, KINDS, Kind, numbers
from harness.programs.memory import ARENA_PAGES, Step

_FIXED: Final = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
_MOVES: Final = {
    Kind.MOVE: _FIXED,
    Kind.MOVE_GROW: _FIXED,
    Kind.MOVE_SHRINK: _FIXED,
    Kind.MOVE_DONTUNMAP: _FIXED | syscalls.MREMAP_DONTUNMAP,
    Kind.MOVE_RELOCATE: _FIXED | syscalls.MREMAP_RELOCATE_ANON,
    Kind.MOVE_MUST_RELOCATE: _FIXED | syscalls.MREMAP_MUST_RELOCATE_ANON,
    Kind.MOVE_UNDONE: _FIXED | syscalls.MREMAP_MUST_RELOCATE_ANON,
    Kind.MOVE_FALLBACK: _FIXED | syscalls.MREMAP_RELOCATE_ANON,
    Kind.GROW: 0,
    Kind.SHRINK: 0,
}
_ADVICE: Final = {
    Kind.MERGEABLE: syscalls.MADV_MERGEABLE,
    Kind.UNMERGEABLE: syscalls.MADV_UNMERGEABLE,
    Kind.DONTNEED: syscalls.MADV_DONTNEED,
    Kind.FREE: syscalls.MADV_FREE,
    Kind.HUGEPAGE: syscalls.MADV_HUGEPAGE,
    Kind.NOHUGEPAGE: syscalls.MADV_NOHUGEPAGE,
    Kind.PAGEOUT: syscalls.MADV_PAGEOUT,
    Kind.COLD: syscalls.MADV_COLD,
    Kind.DONTFORK: syscalls.MADV_DONTFORK,
    Kind.DOFORK: syscalls.MADV_DOFORK,
    Kind.WIPEONFORK: syscalls.MADV_WIPEONFORK,
    Kind.KEEPONFORK: syscalls.MADV_KEEPONFORK,
    Kind.GUARD: syscalls.MADV_GUARD_INSTALL,
    Kind.UNGUARD: syscalls.MADV_GUARD_REMOVE,
    Kind.POPULATE: syscalls.MADV_POPULATE_WRITE,
}
_PROTECTIONS: Final = {
    Kind.PROTECT_NONE: syscalls.PROT_NONE,
    Kind.PROTECT_READ: syscalls.PROT_READ,
    Kind.PROTECT_WRITE: syscalls.PROT_RW,
}
_SHARINGS: Final = {Kind.MAP: syscalls.MAP_PRIVATE, Kind.MAP_SHARED: syscalls.MAP_SHARED}
_USERFAULTS: Final = {
    Kind.UFFD_REGISTER: (userfault.UFFDIO_REGISTER, userfault.MODE_WP),
    Kind.UFFD_UNREGISTER: (userfault.UFFDIO_UNREGISTER, 0),
    Kind.UFFD_PROTECT: (userfault.UFFDIO_WRITEPROTECT, userfault.WRITEPROTECT_MODE_WP),
    Kind.UFFD_UNPROTECT: (userfault.UFFDIO_WRITEPROTECT, 0),
}
#: the name that programs give to memory
_NAME: Final = ctypes.create_string_buffer(b"program")
#: Pages of the file that programs map. A mapping of the last page of the arena may still grow.
_FILE_PAGES: Final = 2 * ARENA_PAGES

#: writes that a plan does by machine code
_STORES: Final = numbers(Kind.WRITE, Kind.WRITE_SAME)
#: How many frames a guest may lose
_MOST_OFFLINE: Final = 2000

#: How often the control group is reclaimed at most, until no page is present. Pages that were used lately survive some
#: rounds, on arm64 more than on x86-64.
_RECLAIMS: Final = 8

Action = Callable[[Step, bytes], int]
#: a system call of a step as a record of :mod:`.calls`: from its first page, pages, first page of the place, new pages
Record = Callable[[int, int, int, int], list[int]]


def _records(file: int, uffd: int) -> dict[Kind, Record]:
    """The operations that are one system call.

    :param file: the descriptor of the file that programs map.
    :param uffd: the userfaultfd; -1 if there is none.
    """
    table = {
        Kind.MAP_FILE: _mapping(syscalls.MAP_PRIVATE, file),
        Kind.BIND: _on_range("mbind", numa.MPOL_PREFERRED, ctypes.addressof(_last_node()), numa.MASK_BITS),
        Kind.UNBIND: _on_range("mbind", numa.MPOL_DEFAULT),
        Kind.NAME: _naming(ctypes.addressof(_NAME)),
        Kind.UNNAME: _naming(0),
        Kind.UNMAP: _on_range("munmap"),
        Kind.LOCK: _on_range("mlock"),
        Kind.UNLOCK: _on_range("munlock"),
    }
    table |= {kind: _mapping(sharing | syscalls.MAP_ANONYMOUS) for kind, sharing in _SHARINGS.items()}
    table |= {kind: _moving(flags) for kind, flags in _MOVES.items()}
    table |= {kind: _asking(uffd, request, partial(_range, mode)) for kind, (request, mode) in _USERFAULTS.items()}
    table[Kind.UFFD_MOVE] = _asking(uffd, userfault.UFFDIO_MOVE, _page_to_page)
    table |= {kind: _on_range("madvise", advice) for kind, advice in _ADVICE.items()}
    return table | {kind: _on_range("mprotect", protection) for kind, protection in _PROTECTIONS.items()}


@functools.cache
def _last_node() -> ctypes.Array[ctypes.c_ulong]:
    return numa.mask([numa.nodes()[-1]])


def _on_range(name: str, third: int = 0, fourth: int = 0, fifth: int = 0) -> Record:
    number = syscalls.number(name)
    return lambda start, pages, _dst, _new: [
        number,
        BASE + start * PAGE,
        pages * PAGE,
        third,
        fourth,
        fifth,
        0,
        0,
    ]


def _naming(name: int) -> Record:
    number = syscalls.number("prctl")
    return lambda start, pages, _dst, _new: [
        number,
        syscalls.PR_SET_VMA,
        syscalls.PR_SET_VMA_ANON_NAME,
        BASE + start * PAGE,
        pages * PAGE,
        name,
        0,
        0,
    ]


def _asking(uffd: int, request: int, argument: Callable[[int, int, int], ctypes.Array[ctypes.c_uint64]]) -> Record:
    """A request of the userfaultfd.

    :param argument: makes its argument of the first page, the pages, and the first page of the place.
    """
    number = syscalls.number("ioctl")
    return lambda start, pages, dst, _new: [
        number,
        uffd,
        request,
        ctypes.addressof(argument(start, pages, dst)),
        0,
        0,
        0,
        0,
    ]


@functools.cache
def _page_to_page(start: int, _pages: int, dst: int) -> ctypes.Array[ctypes.c_uint64]:
    """The argument of a move of one page: to, from, length, mode, and room for an answer."""
    return (ctypes.c_uint64 * 5)(BASE + dst * PAGE, BASE + start * PAGE, PAGE, 0, 0)


@functools.cache
def _range(mode: int, start: int, pages: int, _dst: int) -> ctypes.Array[ctypes.c_uint64]:
    """The argument of a request: address, length, mode, and room for an answer."""
    return (ctypes.c_uint64 * 4)(BASE + start * PAGE, pages * PAGE, mode, 0)


def _mapping(flags: int, file: int = -1) -> Record:
    """A mapping at the place.

    :param file: the descriptor; the default is that of anonymous memory.
    """
    number, flags = syscalls.number("mmap"), flags | syscalls.MAP_FIXED
    # The offset in a file is that of the place in the arena, so that neighbours fit as anonymous memory does.
    scale = 0 if file < 0 else PAGE
    return lambda _start, _pages, dst, new: [
        number,
        BASE + dst * PAGE,
        new * PAGE,
        syscalls.PROT_RW,
        flags,
        file,
        dst * scale,
        0,
    ]


def _moving(flags: int) -> Record:
    number = syscalls.number("mremap")
    return lambda start, pages, dst, new: [
        number,
        BASE + start * PAGE,
        pages * PAGE,
        new * PAGE,
        flags,
        BASE + dst * PAGE if flags else 0,
        0,
        0,
    ]


class Actions:
    """What each kind of operation does to the arena of the calling process. Each action returns 0 or an errno."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._held: list[Spliced] = []
        self._offlined = 0
        self._file = syscalls.memfd_create("program")
        os.ftruncate(self._file, _FILE_PAGES * PAGE)
        self._uffd = userfault.without_reader()
        records = _records(self._file, -1 if self._uffd is None else self._uffd.fd)
        table: dict[Kind, Action] = {
            Kind.WRITE: self._write,
            Kind.WRITE_SAME: self._write,
            Kind.READ: self._read,
            Kind.SCAN: self._scan,
            Kind.UNMERGE_ALL: self._unmerge_all,
            Kind.HOLD: self._hold,
            Kind.RELEASE: self._release,
            Kind.RECLAIM: self._reclaim,
            Kind.POKE: self._poke,
            Kind.SOFT_OFFLINE: self._soft_offline,
            Kind.SWAPOFF: self._swapoff,
        }
        table |= {kind: self._calling(record) for kind, record in records.items()}
        table |= {kind: self._moving(records[kind]) for kind, flags in _MOVES.items() if flags}
        table |= {kind: self._failing(table[kind]) for kind in FAILING}
        #: by number of the kind; forks and exits are not among them
        self.table: dict[int, Action] = {KINDS.index(kind): action for kind, action in table.items()}
        self._records = {KINDS.index(kind): record for kind, record in records.items()}

    def all(self, steps: Iterable[Sequence[Any]]) -> bool:
        """Do the steps of a plan, many at once; returns whether all succeeded."""
        row: list[int] = []
        run, records = self._arena.calls.run, self._records
        for kind, start, pages, dst, new, tags in steps:
            record = records.get(kind)
            if record is not None:
                row += record(start, pages, dst, new)
            elif kind in _STORES:
                for index, tag in enumerate(bytes.fromhex(tags)):
                    where = BASE + (start + index) * PAGE
                    row += (STORE, where, tag, 0, 0, 0, 0, 0, STORE, where + PAGE - 1, tag, 0, 0, 0, 0, 0)
            else:
                step = Step(kind, 0, start, pages, dst, new, ())
                if run(row) or self.table[kind](step, bytes.fromhex(tags)):
                    return False
                row = []
        return not run(row)

    def forget(self) -> None:
        """Drop what the program left behind besides its memory."""
        while self._held:
            self._held.pop().close()

    # --- system calls ----------------------------------------------------------------------------------------------

    def _calling(self, record: Record) -> Action:
        run = self._arena.calls.run
        return lambda step, _: run(record(step.start, step.pages, step.dst, step.new))

    def _moving(self, record: Record) -> Action:
        run, call, unmap = self._arena.calls.run, self._arena.call, syscalls.number("munmap")

        def move(step: Step, _: bytes) -> int:
            error = run(record(step.start, step.pages, step.dst, step.new))
            if error:
                # The kernel may have done so already. The model counts on it.
                for start, count in effects.unmapped_by_refusal(step):
                    call(unmap, BASE + start * PAGE, count * PAGE)
            return error

        return move

    @staticmethod
    def _failing(move: Action) -> Action:
        def fail(step: Step, tags: bytes) -> int:
            if not RELOCATION.exists():
                return move(step, tags)  # a program from elsewhere
            with failing_relocation() as arm:
                arm(step.wire[-1])
                return move(step, tags)

        return fail

    # --- access ----------------------------------------------------------------------------------------------------

    def _write(self, step: Step, tags: bytes) -> int:
        self._arena.fill(step.start, step.start + step.pages, tags)
        return 0

    def _poke(self, step: Step, tags: bytes) -> int:
        where = BASE + step.start * PAGE
        try:
            syscalls.poke(where, tags)
            syscalls.poke(where + PAGE - 1, tags)
        except OSError as error:
            return error.errno or 0
        return 0

    def _read(self, step: Step, _: bytes) -> int:
        self._arena.tags(step.start, step.start + step.pages)
        return 0

    # --- the system --------------------------------------------------------------------------------------------------

    def _scan(self, _step: Step, _tags: bytes) -> int:
        ksm.Ksm().scan(seconds=10.0)
        return 0

    def _unmerge_all(self, _step: Step, _tags: bytes) -> int:
        try:
            ksm.write("run", 2)
        except OSError as error:
            return error.errno or 0
        ksm.write("run", 0)
        return 0

    def _hold(self, step: Step, _: bytes) -> int:
        try:
            self._held.append(Spliced(BASE + step.start * PAGE, step.pages * PAGE))
        except OSError as error:
            return error.errno or 0
        return 0

    def _release(self, _step: Step, _tags: bytes) -> int:
        self.forget()
        return 0

    def _soft_offline(self, step: Step, _: bytes) -> int:
        if self._offlined == _MOST_OFFLINE:
            return errno.EBUSY
        error = self._arena.call(syscalls.number("madvise"), BASE + step.start * PAGE, PAGE, syscalls.MADV_SOFT_OFFLINE)
        self._offlined += not error
        return error

    def _swapoff(self, _step: Step, _tags: bytes) -> int:
        try:
            swap.turn_off_and_on(swap.areas()[0])
        except OSError as error:
            return error.errno or 0
        return 0

    def _reclaim(self, _step: Step, _tags: bytes) -> int:
        group = memcg.current()
        try:
            fd = os.open(group / "memory.reclaim", os.O_WRONLY)
        except OSError as error:
            return error.errno or 0
        for _ in range(_RECLAIMS):
            # EAGAIN says that it reclaimed what it could.
            with contextlib.suppress(BlockingIOError):
                os.write(fd, Path(group / "memory.current").read_bytes())
            if not any(entry >> 63 for entry in self._arena.entries()[:ARENA_PAGES]):
                break
        os.close(fd)
        return 0
