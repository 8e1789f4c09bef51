# SPDX-License-Identifier: GPL-2.0
"""Which memory can be relocated, and which must be left alone: rows 47 to 64.

Relocation rewrites pages, so that no other process may use them. Memory that is shared by fork is not relocated,
neither in the parent nor in the child. Only private anonymous memory is. Flag 8 ("best effort") moves other memory like
a plain move. Flag 16 ("must") fails with EFAULT and changes nothing.
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
from guest_tests.mm.probes import Place
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
from guest_tests.support.checks import counted, expect_layout, fails
from guest_tests.support.found import assert_found, assert_found_at
from guest_tests.support.moves import lenient_ways, move_or_refused, refused_move, unknown_flags, ways

pytestmark = pytest.mark.shared_guest

#: pages in the mapping under test
_PAGES = 5
#: page of the carve-out it moves to
_TO = 20


@pytest.fixture
def source(area: CarveOut) -> Mapping:
    """Five faulted pages at the beginning of the carve-out."""
    return area.map(0, _PAGES).fill()


def _must_not_relocate(relocate: bool, area: CarveOut, mapping: Mapping) -> None:
    """Assert, in the process that calls this, that flag 16 is refused, and that every page is found."""
    with counted(relocate, refused_forked=1, relocated=0, undone=0):
        refused_move(relocate, area, mapping, area.page(_TO))
    assert_found(mapping, pageout=False)


def _relocates(relocate: bool, area: CarveOut, mapping: Mapping, flags: int, *, pageout: bool = True) -> Mapping | None:
    """Move to page 20 and assert that the frames are the same and every page is found."""
    before = pagemap.pfns(mapping.address, mapping.pages)
    relocated = 1 if flags else 0
    with counted(relocate, relocated=relocated):
        result = move_or_refused(relocate, area, mapping, area.page(_TO), flags)
    if result is not None:
        assert pagemap.pfns(result.address, result.pages) == before, "the move changed page frames"
        assert_found(result, pageout=pageout)
    return result


# --- fork --------------------------------------------------------------------------------------------------------


def test_a_parent(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 47 (fork-parent): a process with a living child relocates memory that the child inherited, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes.
    """
    with Child() as child:
        _must_not_relocate(relocate, area, source)
        child.call(source.check)


def test_a_child(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 48 (fork-child): a child relocates memory that it inherited, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes.
    """
    with Child() as child:
        child.call(_must_not_relocate, relocate, area, source)
        source.check()


@lenient_ways
@pytest.mark.parametrize("mover", ["parent", "child"])
def test_best_effort_after_fork(relocate: bool, area: CarveOut, flags: int, mover: str) -> None:
    """Row 49 (fork-best-effort): the parent or the child moves memory that both share copy-on-write.

    ::

        page        0         5         10             20        25
        stays       |sssssssss|uuuuuuuuu|
        moves                 |uuuuuuuuu|sssssssss|         not merged: it keeps the offset of its old place

    Unpatched: after a plain move it does not merge at its new place. The kernel finds each page in both processes, and
    no write shows in the other process.
    Patched: flag 8 moves it like a plain move, without relocating it.
    """
    source = area.map(0, _PAGES).fill()
    area.map(5, _PAGES)
    with Child() as child:
        result = _in(child, mover, _move_best_effort, relocate, area, source, flags)
        if result is None:
            return
        if mover == "parent":
            here, there = result, source
        else:
            here, there = source, result
        for index in range(_PAGES):
            assert_found_at(Place(here.page(index)), Place(there.page(index), child))
        # A write of one process must not show in the other.
        here.write(0, b"written by the parent")
        child.call(there.check)
        child.call(there.write, 1, b"written by the child")
        here.check()
        child.call(there.part(2, 3).check)
        assert_found(here, pageout=False)


def _in(child: Child, who: str, function: object, *args: object) -> Mapping | None:
    assert callable(function)
    result = child.call(function, *args) if who == "child" else function(*args)
    assert result is None or isinstance(result, Mapping)
    return result


def _move_best_effort(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> Mapping | None:
    with counted(relocate, relocated=0, refused_forked=1 if flags else 0):
        result = move_or_refused(relocate, area, source, area.page(10), flags)
    if result is not None:
        expect_layout(area, [(5, 5), (10, 5)], "forked memory is not relocated, so that it does not merge")
    return result


def test_a_child_that_is_a_parent(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 50 (fork-twice): a process, its child and its grandchild each relocate the same memory with flag 16.

    The anon_vma of the child is no root, and an anon_vma that is no root does not count itself among its children
    (found by Wei Yang, 20250430004703.63rumj4znewlbc2h@master).

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT for all three, and nothing changes.
    """
    with Child() as child, child.fork() as grandchild:
        child.call(_must_not_relocate, relocate, area, source)
        grandchild.call(_must_not_relocate, relocate, area, source)
        _must_not_relocate(relocate, area, source)
        for each in (child, grandchild):
            each.call(source.check)


def test_anon_vmas_that_are_used_again(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 51 (reuse-3): a chain of four forks in which the first two children end before the memory is relocated with
    flag 16.

    A fork reuses the anon_vma of an ancestor that has no memory left and at most one child (anon_vma_clone(),
    mm/rmap.c), so that the tree of anon_vmas says little about which processes share memory.

    ::

        this process ── first (ends) ── second (ends) ── third ── fourth

    Unpatched: EINVAL in every process, and nothing changes.
    Patched: EFAULT in every process, and nothing changes.
    """
    with Child() as first:
        second = first.fork(outlive_parent=True)
        third = second.fork(outlive_parent=True)
        first.kill()
        second.kill()
        fourth = third.fork()
        try:
            for each in (third, fourth):
                each.call(source.check)
                each.call(_must_not_relocate, relocate, area, source)
            _must_not_relocate(relocate, area, source)
        finally:
            for each in (fourth, third, second):
                each.close()


@ways
def test_a_parent_whose_child_is_gone(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 52 (child-exited): a process moves memory after the only child that inherited it has ended.

    Unpatched: a plain move, and every page is found.
    Patched: both flags relocate it: no process shares the memory any more.
    """
    with Child() as child:
        child.call(source.check)
    _relocates(relocate, area, source, flags)


def test_a_child_whose_parent_is_gone(relocate: bool, area: CarveOut) -> None:
    """Row 53 (parent-exited): a child moves inherited memory after its parent has ended.

    The memory belongs to the child alone, but its VMA is still linked to the parent's anon_vma, which holds the pages
    from before the fork.

    Unpatched: EINVAL with flag 16; a plain move, and every page is found.
    Patched: EFAULT with flag 16; flag 8 moves it plainly.
    """
    with Child() as parent:
        source = parent.call(_mapped, area)
        child = parent.fork(outlive_parent=True)
        try:
            parent.kill()
            child.call(_must_not_relocate, relocate, area, source)
            child.call(_move_best_effort_alone, relocate, area, source)
        finally:
            child.close()


def _mapped(area: CarveOut) -> Mapping:
    return area.map(0, _PAGES).fill()


def _move_best_effort_alone(relocate: bool, area: CarveOut, source: Mapping) -> None:
    flags = MREMAP_RELOCATE_ANON if relocate else 0
    assert_found(move(source, area.page(_TO), flags).check())


@ways
def test_memory_that_is_not_forked(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 54 (dontfork): a process with a living child moves memory that the child did not inherit (MADV_DONTFORK).

    Unpatched: a plain move, and every page is found.
    Patched: both flags relocate it.
    """
    source.madvise(syscalls.MADV_DONTFORK)
    with Child():
        _relocates(relocate, area, source, flags)


@ways
def test_threads(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 55 (threads): memory moves while another thread of the process exists.

    Unpatched: a plain move; the other thread reads the data at the new place.
    Patched: both flags relocate it; the other thread reads the data at the new place.
    """
    here = threading.Event()
    there = threading.Event()
    failed: list[BaseException] = []

    def look() -> None:
        try:
            source.check()
            here.set()
            there.wait(30)
            if results[0] is not None:
                results[0].check()
        except BaseException as error:
            failed.append(error)

    results: list[Mapping | None] = []
    thread = threading.Thread(target=look)
    thread.start()
    here.wait(30)
    try:
        results.append(_relocates(relocate, area, source, flags))
    finally:
        there.set()
        thread.join()
    assert not failed, f"another thread does not read the right data: {failed[0]}"


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
    result = _relocates(relocate, area, source, flags, pageout=False)
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


# --- what a refusal costs ----------------------------------------------------------------------------------------


@lenient_ways
def test_a_fixed_destination_is_replaced(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Row 64 (fixed-must-fail): forked memory moves onto a place that is in use, plainly and with flag 8.

    Unpatched: a plain move replaces what was there.
    Patched: the same with flag 8.
    """
    area.map(_TO, _PAGES).fill(seed=1)
    with Child() as child:
        result = move_or_refused(relocate, area, source, area.page(_TO), flags)
        child.call(source.check)
    if result is not None:
        expect_layout(area, [(_TO, _PAGES)], "the source replaces what was at the destination")
        assert_found(result)


def test_a_fixed_destination_survives_a_refusal(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 64 (fixed-must-fail): forked memory is to move with flag 16 onto a place that is in use.

    The kernel has to look at the source before it unmaps the destination. One that unmaps first leaves a hole.

    Unpatched: EINVAL; source and destination are as before.
    Patched: EFAULT; source and destination are as before.
    """
    destination = area.map(_TO, _PAGES).fill(seed=1)
    with Child():
        refused_move(relocate, area, source, destination.address)
        destination.check()
    assert_found(source, destination)
