# SPDX-License-Identifier: GPL-2.0
"""What the tests that the explorer writes are made of: pages of a carve-out by number, and the byte that each holds."""

from __future__ import annotations

import functools
import os

import pytest

from guest_tests.mm import numa, pagemap, swap, syscalls, userfault
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Content, Mapping, move
from guest_tests.mm.userfault import FEATURE_MOVE, MODE_WP, Userfault
from guest_tests.support.failing import failing_relocation
from guest_tests.support.found import assert_found, folios

#: pages of the file that programs map
_FILE_PAGES = 1024


def pages(area: CarveOut, first: int, count: int = 1) -> Mapping:
    """Some pages of a carve-out; what they hold is not checked."""
    return Mapping(area.page(first), count)


def write(area: CarveOut, first: int, tags: bytes) -> None:
    """Write one page for each byte: the byte at its beginning and end, and zeros between."""
    mapping = pages(area, first, len(tags))
    for index, tag in enumerate(tags):
        mapping.write(index, page(tag))


def map_file(area: CarveOut, first: int, count: int) -> Mapping:
    """Map a file of zeros privately. Its offset is that of the page in the carve-out."""
    return area.map_file(first, count, _file(), offset=first * PAGE_SIZE)


@functools.cache
def _file() -> int:
    fd = syscalls.memfd_create("program")
    os.ftruncate(fd, _FILE_PAGES * PAGE_SIZE)
    return fd


def bind(area: CarveOut, first: int, count: int) -> None:
    """Prefer the last node for some pages."""
    numa.mbind(area.page(first), count * PAGE_SIZE, numa.MPOL_PREFERRED, [numa.nodes()[-1]])


def unbind(area: CarveOut, first: int, count: int) -> None:
    """Take the policy of some pages away."""
    numa.mbind(area.page(first), count * PAGE_SIZE, numa.MPOL_DEFAULT)


def name(area: CarveOut, first: int, count: int) -> None:
    """Give some pages a name."""
    syscalls.name_anonymous(area.page(first), count * PAGE_SIZE, "program")


def unname(area: CarveOut, first: int, count: int) -> None:
    """Take the name of some pages away."""
    syscalls.name_anonymous(area.page(first), count * PAGE_SIZE, None)


@functools.cache
def _userfault() -> Userfault:
    """One userfaultfd for all memory. It asks for no events. A write to a page that it protects ends with SIGBUS."""
    opened = userfault.without_reader()
    if opened is None:
        pytest.skip("needs a userfaultfd that protects memory which was never touched (6.4)")
    return opened


def uffd_register(area: CarveOut, first: int, count: int) -> None:
    """Register some pages with the userfaultfd, for write protection."""
    _userfault().register(pages(area, first, count), MODE_WP)


def uffd_unregister(area: CarveOut, first: int, count: int) -> None:
    """Give some pages back to the kernel."""
    _userfault().unregister(pages(area, first, count))


def uffd_protect(area: CarveOut, first: int, count: int) -> None:
    """Have the userfaultfd write-protect some pages."""
    _userfault().write_protect(pages(area, first, count))


def uffd_unprotect(area: CarveOut, first: int, count: int) -> None:
    """Have the userfaultfd write-protect some pages no longer."""
    _userfault().write_protect(pages(area, first, count), on=False)


def uffd_move(area: CarveOut, source: int, to: int) -> None:
    """Have the userfaultfd move one page to where none is."""
    if not _userfault().features & FEATURE_MOVE:
        pytest.skip("needs UFFDIO_MOVE (6.8)")
    _userfault().move(pages(area, source), area.page(to))


def move_failing(area: CarveOut, first: int, count: int, to: int, flags: int, number: int) -> None:
    """Relocate some pages, and have the relocation of the n-th of their folios fail.

    :raises OSError: EFAULT, if they must be relocated and have so many folios.
    """
    with failing_relocation() as arm:
        arm(number)
        move(pages(area, first, count), area.page(to), flags)


def poke(area: CarveOut, at: int, tag: bytes) -> None:
    """Write the byte at the beginning and end of a page past the protection of its mapping."""
    for address in (area.page(at), area.page(at + 1) - 1):
        syscalls.poke(address, tag)


def swap_off_and_on() -> None:
    """Have all that is swapped out read back."""
    swap.require_swap()
    swap.turn_off_and_on(swap.areas()[0])


def walk(area: CarveOut, first: int, count: int) -> None:
    """Make the kernel walk the reverse map of those pages that are present.

    :raises AssertionError: naming a page that is lost.
    """
    mapping = pages(area, first, count)
    if folios(mapping):
        assert_found(mapping, pageout=False)


def check(area: CarveOut, first: int, tags: bytes) -> Mapping:
    """Compare pages with what :func:`write` wrote.

    :raises AssertionError: naming the page.
    """
    contents = [Content(repeated=page(tag)) for tag in tags]
    return Mapping(area.page(first), len(tags), [*contents]).check()


def check_marks(area: CarveOut, first: int, marks: str) -> None:
    """Compare which pages a userfaultfd write-protects.

    :param marks: for each page: ``w`` it is, ``-`` it is not.
    :raises AssertionError: naming the page.
    """
    entries = pagemap.entries(area.page(first), len(marks))
    for index, (entry, mark) in enumerate(zip(entries, marks, strict=True), first):
        assert entry.uffd_wp == (mark == "w"), (
            f"page {index} is {'' if entry.uffd_wp else 'not '}write-protected by a userfaultfd"
        )


def page(tag: int) -> bytes:
    """A page with one byte at its beginning and end."""
    return bytes([tag]) + bytes(PAGE_SIZE - 2) + bytes([tag])
