# SPDX-License-Identifier: GPL-2.0
"""fork(): what parent and child share, what a child inherits, and how the reverse map finds both."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from guest_tests.mm import maps, numa, pagemap, swap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, ZERO, CarveOut, Mapping, carve_out, map_anonymous, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child, ChildDied
from guest_tests.mm.syscalls import PROT_READ, PROT_RW
from guest_tests.mm.userfault import MODE_WP, Userfault
from guest_tests.mm.vmstat import assert_freed, slab_objects
from guest_tests.support.checks import counted
from guest_tests.support.folios import huge_page, is_large, pmd_size, stamp, thp
from guest_tests.support.found import assert_found, assert_found_at, require_migration
from guest_tests.support.holds import Ring, Spliced, require_ring, vmsplice
from guest_tests.support.moves import move_or_refused, ways
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest

#: pages of small memory
_PAGES = 8


# --- pages that both may write -----------------------------------------------------------------------------------


@contextmanager
def _memory(kind: str) -> Iterator[Mapping]:
    """Faulted memory of small pages, of a huge page, or of a huge page that is mapped by small entries."""
    if kind == "small":
        with carve_out(_PAGES) as area:
            yield area.map(0, _PAGES).fill()
        return
    pages = pmd_size() // PAGE_SIZE
    with carve_out(pages) as area:
        mapping = area.map(0, pages)
        with thp():
            huge_page(mapping, mapping.address)
        stamp(mapping)
        if kind == "huge-by-small-entries":
            part = mapping.part(1)
            part.mprotect(PROT_READ)
            part.mprotect(PROT_RW)
            assert is_large(mapping.address), "the folio was split, not only its mapping"
        yield mapping


@pytest.mark.parametrize("writer", ["parent", "child"])
@pytest.mark.parametrize("kind", ["small", "huge", "huge-by-small-entries"])
def test_what_one_process_writes_the_other_does_not_see(kind: str, writer: str) -> None:
    """No row: a process forks, and one of the two writes to every page.

    Every kernel: the other one still reads what was there before, and each page of both is found.
    """
    with _memory(kind) as mapping:
        with Child() as child:
            before = mapping.part(0, mapping.pages)
            if writer == "parent":
                stamp(mapping, seed=1)
                child.call(before.check)
            else:
                mine = child.call(stamp, before, 1)
                before.check()
                child.call(mine.check)
            mapping.check()
            ends = [mapping.part(0), mapping.part(mapping.pages - 1)]
            child.call(assert_found, *(Mapping(end.address, 1) for end in ends), pageout=False)
        assert_found(mapping.part(0, _PAGES), pageout=kind == "small")


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_page_in_swap_belongs_to_both(area: CarveOut, first: str) -> None:
    """No row: memory is swapped out while its process forks; parent and child read it back, one after the other, and
    then the parent writes.

    Every kernel: both map the same pages, and the reverse walk finds them in both. The child does not see what the
    parent writes, nor the parent what the child writes.
    """
    swap.require_swap(_PAGES * PAGE_SIZE >> 10)
    mapping = area.map(0, _PAGES).fill()
    assert_pages_out(mapping)
    with Child() as child:
        inherited = mapping.part(0, _PAGES)
        if first == "parent":
            mapping.check()
            child.call(inherited.check)
        else:
            child.call(inherited.check)
            mapping.check()
        here, there = (pagemap.pfns(mapping.address, _PAGES, pid) for pid in ("self", child.pid))
        assert here == there, f"parent and child read the same swap slots, but map frames {here} and {there}"
        for index in (0, _PAGES - 1):
            assert_found_at(Place(mapping.page(index)), Place(mapping.page(index), child))
        written, rest = mapping.part(0, 4).fill(seed=1), mapping.part(4, 4)
        child.call(inherited.check)
        child.call(inherited.part(4, 4).fill, seed=2)
        rest.check()
    assert_found(written.check(), rest.check())


def test_a_shared_page_that_migrates_stays_shared(area: CarveOut) -> None:
    """No row: parent and child share pages, and move_pages() is to move them: first those of the process alone, then
    all.

    Every kernel: EACCES for the first, and nothing moves. Then all pages move in both processes. The child does not see
    what the parent writes afterwards.
    """
    require_migration()
    mapping = area.map(0, _PAGES).fill()
    with Child() as child:
        before = pagemap.pfns(mapping.address, _PAGES)
        there = [next(node for node in numa.nodes() if node != here) for here in numa.nodes_of(mapping.page_addresses)]
        status = numa.move_pages(0, mapping.page_addresses, there, numa.MPOL_MF_MOVE)
        assert status == [-errno.EACCES] * _PAGES, f"move_pages() of pages that a child maps too says {status}"
        assert pagemap.pfns(mapping.address, _PAGES) == before, "pages moved that a child maps too"
        numa.move_pages(0, mapping.page_addresses, there, numa.MPOL_MF_MOVE_ALL)
        frames, inherited = (pagemap.pfns(mapping.address, _PAGES, pid) for pid in ("self", child.pid))
        stayed = [index for index in range(_PAGES) if frames[index] == before[index]]
        assert not stayed, f"pages {stayed} did not move with MPOL_MF_MOVE_ALL"
        assert frames == inherited, "parent and child map different pages after a migration"
        old = mapping.part(0, _PAGES)
        mapping.fill(seed=1)
        child.call(old.check)
    assert_found(mapping.check())


def test_a_page_that_was_given_to_a_pipe_is_not_written(area: CarveOut) -> None:
    """No row: a child gives an inherited page to a pipe and unmaps it, and then the parent writes to the page.

    The page is mapped only in the parent then, but it is not the parent's alone (CVE-2020-29374).

    Every kernel: what comes out of the pipe is what the page held before.
    """
    mapping = area.map(0, 1).fill()
    old = mapping.read(0)
    with Child() as child:
        child.call(_give_away, mapping)
        mapping.fill(seed=1)
        same = child.call(_take_out) == old
        assert same, "the parent's write to its page came out of a pipe of its child"
    assert_found(mapping.check())


_pipes: list[Spliced] = []


def _give_away(mapping: Mapping) -> None:
    _pipes.append(Spliced(mapping.address))
    mapping.unmap()


def _take_out() -> bytes:
    return _pipes[-1].read(PAGE_SIZE)


@ways
def test_a_page_that_a_child_gave_away_is_not_written_after_a_move(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 90 (cow-suite): a child gives an inherited page to a pipe and ends. The parent moves the memory and writes to
    the page.

    ::

        parent     fork ─────────────────────────── move ── write
        child        └─ page into pipe, end                        read the pipe: as before

    The page is mapped only in the parent then, but it is not the parent's alone, and a move does not change that.

    Unpatched: after a plain move the pipe holds what the page held before.
    Patched: the same with either flag; the memory is relocated, and every page is found.
    """
    source = area.map(0, _PAGES).fill()
    reader, writer = os.pipe()
    try:
        with Child() as child:
            child.call(vmsplice, writer, source.page(3))
        with counted(relocate, relocated=1 if flags else 0):
            result = move_or_refused(relocate, area, source, area.page(20), flags)
        here = source if result is None else result
        old = here.read(3)
        here.write(3, b"written after the move")
        same = os.read(reader, PAGE_SIZE) == old
        assert same, "what the parent wrote to its page after the move came out of a pipe of its child"
    finally:
        os.close(reader)
        os.close(writer)
    assert_found(here.check())


def test_a_pinned_page_stays_with_its_process(area: CarveOut) -> None:
    """No row: a process pins a page for the first time, without a fault, forks, and writes to the page.

    Every kernel: the process still maps the pinned page, so that whoever has the pin sees what it writes. The child has
    a copy of what was there before.
    """
    require_ring()
    with Child() as process:  # has pinned nothing yet
        process.call(_fork_with_a_pin, area)


def _fork_with_a_pin(area: CarveOut) -> None:
    mapping = area.map(0, 1).fill()
    ring = Ring()
    ring.pin(mapping.address, mapping.length)
    pinned = pagemap.pfn(mapping.address)
    with Child() as child:
        old = mapping.part(0)
        mapping.fill(seed=1)
        now = pagemap.pfn(mapping.address)
        assert now == pinned, f"page {pinned:#x} is pinned, but after fork() a write went to a copy, page {now:#x}"
        child.call(old.check)
        assert pagemap.pfn(mapping.address, child.pid) != pinned, "fork() shared a page that is pinned"
    ring.unpin()
    ring.close()
    assert_found(mapping.check())


# --- what a child inherits ---------------------------------------------------------------------------------------


def test_guard_pages_are_inherited(area: CarveOut) -> None:
    """No row: a process with two guard pages forks (6.13).

    Every kernel: each access of the child to one of them is killed by SIGSEGV, as it is in the parent.
    """
    system.require_kernel(6, 13, "MADV_GUARD_INSTALL")
    mapping = area.map(0, 4).fill()
    mapping.part(1, 2).madvise(syscalls.MADV_GUARD_INSTALL)
    for access in (mapping.part(1).touch_read, mapping.part(2).touch):
        with Child() as child:
            child.call(mapping.part(0).check)
            killer = _killer(child, access)
        assert killer == signal.SIGSEGV, f"an access to an inherited guard page ended with {killer or 'success'}"
    assert_found(mapping.part(0).check(), mapping.part(3).check())


def _killer(child: Child, access: Callable[[], object]) -> signal.Signals | None:
    """The signal that ends a child because of an access; None if the access succeeds."""
    try:
        child.call(access)
    except ChildDied as died:
        return died.signal
    return None


@pytest.mark.parametrize("moved", [False, True], ids=["in-place", "moved"])
def test_wiped_memory_is_empty_in_a_child(area: CarveOut, moved: bool) -> None:
    """No row: memory with MADV_WIPEONFORK stays or moves, and its process forks.

    Every kernel: the child reads zeros there, and the parent keeps its data. A child of the child reads zeros as well.
    """
    mapping = area.map(0, 4).fill().madvise(syscalls.MADV_WIPEONFORK)
    if moved:
        mapping = move(mapping, area.page(20))
    with Child() as child:
        wiped = Mapping(mapping.address, mapping.pages, [ZERO] * mapping.pages)
        child.call(wiped.check)
        child.call(mapping.part(0, 4).fill, seed=1)
        with child.fork() as grandchild:
            grandchild.call(wiped.check)
    assert_found(mapping.check())


def test_wiped_memory_merges_with_new_memory_in_a_child(area: CarveOut) -> None:
    """No row: memory with MADV_WIPEONFORK is faulted, its process forks, and the child maps more behind it.

    ::

        parent   |wwww|
        child    |....|++++|      +: new, with the same advice

    Every kernel: the child's mapping has nothing of the parent's anon_vma, so it merges with the new one.
    """
    wiped = area.map(0, 4).fill().madvise(syscalls.MADV_WIPEONFORK)
    with Child() as child:
        new = child.call(area.map, 4, 4)
        child.call(new.madvise, syscalls.MADV_WIPEONFORK)
        found = maps.vmas_between(area.page(0), area.page(8), child.pid)
    assert len(found) == 1, f"wiped and new memory of a child did not merge: {'; '.join(map(str, found))}"
    assert_found(wiped.check())


def test_memory_locks_are_not_inherited(area: CarveOut) -> None:
    """No row: a process locks memory and forks.

    Every kernel: nothing is locked in the child, and unlocking or unmapping the memory there leaves VmLck at 0. The
    parent's memory stays locked.
    """
    mapping = area.map(0, 4).fill()
    syscalls.mlock(mapping.address, mapping.length)
    before = vmstat.status()["VmLck"]
    with Child() as child:
        assert vmstat.status(child.pid)["VmLck"] == 0, "a child starts with locked memory"
        flags = maps.vma_at(mapping.address, child.pid, detailed=True).vm_flags
        assert "lo" not in flags, f"a child inherited a locked mapping: {sorted(flags)}"
        child.call(syscalls.munlock, mapping.address, PAGE_SIZE)
        child.call(mapping.part(2, 2).unmap)
        locked = vmstat.status(child.pid)["VmLck"]
        assert locked == 0, f"VmLck of a child is {locked} kB after it unlocked and unmapped memory"
    assert vmstat.status()["VmLck"] == before, "what a child did changed VmLck of its parent"
    assert_found(mapping.check(), pageout=False)


def test_sizes_leave_out_what_is_not_inherited() -> None:
    """Row 91 (accounting): a process with 64 MiB of untouched memory with MADV_DONTFORK forks.

    Every kernel: VmSize and VmData of the child are smaller by that.
    """
    kept = map_anonymous((64 << 20) // PAGE_SIZE).madvise(syscalls.MADV_DONTFORK)
    try:
        with Child() as child:
            here, there = vmstat.status(), vmstat.status(child.pid)
            for size in ("VmSize", "VmData"):
                less = here[size] - there[size] << 10
                # The interpreter may take or give back a little.
                assert less > kept.length - (8 << 20), f"{size} of the child is smaller by {less} bytes only"
    finally:
        kept.unmap()


def test_marks_of_a_userfaultfd_are_not_inherited(area: CarveOut) -> None:
    """No row: memory of which some pages are write-protected by userfaultfd is swapped out in part, and its process
    forks. The child is not registered with the userfaultfd.

    Every kernel: the parent's pages keep their marks, in swap and after they were read back. The child's pages have
    none.
    """
    system.require_config("USERFAULTFD", "HAVE_ARCH_USERFAULTFD_WP")
    swap.require_swap(_PAGES * PAGE_SIZE >> 10)
    mapping = area.map(0, _PAGES).fill()
    with Userfault() as uffd:
        uffd.register(mapping, MODE_WP)
        uffd.write_protect(mapping.part(2, 4))
        assert_pages_out(mapping.part(4, 4))
        wanted = [2 <= index < 6 for index in range(_PAGES)]
        _expect_marks(mapping, "self", wanted, "in the parent, with half of it in swap")
        with Child() as child:
            _expect_marks(mapping, child.pid, [False] * _PAGES, "in a child, with half of it in swap")
            child.call(mapping.check)
            _expect_marks(mapping, child.pid, [False] * _PAGES, "in a child that has read it back")
            child.call(mapping.part(0, _PAGES).fill, seed=1)
        mapping.check()
        _expect_marks(mapping, "self", wanted, "in the parent, which has read it back")
    assert_found(mapping)


def _expect_marks(mapping: Mapping, pid: int | str, wanted: list[bool], where: str) -> None:
    marks = [entry.uffd_wp for entry in pagemap.entries(mapping.address, mapping.pages, pid)]
    assert marks == wanted, f"write-protected by userfaultfd {where}: {marks}, expected {wanted}"


# --- the reverse map of a family ---------------------------------------------------------------------------------


def test_every_generation_is_found(area: CarveOut) -> None:
    """No row: a page is inherited by a child, by its child, and by a child of that one.

    Every kernel: a reverse walk finds the page in all four processes, and a page that a child wrote in that child and
    its children.
    """
    mapping = area.map(0, 2).fill()
    with ExitStack() as stack:
        child = stack.enter_context(Child())
        child.call(mapping.part(1).fill, seed=1)
        grandchild = stack.enter_context(child.fork())
        youngest = stack.enter_context(grandchild.fork())
        family = [None, child, grandchild, youngest]
        assert_found_at(*(Place(mapping.page(0), process) for process in family))
        assert_found_at(*(Place(mapping.page(1), process) for process in family[1:]))
    assert_found(mapping.check())


def test_a_chain_of_forks_needs_few_anon_vmas() -> None:
    """No row: a child inherits 40 mappings and forks, its child forks, and so on. Each ends when it has a child.

    A child may use the anon_vma of an ancestor that has ended, and frees the one that it was to have
    (anon_vma_fork(), mm/rmap.c; 7a3ef208e662). Without that the anon_vmas of all generations are kept.

    Every kernel: after 30 generations there are not many more anon_vmas than after one, and when all have ended none
    is left of them. Allocators keep some for each processor, so that five for each mapping are allowed.
    """
    mappings, generations, allowed = 40, 30, 200
    with carve_out(2 * mappings) as area:
        family = [area.map(2 * index, 1).fill(seed=index) for index in range(mappings)]
        before = slab_objects("anon_vma")
        with Child() as youngest:
            for _ in range(generations):
                parent, youngest = youngest, youngest.fork(outlive_parent=True)
                parent.kill()
            assert_freed("anon_vma", before, allowed, f"{generations} generations of {mappings} mappings", seconds=5)
            for mapping in family:
                youngest.call(mapping.check)
            assert_found_at(Place(family[0].address), Place(family[0].address, youngest))
    assert_freed("anon_vma", before, allowed, f"{generations} generations", seconds=5)
