# SPDX-License-Identifier: GPL-2.0
"""Moves with each flag, on kernels that know the relocation flags and on kernels that do not.

A kernel without the flags must refuse them with EINVAL and change nothing. Every function here that moves asserts
that instead, so that a test runs on both kinds of kernels.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from guest_tests.mm import pagemap, syscalls, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.support.checks import State, counted, fails, refused, same_accounts
from guest_tests.support.found import assert_found
from guest_tests.support.holds import pinned

_RELOCATES: Final = MREMAP_RELOCATE_ANON | MREMAP_MUST_RELOCATE_ANON

#: run a test with each of the three ways to ask for a move
ways = pytest.mark.parametrize(
    "flags", [0, MREMAP_RELOCATE_ANON, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "relocate", "must"]
)
#: the same for memory that cannot be relocated; these two ways move it plainly
lenient_ways = pytest.mark.parametrize("flags", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])


def move_or_refused(
    relocate: bool, area: CarveOut, source: Mapping, to: int | None, flags: int, *, pages: int | None = None
) -> Mapping | None:
    """Move ``source`` with any flags. Where the kernel does not know a flag, assert that it refuses with EINVAL.

    If a kernel that knows the flags refuses the move, the error says which of its counters rose.

    :param relocate: the fixture of that name.
    :param to: the exact new address; None lets the kernel stay or choose.
    :param flags: further ``MREMAP_*`` flags, as for :func:`guest_tests.mm.mapping.move`.
    :param pages: the new length in pages; unchanged by default.
    :returns: the moved mapping, its data checked; None where the kernel refused, and nothing changed.
    """
    if relocate or not flags & _RELOCATES:
        before = vmstat.vmstat()
        try:
            moved = move(source, to, flags, pages=pages)
        except OSError as error:
            now = vmstat.vmstat()
            rose = [name for name in now if name.startswith("mremap_") and now[name] > before[name]]
            error.add_note(f"counters of relocation that rose meanwhile: {', '.join(rose) or 'none'}")
            raise
        return moved.check()
    what = f"mremap() with flags {flags | syscalls.MREMAP_MAYMOVE:#x} on a kernel that does not relocate"
    refused(area, errno.EINVAL, lambda: move(source, to, flags, pages=pages), what, source)
    return None


def relocate_or_refused(
    relocate: bool, area: CarveOut, source: Mapping, to: int, flags: int, *, pageout: bool = True
) -> Mapping | None:
    """Move memory that can be relocated with any flags, as :func:`move_or_refused` does, and assert that a flag
    relocates it, that the frames are the same and that every page is found.

    :param pageout: as for :func:`guest_tests.support.found.assert_found`.
    """
    before = pagemap.pfns(source.address, source.pages)
    relocated = 1 if flags else 0
    with counted(relocate, relocated=relocated):
        result = move_or_refused(relocate, area, source, to, flags)
    if result is not None:
        assert pagemap.pfns(result.address, result.pages) == before, "the move changed page frames"
        assert_found(result, pageout=pageout)
    return result


def must_or_refused(relocate: bool, area: CarveOut, source: Mapping, to: int) -> Mapping | None:
    """Move with "must" what a kernel may be unable to relocate: either it succeeds, or it is refused without a trace.

    :returns: None if it was refused; nothing has changed then.
    """
    if relocate:
        before = State.of(area)
        try:
            return move(source, to, MREMAP_MUST_RELOCATE_ANON).check()
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            before.expect(area, "a refused relocation")
    refused_move(relocate, area, source, to)
    return None


def refused_move(
    relocate: bool,
    area: CarveOut,
    source: Mapping,
    to: int | None,
    flags: int = MREMAP_MUST_RELOCATE_ANON,
    *,
    code: int = errno.EFAULT,
    pages: int | None = None,
    arm: Callable[[], object] = lambda: None,
) -> None:
    """Assert that a relocation is refused and changes nothing: mappings, frames, data, accounting.

    It does not look at the reverse map, because that would move the pages. Call
    :func:`guest_tests.support.found.assert_found` afterwards.

    :param code: the error on a kernel that knows the flags; other kernels answer EINVAL.
    :param arm: called before every try.
    """
    expected = code if relocate else errno.EINVAL
    what = f"a move with flags {flags | syscalls.MREMAP_MAYMOVE:#x}"

    def call() -> Mapping:
        arm()
        return move(source, to, flags, pages=pages)

    refused(area, expected, call, what, source)
    same_accounts(lambda: fails(expected, call, what), f"{what}, though it is refused,")


def unknown_flags(source: Mapping, to: int, flags: int, area: CarveOut | None = None) -> None:
    """Assert that a kernel without relocation refuses ``flags``. For memory that must not be touched now.

    :param area: if given, its mappings and frames must not change.
    """
    before = None if area is None else State.of(area)
    fails(errno.EINVAL, lambda: move(source, to, flags), f"a move with flags {flags:#x}")
    if area is not None and before is not None:
        before.expect(area, "a refused move")


@contextmanager
def pin_in_the_way(relocate: bool, address: int, flags: int) -> Iterator[None]:
    """Pin a page while the block moves it, and assert that the kernel relocates nothing and counts a pin.

    :param flags: those of the move in the block; a plain move counts nothing.
    """
    with pinned(address), counted(relocate, relocated=0, refused_pinned=1 if flags else 0):
        yield


def mremap_call(old: int, old_pages: int, new_pages: int, flags: int, new: int = 0) -> Callable[[], int]:
    """A function that makes the raw system call; lengths in pages."""
    return lambda: syscalls.mremap(old, old_pages * PAGE_SIZE, new_pages * PAGE_SIZE, flags, new)
