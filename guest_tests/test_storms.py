# SPDX-License-Identifier: GPL-2.0
"""Races with everything at once: much memory moves while other processes and a thread work on it.

``--race-seconds=600 --guest-cpus=2`` makes each race a long one, ``--race-seed=N`` another one. A race cannot be
repeated exactly: the seed decides the steps, and not when they come. ``UFFDIO_MOVE`` is not among them, because it
deadlocks with mremap(): finding uffd-move-deadlock.
"""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import pytest

from guest_tests.mm import kpage, maps, pagemap, syscalls
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.mm.waiting import patience, wait_until
from guest_tests.support.checks import assert_explained
from guest_tests.support.failing import DEBUG, RELOCATION, failing, failing_relocation, fails_at
from guest_tests.support.folios import mthp, mthp_size, thp
from guest_tests.support.found import assert_found, require_migration
from guest_tests.support.races import Busy, rounds
from guest_tests.support.storms import Storm

# The checks of 64 MB take a minute with a debug kernel under emulation.
pytestmark = [pytest.mark.storm, pytest.mark.guest_timeout(30)]

#: memory of a short race, and of one of ten seconds and more
_LITTLE, _MUCH = 8 << 20, 64 << 20
_LONG: Final = 10.0
#: one page in so many holds the same, so that KSM merges it
_SAME_EVERY: Final = 16
#: one part in so many, at the end, is discarded again and again
_SPOILT: Final = 16
#: how far the third place is from where huge pages can be mapped, in pages
_AWRY: Final = 5
#: allocations of a move; a higher number lets all of them succeed
_ALLOCATIONS: Final = 24

every_kind = pytest.mark.parametrize("kind", ["small", "large", "huge"])


@dataclass(frozen=True)
class Race:
    """How a test races."""

    seconds: float
    seed: int

    @property
    def pages(self) -> int:
        """How much memory it moves."""
        return (_MUCH if self.seconds >= _LONG else _LITTLE) // PAGE_SIZE


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Race:
    """What the options say."""
    return Race(*(request.config.getoption(name) for name in ("--race-seconds", "--race-seed")))


@contextmanager
def _folios(kind: str) -> Iterator[None]:
    """Have faults bring folios of a kind: small, large, or huge."""
    if kind == "small":
        yield
        return
    with mthp(mthp_size()) if kind == "large" else thp():
        yield


class Mover:
    """Moves memory from place to place with flags by chance, and lets some of the moves fail.

    :param flags: which flags it may choose.
    :param arm: makes the relocation of the n-th folio fail; None where the kernel cannot.
    :param starves: whether allocations can be made to fail.
    """

    def __init__(
        self,
        order: random.Random,
        here: Mapping,
        places: Sequence[int],
        flags: Sequence[int],
        arm: Callable[[int], None] | None,
        *,
        starves: bool,
    ) -> None:
        self._order, self._places, self._flags, self._arm, self._starves = order, places, flags, arm, starves
        #: the memory, where it is now
        self.here = here
        #: how often moves with which flags ended with which errno, 0 for success
        self.ended: Counter[tuple[int, int]] = Counter()

    def step(self) -> None:
        """Move once.

        :raises AssertionError: if the move is refused and should not be.
        """
        order, here = self._order, self.here
        # Rarely to the third place, where huge pages are split for good.
        near, *rest = [each for each in self._places if each != here.address]
        to = order.choice(rest) if order.random() < 0.1 else near
        flags = order.choice(self._flags)
        if self._arm is not None and order.random() < 0.3:
            self._arm(order.choice([1, here.pages // 2, here.pages]))
        starves = self._starves and order.random() < 0.2
        moved: list[Mapping] = []

        def call() -> None:
            moved.append(move(here, to, flags))

        code = fails_at(order.randint(1, _ALLOCATIONS), call)[1] if starves else _errno_of(call)
        if moved:
            self.here = moved[0]
        self.ended[flags, code] += 1
        may_fail = {errno.ENOMEM} if starves else set()
        if flags == MREMAP_MUST_RELOCATE_ANON:
            may_fail.add(errno.EFAULT)
        assert not code or code in may_fail, f"mremap() with flags {flags} fails: {os.strerror(code)} ({self.ended})"


def _errno_of(call: Callable[[], None]) -> int:
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


@contextmanager
def _mover(order: random.Random, here: Mapping, places: Sequence[int], *, relocate: bool) -> Iterator[Mover]:
    """A mover with all the flags that the kernel has, and all that can be made to fail here."""
    flags = [0, MREMAP_RELOCATE_ANON, MREMAP_MUST_RELOCATE_ANON] if relocate else [0]
    with ExitStack() as stack:
        arm = stack.enter_context(failing_relocation()) if RELOCATION.exists() else None
        if starves := (DEBUG / "failslab").exists():
            stack.enter_context(failing("slab"))
        yield Mover(order, here, places, flags, arm, starves=starves)


def _places(area: CarveOut, pages: int) -> list[int]:
    return [area.page(0), area.page(pages), area.page(2 * pages + _AWRY)]


def _written(area: CarveOut, pages: int, words: Sequence[int], *, same: bool) -> Mapping:
    """Memory whose pages hold their numbers, and some the same; those with words hold zeros and are not checked."""
    mapping = area.map(0, pages)
    for index in range(pages):
        if index in words:
            mapping.contents[index] = None
            mapping.touch([index])
        else:
            mapping.write(index, b"same" if same and not index % _SAME_EVERY else (index + 1).to_bytes(8, "little"))
    return mapping


def _spoil(order: random.Random, places: Sequence[int], first: int, pages: int) -> None:
    """Discard some pages at one of the places, or fork."""
    if order.random() < 0.02:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the child does nothing that takes a lock
            pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        return
    at = order.randrange(pages)
    length = order.randint(1, pages - at) * PAGE_SIZE
    advice = order.choice([syscalls.MADV_DONTNEED, syscalls.MADV_FREE])
    with suppress(OSError):  # nothing is mapped there at the moment
        syscalls.madvise(order.choice(places) + (first + at) * PAGE_SIZE, length, advice)


@every_kind
def test_everything_at_once(
    relocate: bool, ksm: Ksm, own_group: Memcg | None, race: Race, kind: str, record_property: Callable[..., None]
) -> None:
    """No row: memory moves between three places, with every flag, while all else that the kernel does happens to it.

    ::

        page      0                 pages             2 pages + 5
        places    |[.............]| |               | |               |
        storm     migrate, page out, age, split, soft-offline, merge, swapoff, read and write   (other processes)
        thread                  xx                                      (discards the end, and forks)
        mover     moves, some of which fail at a folio or at an allocation

    Every kernel: in the end each page holds its data and is found, no write was lost, the accounts are right, and no
    memory stays charged when all is unmapped. Flag 16 may be refused.
    """
    require_migration()
    pages, order = race.pages, random.Random(race.seed)
    words = [0, pages // 2 + 1, pages - pages // _SPOILT - 1]
    spoilt = pages - pages // _SPOILT
    with carve_out(3 * pages + _AWRY) as area, _folios(kind):
        places = _places(area, pages)
        with Storm(places, pages, race.seed, words=words, group=own_group.path if own_group else None) as storm:
            here = _written(area, pages, words, same=kind == "small")
            here.contents[spoilt:] = [None] * (pages - spoilt)
            if kind == "small":
                here.madvise(syscalls.MADV_MERGEABLE)
            thread = Busy(lambda: _spoil(order, places, spoilt, pages - spoilt))
            with _mover(random.Random(race.seed), here, places, relocate=relocate) as mover, thread:
                storm.begin()
                latest = time.monotonic() + race.seconds + patience(30)
                for _ in rounds(race.seconds, 10):
                    mover.step()
                    if storm.failed:
                        break
                while not storm.done["migrate"] and not storm.failed and time.monotonic() < latest:
                    mover.step()
        record_property("storm", f"seed {race.seed}, moves {dict(mover.ended)}, steps {storm.done}")
        here = mover.here.check()
        assert storm.done["migrate"], f"the storm has migrated nothing: {storm.done}"
        _assert_accounts(here)
        assert_found(here)
    if own_group:
        assert_explained(own_group)


def _assert_accounts(here: Mapping) -> None:
    rss = maps.kilobytes(here.address, here.end, "Rss") * 1024 // PAGE_SIZE
    frames = [frame for frame in pagemap.pfns(here.address, here.pages) if frame is not None]
    # Rss leaves the zero page out. A split of a huge page maps it for pages that hold zeros only (mm/migrate.c, 6.12).
    zeros = sum(kpage.Flag.ZERO_PAGE in kpage.flags(frame) for frame in frames) if len(frames) != rss else 0
    shows = f"pagemap shows {len(frames)}, {zeros} of them the zero page"
    assert rss == len(frames) - zeros, f"smaps counts {rss} pages in the memory that moved, and {shows}"


@every_kind
def test_a_process_that_moves_is_killed(
    relocate: bool, own_group: Memcg | None, race: Race, kind: str, record_property: Callable[..., None]
) -> None:
    """No row: a process is killed while it moves memory, at a random moment.

    Every kernel: it ends, and no memory stays charged to its group.
    """
    order, killed = random.Random(race.seed), 0
    with _folios(kind):
        for number in rounds(race.seconds, 3):
            ready, say = os.pipe()
            pid = os.fork()
            if pid == 0:
                _move_until_killed(random.Random(race.seed << 32 | number), race.pages // 4, relocate, say)
            os.close(say)
            _kill(pid, ready, order.uniform(0, 0.1))
            killed += 1
    record_property("storm", f"seed {race.seed}, {killed} processes killed")
    if own_group:
        assert_explained(own_group)


def _move_until_killed(order: random.Random, pages: int, relocate: bool, ready: int) -> NoReturn:
    try:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        with carve_out(3 * pages + _AWRY) as area:
            places = _places(area, pages)
            here = _written(area, pages, [], same=False)
            with _mover(order, here, places, relocate=relocate) as mover:
                mover.step()
                os.write(ready, b"!")
                while True:
                    mover.step()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _kill(pid: int, ready: int, after: float) -> None:
    """Kill a process some seconds after it has begun to move."""
    with open(ready, "rb") as pipe:
        assert select.select([pipe], [], [], patience(30))[0], "the process does not begin to move"
        assert pipe.read(1), "the process that moves failed before its first move: the console says how"
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    ended: list[int] = []
    wait_until(lambda: _reaped(pid, ended), "the end of the process that was killed", 30)
    assert os.WIFSIGNALED(ended[0]), "the process that moves failed: the console says how"


def _reaped(pid: int, ended: list[int]) -> bool:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
        ended.append(status)
    return bool(found)
