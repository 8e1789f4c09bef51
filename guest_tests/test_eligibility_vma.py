# SPDX-License-Identifier: GPL-2.0
"""Which kinds of VMAs can be relocated, and which attributes are no obstacle: rows 56 to 63.

Only private anonymous memory is relocated. Flag 8 ("best effort") moves other memory like a plain move. Flag 16
("must") fails with EFAULT and changes nothing.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest_tests.mm import maps, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, ZERO, CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes.place import touch
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import (
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MREMAP_MUST_RELOCATE_ANON,
    MREMAP_RELOCATE_ANON,
    PROT_NONE,
    PROT_RW,
)
from guest_tests.mm.userfault import EVENT_REMAP, FEATURE_EVENT_REMAP, Event, Userfault
from guest_tests.support.checks import counted, fails
from guest_tests.support.found import assert_found
from guest_tests.support.moves import (
    lenient_ways,
    move_or_refused,
    refused_move,
    relocate_or_refused,
    unknown_flags,
    ways,
)

pytestmark = pytest.mark.shared_guest

#: pages in the mapping under test
_PAGES = 5
#: page of the carve-out it moves to
_TO = 20


# --- other kinds of memory ---------------------------------------------------------------------------------------


@contextmanager
def _shared(area: CarveOut) -> Iterator[Mapping]:
    yield area.map(0, _PAGES, shared=True).fill()


@contextmanager
def _private_file(area: CarveOut) -> Iterator[Mapping]:
    fd = syscalls.memfd_create("private")
    try:
        os.ftruncate(fd, _PAGES * PAGE_SIZE)
        mapping = area.map_file(0, _PAGES, fd)
        mapping.contents = [ZERO] * _PAGES
        for index in range(3):  # copied on write: anonymous pages, the other two are the file's
            mapping.write(index, b"private %d " % index)
        yield mapping.touch_read()
    finally:
        os.close(fd)


@contextmanager
def _zero_device(area: CarveOut) -> Iterator[Mapping]:
    fd = os.open("/dev/zero", os.O_RDWR)
    try:
        yield area.map_file(0, _PAGES, fd, offset=3 * PAGE_SIZE).fill()
    finally:
        os.close(fd)


_OTHER_KINDS = {"shared-anon": _shared, "private-file": _private_file, "zero-device": _zero_device}


@lenient_ways
@pytest.mark.parametrize("kind", _OTHER_KINDS)
def test_other_kinds_move_plainly(relocate: bool, area: CarveOut, kind: str, flags: int) -> None:
    """Rows 56 (shared-anon) and 57 (private-file): shared anonymous memory, a private file mapping and a private
    mapping of /dev/zero move plainly and with flag 8.

    The last one has anonymous pages only, but it has a file as well.

    Unpatched: a plain move keeps the offset in the file, and every page is found.
    Patched: the same with flag 8.
    """
    with _OTHER_KINDS[kind](area) as source:
        offset = maps.vma_at(source.address).offset
        with counted(relocate, refused_vma=1 if flags else 0, relocated=0):
            result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        if result is not None:
            now = maps.vma_at(result.address).offset
            assert now == offset, f"the mapping began at {offset:#x} in its file, and at {now:#x} after the move"
            assert_found(result, pageout=False)


@pytest.mark.parametrize("kind", _OTHER_KINDS)
def test_other_kinds_are_refused(relocate: bool, area: CarveOut, kind: str) -> None:
    """Rows 56 (shared-anon) and 57 (private-file): shared anonymous memory, a private file mapping and a private
    mapping of /dev/zero move with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes.
    """
    with _OTHER_KINDS[kind](area) as source:
        with counted(relocate, refused_vma=1, relocated=0):
            refused_move(relocate, area, source, area.page(_TO))
        assert_found(source, pageout=False)


@ways
def test_hugetlb(relocate: bool, flags: int) -> None:
    """Row 58 (hugetlb): private hugetlb memory moves by one huge page (5.16).

    ::

        huge page   0         1         2         3
                    |sssssssss|         |--> here |

    Unpatched: a plain move, and every page is found.
    Patched: flag 8 moves it like a plain move, flag 16 is refused with EFAULT.
    """
    system.require_config("HUGETLBFS")
    size = vmstat.meminfo().get("Hugepagesize", 0) << 10
    if not 0 < size <= 32 << 20:
        pytest.skip(f"needs huge pages of 32 MB at most: CONFIG_HUGETLBFS gives {size >> 10} kB here")
    pages = size // PAGE_SIZE
    with _huge_pages(4), carve_out(4 * pages) as area:
        source = area.map(0, pages, flags=syscalls.MAP_HUGETLB)
        source.contents = [None] * pages
        for index in (0, 1, pages // 2, pages - 1):
            source.write(index, b"huge %d " % index)
        if flags & MREMAP_MUST_RELOCATE_ANON:
            refused_move(relocate, area, source, area.page(2 * pages))
            result: Mapping | None = source
        else:
            result = move_or_refused(relocate, area, source, area.page(2 * pages), flags)
        if result is not None:
            assert_found(result, pageout=False)


@contextmanager
def _huge_pages(number: int) -> Iterator[None]:
    file = Path("/proc/sys/vm/nr_hugepages")
    before = file.read_text()
    try:
        file.write_text(str(number))
        got = int(file.read_text())
        if got < number:
            pytest.skip(f"needs {number} free huge pages, the kernel found memory for {got}")
        yield
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", ["[vvar]", "[vdso]"])
def test_special_mappings(relocate: bool, name: str) -> None:
    """Row 59 (special): a child moves [vvar] or [vdso], which the kernel maps into every process.

    Unpatched: EINVAL with flag 16; a plain move works, there and back.
    Patched: EFAULT with flag 16; flag 8 moves it like a plain move.
    """
    with Child() as child:  # no other thread may read the clock while [vvar] and [vdso] are away
        child.call(_move_special, relocate, name)


def _move_special(relocate: bool, name: str) -> None:
    vma = next((vma for vma in maps.vmas() if vma.path == name), None)
    if vma is None:
        pytest.skip(f"needs a kernel that maps {name} into processes")
    length = vma.length
    with carve_out(length // PAGE_SIZE) as area:
        ordinary = MREMAP_MAYMOVE | MREMAP_FIXED
        fails(
            errno.EFAULT if relocate else errno.EINVAL,
            lambda: syscalls.mremap(vma.start, length, length, ordinary | MREMAP_MUST_RELOCATE_ANON, area.address),
            f"relocation of {name}",
        )
        assert vma in maps.vmas(), f"a refused relocation of {name} changed it"
        flags = ordinary | (MREMAP_RELOCATE_ANON if relocate else 0)
        # No Python may run between the two calls, because the interpreter might need the clock. The second move
        # succeeds only if the first one has moved the mapping.
        there = syscalls.call("mremap", vma.start, length, length, flags, area.address)
        back = syscalls.call("mremap", area.address, length, length, flags, vma.start)
        assert (there, back) == (area.address, vma.start), f"{name} moved to {there:#x} and back to {back:#x}"
        assert vma in maps.vmas(), f"{name} did not move back"


# --- attributes that are no obstacle -----------------------------------------------------------------------------


@ways
def test_locked_memory(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 60 (mlocked): locked memory moves.

    Unpatched: a plain move keeps it locked, and the amount of locked memory is the same.
    Patched: the same with either flag, which relocates it.
    """
    syscalls.mlock(source.address, source.length)
    locked = vmstat.status()["VmLck"]
    result = relocate_or_refused(relocate, area, source, area.page(_TO), flags, pageout=False)
    assert vmstat.status()["VmLck"] == locked, "a move changed how much memory is locked"
    here = source if result is None else result
    vma = maps.vma_at(here.address, detailed=True)
    assert "lo" in vma.vm_flags, f"{vma} is not locked any more"
    assert vma.size("Locked") == here.length >> 10, f"{vma.size('Locked')} kB of {vma} are locked"


@ways
def test_inaccessible_memory(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 61 (prot-none): faulted memory is made inaccessible and moves.

    Unpatched: a plain move keeps the frames; the data is there when it is made accessible again.
    Patched: the same with either flag.
    """
    before = pagemap.pfns(source.address, source.pages)
    source.mprotect(PROT_NONE)
    contents, source.contents = source.contents, [None] * source.pages
    result = move_or_refused(relocate, area, source, area.page(_TO), flags)
    here = source if result is None else result
    assert pagemap.pfns(here.address, here.pages) == before, "the move changed page frames"
    here.mprotect(PROT_RW)
    here.contents = contents
    assert_found(here.check())


@ways
@pytest.mark.parametrize("event", [False, True], ids=["no-event", "event"])
def test_userfault(relocate: bool, area: CarveOut, source: Mapping, flags: int, event: bool) -> None:
    """Row 62 (uffd): memory that is registered with userfaultfd moves, with and without an event for its owner.

    It stays registered only if the owner asked for the event (mremap_userfaultfd_prep(), fs/userfaultfd.c).

    Unpatched: a plain move sends the event that was asked for.
    Patched: the same with either flag.
    """
    system.require_config("USERFAULTFD")
    with Userfault(FEATURE_EVENT_REMAP if event else 0) as uffd:
        uffd.register(source)
        events: list[Event | None] = []
        # A move that sends an event waits until the event is read.
        thread = threading.Thread(target=lambda: events.append(uffd.read(2 if relocate or not flags else 0.1)))
        if event:
            thread.start()
        try:
            result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        finally:
            if event:
                thread.join()
        if result is None:
            return
        if event:
            arguments = (source.address, result.address, result.length)
            assert events == [Event(EVENT_REMAP, arguments)], f"the owner of the memory was told {events}"
        registered = "um" in maps.vma_at(result.address, detailed=True).vm_flags
        assert registered == event, f"after the move the memory is {'' if registered else 'not '}registered"
    assert_found(result)


def test_userfault_that_stays_behind(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 62 (uffd): memory that is registered without the event moves with flag 16 next to memory that is not
    registered.

    ::

        page   15        20        25
               |fffffffff|sssssssss|     one mapping, of which nothing is registered

    Unpatched: EINVAL, and nothing changes.
    Patched: it is not registered any more, and so it merges with its neighbour.
    """
    system.require_config("USERFAULTFD")
    neighbour = area.map(_TO - _PAGES, _PAGES).fill()
    with Userfault(0) as uffd:
        uffd.register(source)
        result = move_or_refused(relocate, area, source, area.page(_TO), MREMAP_MUST_RELOCATE_ANON)
    if result is not None:
        found = maps.vma_at(result.address)
        expected = (neighbour.address, result.end)
        assert (found.start, found.end) == expected, (
            f"{found} did not merge with its neighbour at {neighbour.address:#x}"
        )
        assert_found(neighbour)
    assert_found(source if result is None else result)


@ways
def test_guard_pages(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 63 (guard): memory with two guard pages in its middle moves (6.13).

    ::

        page   0         2     4         6            20        22    24        26
               |sssssssss|guard|sssssssss|     ->     |sssssssss|guard|sssssssss|

    Unpatched: a plain move takes the guards along: the same two pages cannot be read at the new place.
    Patched: the same with either flag.
    """
    system.require_kernel(6, 13, "guard pages")
    source = area.map(0, 6).fill()
    guards = Mapping(source.page(2), 2)
    guards.madvise(syscalls.MADV_GUARD_INSTALL)
    source.contents[2:4] = [None, None]
    # Page by page: reading a guard page kills.
    for index in (0, 1, 4, 5):
        source.part(index).check()
    if flags and not relocate:
        unknown_flags(source, area.page(_TO), flags, area)
        return
    result = move(source, area.page(_TO), flags).check()
    readable = [touch(address) for address in result.page_addresses]
    assert readable == [True, True, False, False, True, True], f"of the moved pages these can be read: {readable}"
    assert_found(result.part(0, 2), result.part(4, 2))
    Mapping(result.page(2), 2).madvise(syscalls.MADV_GUARD_REMOVE)
    Mapping(result.page(2), 2, [ZERO, ZERO]).check()
