# SPDX-License-Identifier: GPL-2.0
"""Threads that use memory, or walk to it, while another thread moves it or forks.

Each scene has a short window in which a lock or a flush that the kernel left out would be missed. With one CPU a thread
gets into it only if the mover sleeps there. With two CPUs (``--guest-cpus=2``) both run at the same time.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from typing import Final

import pytest

from guest_tests.mm import pagemap, syscalls
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.waiting import wait_until
from guest_tests.support.folios import pmd_size, stamp, thp
from guest_tests.support.found import assert_found, require_migration
from guest_tests.support.moves import unknown_flags, ways
from guest_tests.support.races import Busy, Migrate, Words, rounds

pytestmark = pytest.mark.shared_guest

#: seconds that a race lasts
_SECONDS: Final = 0.7 if os.cpu_count() == 1 else 3.0
_PAGES: Final = 8
_MANY: Final = 512
#: how often a page is looked at before it is said to be left in a migration
_LOOKS: Final = 200
_MOVE: Final = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED


def _uncompared(mapping: Mapping) -> Mapping:
    """The same memory, whose contents are not compared, because threads write to it."""
    return Mapping(mapping.address, mapping.pages)


def test_faults_at_the_source(area: CarveOut) -> None:
    """No row: half of a mapping is faulted, and it moves with MREMAP_DONTUNMAP again and again, while a thread writes
    to all of the source.

    Every kernel: each page is found, also one that the thread has faulted in at the source at the last moment.
    """
    require_migration()
    source = area.map(0, _PAGES)
    words = Words(source.page_addresses)

    def fault() -> None:
        for index in range(_PAGES):
            words.write(index)

    with Busy(fault):
        for _ in rounds(_SECONDS, 10):
            moved = move(source.touch(range(_PAGES // 2)), area.page(20), syscalls.MREMAP_DONTUNMAP)
            assert_found(_uncompared(moved), _uncompared(source.touch(range(1))), pageout=False)


def test_pages_migrate_as_they_move_to_where_they_merge(area: CarveOut) -> None:
    """Row 72 (migration-race): the larger part of a mapping moves away, and back to where it merges, while a thread
    migrates its pages. A walk visits the merged mapping before the one that the pages come from.

    ::

        before      |aaaa bbbbbbbb|
        away        |aaaa|              |bbbbbbbb|
        back        |aaaa bbbbbbbb|

    Every kernel: no walk misses a page, so that none stays a migration entry, and each is found in the end.
    """
    require_migration()
    whole = area.map(0, 4 + _PAGES).fill()
    here = whole.part(4, _PAGES)
    migrate = Migrate([*here.page_addresses, *(area.page(20 + index) for index in range(_PAGES))])
    with Busy(migrate):
        for _ in rounds(_SECONDS, 20):
            here = move(move(here, area.page(20)), area.page(4))
            _assert_settled(here)
        wait_until(lambda: migrate.migrated > 0, "a page that migrates")
    assert_found(whole.check())


@ways
def test_many_pages_migrate_as_they_are_relocated(relocate: bool, flags: int) -> None:
    """Row 72 (migration-race): 512 pages move there and back while a thread migrates them, so that a move often meets
    pages whose migration has begun.

    Unpatched: after plain moves no page stays a migration entry, and each is found.
    Patched: the same with either flag; flag 16 may be refused at times.
    """
    require_migration()
    with carve_out(3 * _MANY) as area:
        here = stamp(area.map(0, _MANY))
        places = [area.address, area.page(2 * _MANY)]
        if flags and not relocate:
            unknown_flags(here, places[1], flags)
            return
        # The last page first: a relocation looks at the first page before it waits for those behind it.
        migrate = Migrate([place + index * PAGE_SIZE for place in places for index in reversed(range(_MANY))])
        with Busy(migrate):
            for _ in rounds(_SECONDS, 20):
                try:
                    here = move(here, next(place for place in places if place != here.address), flags)
                except OSError as error:
                    if error.errno != errno.EFAULT or flags != syscalls.MREMAP_MUST_RELOCATE_ANON:
                        raise
            wait_until(lambda: migrate.migrated > 0, "a page that migrates")
        _assert_settled(here)
        assert_found(here.check())


def _assert_settled(mapping: Mapping) -> None:
    """Check that no page is left as the entry of a migration. Whoever reads or relocates such a page waits for ever.

    A page that is migrated right now is seen with another entry soon.
    """
    left = set(range(mapping.pages))
    for _ in range(_LOOKS):
        entries = pagemap.entries(mapping.address, mapping.pages)
        left = {index for index in left if not entries[index].present}
        if not left:
            return
        time.sleep(0.005)
    raise AssertionError(f"pages {sorted(left)} were lost: for a second they are entries of a migration")


def test_pages_migrate_as_their_table_moves() -> None:
    """Row 72 (migration-race): memory that fills a page table moves to a place that is aligned as well, and back, and a
    thread migrates some of its pages.

    Every kernel: no write right after a move is lost, and each page is found.
    """
    require_migration()
    table = pmd_size() // PAGE_SIZE
    with thp("madvise"), carve_out(4 * table) as area:
        area.hole(0, 4 * table)
        start = -(area.page(0) // PAGE_SIZE) % table
        here = area.map(start, table)
        places = [[area.page(at + index) for index in range(_PAGES)] for at in (start, start + table)]
        words = Words(places[0])
        words.step()
        migrate = Migrate([*places[0], *places[1]])
        with Busy(migrate):
            for _ in rounds(_SECONDS, 20):
                places.reverse()
                # As fast as can be from the move to the writes.
                syscalls.mremap(words.addresses[0], here.length, here.length, _MOVE, places[0][0])
                words.addresses = places[0]
                words.step()
                words.step()
            wait_until(lambda: migrate.migrated > 0, "a page that migrates")
        words.step()
        assert_found(Mapping(places[0][0], _PAGES))


def test_pages_migrate_while_a_thread_writes_to_the_source(area: CarveOut) -> None:
    """No row: memory that a child shares moves with MREMAP_DONTUNMAP, while a thread writes to it at the old address,
    and another migrates its pages by the child's addresses.

    Every kernel: no write is lost. The old address leads to the page of before until all processors have forgotten it,
    and to the shared page again afterwards.
    """
    require_migration()
    source = area.map(0, _PAGES, shared=True).touch()
    words = Words(source.page_addresses)
    with Child() as child:
        child.call(source.touch_read)
        migrate = Migrate(source.page_addresses, child.pid)
        with Busy(migrate), Busy(words.step):
            for _ in rounds(_SECONDS, 20):
                moved = move(source, area.page(20), syscalls.MREMAP_DONTUNMAP)
            wait_until(lambda: migrate.migrated > 0, "a page that migrates")
    words.addresses = moved.page_addresses
    words.step()


def test_writes_while_the_process_forks(area: CarveOut) -> None:
    """No row: the process forks again and again, while two threads write to different words of the same pages all the
    time. The first write to a page after a fork makes a copy of it, because the new process shares it by now.

    Every kernel: no write is lost, although the other thread still has the translation of before.
    """
    with Child() as child:  # the interpreter cannot go on if writes to its own memory are lost
        child.start(_write_while_forking, area)
        child.result(5)


def _write_while_forking(area: CarveOut) -> None:
    source = area.map(0, _PAGES).touch()
    one, other = Words(source.page_addresses), Words([address + 64 for address in source.page_addresses])
    cpu = (os.cpu_count() or 1) - 1
    with Child() as neighbour:
        neighbour.call(os.sched_setaffinity, 0, {cpu})

        def copy() -> None:
            for index in range(_PAGES):
                # Another process on this CPU, so that the thread has no translation left and faults.
                neighbour.call(os.getpid)
                other.check(index)
                other.write(index)

        with Busy(one.step, cpu=0), Busy(copy, cpu=cpu):
            for _ in rounds(_SECONDS, 10):
                _fork()
    assert_found(_uncompared(source))


def _fork() -> None:
    """Fork while other threads run, which ``os.fork()`` would keep out of the interpreter meanwhile."""
    pid = syscalls.call("clone", signal.SIGCHLD)
    if pid == 0:
        os._exit(0)
    # In the child the lock of the interpreter may belong to a thread that does not exist there.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
