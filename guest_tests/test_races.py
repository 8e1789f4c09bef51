# SPDX-License-Identifier: GPL-2.0
"""Moves while another thread uses the pages, or signals arrive: rows 72, 75 and 98.

Each race lasts less than a second with one CPU, and some seconds with two (``--guest-cpus=2``), where both threads run
at the same time. However it goes, in the end the data is right, every page is found, and the kernel has not complained.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Final

import pytest

from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON
from guest_tests.mm.waiting import patience
from guest_tests.support.found import assert_found, require_migration
from guest_tests.support.holds import Ring, Spliced, require_ring
from guest_tests.support.moves import unknown_flags, ways
from guest_tests.support.races import Busy, Migrate, rounds

pytestmark = pytest.mark.shared_guest

_PAGES: Final = 12
#: more signals than that are a storm
_STORM: Final = 5
#: seconds that a race lasts
_SECONDS: Final = 0.7 if os.cpu_count() == 1 else 3.0


def _there_and_back(relocate: bool, area: CarveOut, source: Mapping, flags: int, seconds: float = _SECONDS) -> Mapping:
    """Move between two places for a while. Flag 8 must always succeed, flag 16 may be refused at times.

    :returns: the mapping at its last place, its data checked.
    """
    if flags and not relocate:
        unknown_flags(source, area.page(20), flags)
        return source.check()
    here, succeeded = source, 0
    for _ in rounds(seconds, 20):
        to = area.page(20) if here.address == area.address else area.address
        try:
            here = move(here, to, flags)
            succeeded += 1
        except OSError as error:
            if error.errno != errno.EFAULT or flags != MREMAP_MUST_RELOCATE_ANON:
                raise
    assert succeeded, "every single move was refused"
    return here.check()


@ways
@pytest.mark.parametrize("hold", [False, True], ids=["succeeds", "fails"])
def test_migration(relocate: bool, area: CarveOut, flags: int, hold: bool) -> None:
    """Row 72 (migration-race): memory moves there and back while a thread migrates its pages between nodes.

    Migration that fails puts back the page-table entry from before, so that a page must not be relocated in between. In
    one variant references from a pipe make every migration fail.

    Unpatched: after plain moves the data is right and every page is found.
    Patched: the same with either flag; flag 16 may be refused at times.
    """
    require_migration()
    source = area.map(0, _PAGES).fill()
    addresses = [*source.page_addresses, *(area.page(20 + index) for index in range(_PAGES))]
    with Spliced(source.address, source.length) if hold else nullcontext(), Busy(Migrate(addresses)) as thread:
        here = _there_and_back(relocate, area, source, flags)
        while not thread.rounds:
            here.check()
    assert_found(here)


def _splice(addresses: list[int]) -> Iterator[Callable[[], None]]:
    def step() -> None:
        for address in addresses:
            with _not_mapped(), Spliced(address):
                pass

    yield step


def _pin(addresses: list[int]) -> Iterator[Callable[[], None]]:
    require_ring()
    ring = Ring()

    def step() -> None:
        for address in addresses:
            with _not_mapped():
                ring.pin(address, PAGE_SIZE)
                ring.unpin()

    try:
        yield step
    finally:
        ring.close()


@contextmanager
def _not_mapped() -> Iterator[None]:
    """Ignore an error that says that the memory is not mapped here at this moment."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EFAULT, errno.EOPNOTSUPP):
            raise


_TAKING: Final = {"references": contextmanager(_splice), "pins": contextmanager(_pin)}


@ways
@pytest.mark.parametrize("what", _TAKING)
def test_taking_pages(relocate: bool, area: CarveOut, flags: int, what: str) -> None:
    """Row 75 (gup-fast-race): memory moves there and back while a thread takes references or pins at both places and
    drops them.

    Unpatched: after plain moves the data is right and every page is found.
    Patched: the same with either flag; flag 16 may be refused at times.
    """
    source = area.map(0, _PAGES).fill()
    addresses = [area.page(page) for page in (0, 20, 5, 25, 11, 31)]
    with _TAKING[what](addresses) as step, Busy(step) as thread:
        here = _there_and_back(relocate, area, source, flags)
        while not thread.rounds:
            here.check()
    assert_found(here)


@ways
def test_signals(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 98 (signal): memory moves there and back while signals arrive every 3 ms.

    Unpatched: no plain move is interrupted, and the signals arrive.
    Patched: the same with either flag.
    """
    with Child() as child:
        arrived = child.call(_storm, relocate, area, flags)
        assert arrived > _STORM, f"only {arrived} signals arrived: that is no storm"


def _storm(relocate: bool, area: CarveOut, flags: int) -> int:
    source = area.map(0, _PAGES).fill()  # mapped by the child itself: inherited memory cannot be relocated
    arrived = 0

    def count(number: int, frame: object) -> None:
        nonlocal arrived
        arrived += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.003, 0.003)
    try:
        here = _there_and_back(relocate, area, source, flags)
        # Signals that arrive while the guest is held up on a busy host are one signal.
        end = time.monotonic() + patience(10)
        while arrived <= _STORM and time.monotonic() < end:
            here = _there_and_back(relocate, area, here, flags, 0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert_found(here)
    return arrived
