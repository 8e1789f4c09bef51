# SPDX-License-Identifier: GPL-2.0
"""What tests of relocation share: moves with each flag, refusals that leave no trace, references and pins that stand
in the way, and checks of the reverse map that are fast enough for many pages."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol, Self

import pytest

from guest_tests.checks import State, fails, refused, relocate_or_refused
from guest_tests.mm import kpage, numa, pagemap, swap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.probes import Place, Probe
from guest_tests.mm.probes.migration import MovePages, SoftOffline
from guest_tests.mm.probes.reclaim import Pageout
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON, MREMAP_RELOCATE_ANON
from guest_tests.mm.waiting import patience

# --- moves -------------------------------------------------------------------------------------------------------

#: a test with each of the three ways to ask for a move
ways = pytest.mark.parametrize(
    "flags", [0, MREMAP_RELOCATE_ANON, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "relocate", "must"]
)
#: the same for memory that must not be relocated: these two move it plainly
lenient_ways = pytest.mark.parametrize("flags", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])


def stamp(mapping: Mapping, seed: int = 0) -> Mapping:
    """Fill ``mapping`` so that each byte follows from ``seed`` and page number; faster than its own ``fill``."""
    for index in range(mapping.pages):
        mapping.write(index, (seed << 32 | index + 1).to_bytes(8, "little"))
    return mapping


def moved(
    relocate: bool, area: CarveOut, source: Mapping, to: int | None, flags: int, *, pages: int | None = None
) -> Mapping | None:
    """Move ``source`` with any flags, and check the data.

    :param relocate: the fixture of that name.
    :returns: None where the kernel does not know the flags, and was seen to refuse them and to change nothing.
    """
    if flags & (MREMAP_RELOCATE_ANON | MREMAP_MUST_RELOCATE_ANON):
        return relocate_or_refused(relocate, area, source, to, flags, pages=pages)
    return move(source, to, flags, pages=pages).check()


def must_or_refused(relocate: bool, area: CarveOut, source: Mapping, to: int) -> Mapping | None:
    """Move with "must" what a kernel may or may not be able to relocate: it succeeds, or is refused without a trace.

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


@dataclass(frozen=True)
class Accounts:
    """What the kernel has in its books: that of this process, and of the system. In kB."""

    vm_size: int
    rss_anon: int
    locked: int
    committed: int

    @classmethod
    def now(cls) -> Accounts:
        """The books as they are."""
        status = vmstat.status()
        committed = vmstat.meminfo()["Committed_AS"]
        return cls(status["VmSize"], status["RssAnon"], status["VmLck"], committed)


def same_accounts(call: Callable[[], object], what: str) -> None:
    """Assert that a call leaves the books as they are.

    The interpreter and others allocate memory at the same time, so that one of five calls without a difference is
    proof enough: what a call leaks it leaks every time.
    """
    pairs = []
    for _ in range(5):
        before = Accounts.now()
        call()
        pairs.append((before, Accounts.now()))
        if pairs[-1][0] == pairs[-1][1]:
            return
    raise AssertionError(f"{what} changes the accounting every time: {pairs[-1][0]} became {pairs[-1][1]}")


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
    """Assert that a relocation is refused, and that all is as if nobody had asked: mappings, frames, data, accounts.

    The reverse map is not looked at, because that would move the pages: :func:`check_pages` should follow.

    :param code: the error of a kernel that knows the flags; others say EINVAL.
    :param arm: called before every try.
    """
    expected = code if relocate else errno.EINVAL
    what = f"a move with flags {flags | syscalls.MREMAP_MAYMOVE:#x}"

    def call() -> Mapping:
        arm()
        return move(source, to, flags, pages=pages)

    refused(area, expected, call, what, source)
    same_accounts(lambda: fails(expected, call, what), f"{what}, though it is refused,")


@contextmanager
def counted(relocate: bool, **events: int) -> Iterator[None]:
    """Assert what the kernel's own counters of relocations say of the calls within; those it lacks are passed over.

    :param relocate: the fixture of that name; without relocation there is nothing to count.
    :param events: names in /proc/vmstat without ``mremap_``; at least so many events, but if 0 exactly none.
    """
    before = vmstat.vmstat()
    yield
    after = vmstat.vmstat()
    for name, number in events.items():
        counter = f"mremap_{name}"
        if not relocate or counter not in before:
            continue
        rose = after[counter] - before[counter]
        good = rose >= number if number else rose == 0
        assert good, f"{counter} rose by {rose}, expected {'at least ' if number else ''}{number}"


# --- reverse map -------------------------------------------------------------------------------------------------

_TRIES: Final = 3
_PROBES: Final[tuple[Probe, ...]] = (MovePages(), SoftOffline())


def check_places(*places: Place) -> None:
    """Make the kernel walk the reverse map of one page, and assert that it finds every place where it is mapped."""
    probe = _usable()
    if probe is None:
        _skip_blind()
    else:
        _judge(probe, places)


def require_migration() -> None:
    """Skip the test unless move_pages() can move pages to another node."""
    if reason := MovePages().missing():
        pytest.skip(reason)


def _usable() -> Probe | None:
    return next((each for each in _PROBES if each.missing() is None), None)


def _skip_blind() -> None:
    reasons = "; ".join(str(each.missing()) for each in _PROBES)
    pytest.skip(f"all else held, but nothing here can walk the reverse map: {reasons}")


def check_pages(*mappings: Mapping, pageout: bool = True) -> None:
    """Make the kernel walk the reverse map of every folio of ``mappings`` at least twice, and check the data again.

    All pages migrate to the other node, or are soft-offlined where there is one node only; then all are swapped out.
    Whatever did not follow is asked for by itself, with a control page, before it is called lost.

    :param pageout: False for memory that cannot be swapped out: locked, or mapped by others too.
    :raises AssertionError: naming the page that was not found, with the probe's evidence.
    """
    swaps = pageout and swap.free_kb() > sum(mapping.length for mapping in mappings) >> 9
    for mapping in mappings:
        assert folios(mapping), f"no page is present in the mapping at {mapping.address:#x}: nothing to walk for"
        if _usable() is None and not swaps:
            _skip_blind()
        if _usable() is not None:
            _check_migration(mapping)
        if swaps:
            _check_pageout(mapping)
        mapping.check()


_TAIL: Final = int(kpage.Flag.COMPOUND_TAIL)
_COMPOUND: Final = int(kpage.Flag.COMPOUND_HEAD | kpage.Flag.COMPOUND_TAIL)
_ZERO: Final = int(kpage.Flag.ZERO_PAGE)


def folios(mapping: Mapping) -> dict[int, int]:
    """One address in every folio that is mapped, and the frame there, leaving out the zero page.

    Of a large folio it is the first page.
    """
    found = {}
    last, last_is_large = -1, False
    # One file for all pages: kpage.flags() opens it for each.
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index, entry in enumerate(pagemap.entries(mapping.address, mapping.pages)):
            pfn = entry.pfn
            if pfn is None:
                last = -1
                continue
            flags = int.from_bytes(os.pread(fd, 8, pfn * 8), "little")
            if not flags & _ZERO and not (flags & _TAIL and last_is_large and pfn == last + 1):
                found[mapping.page(index)] = pfn
            last, last_is_large = pfn, bool(flags & _COMPOUND)
    finally:
        os.close(fd)
    return found


def _check_migration(mapping: Mapping) -> None:
    waiting = folios(mapping)
    for _ in range(_TRIES if MovePages().missing() is None else 0):
        addresses = list(waiting)
        there = [next(node for node in numa.nodes() if node != here) for here in numa.nodes_of(addresses)]
        numa.move_pages(0, addresses, there, numa.MPOL_MF_MOVE_ALL)
        now = pagemap.pfns(mapping.address, mapping.pages)
        waiting = {each: pfn for each, pfn in waiting.items() if now[(each - mapping.address) // PAGE_SIZE] == pfn}
        if not waiting:
            return
    for address in waiting:
        check_places(Place(address))


def _check_pageout(mapping: Mapping) -> None:
    for _ in range(_TRIES):
        mapping.madvise(syscalls.MADV_PAGEOUT)
        left = folios(mapping)
        if not left:
            return
    for address in left:
        _judge(Pageout(), [Place(address)])


def _judge(probe: Probe, places: Sequence[Place]) -> None:
    answer = probe.walk(places)
    assert not answer.lost, f"the kernel's reverse walk does not find {places[0]}: {answer}"
    assert answer.complete, f"whether the kernel's reverse walk finds {places[0]} cannot be told: {answer}"


# --- what stands in the way --------------------------------------------------------------------------------------


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_uint64), ("length", ctypes.c_uint64))


class Spliced:
    """Pages given to a pipe: each has one more reference, but is not pinned. A context manager that lets go.

    A reference does not keep a page from moving with its mapping. It makes migration fail, and keeps the page in swap
    cache when reclaim unmaps it (``is_page_cache_freeable()`` in mm/vmscan.c).
    """

    def __init__(self, address: int, length: int = PAGE_SIZE) -> None:
        self._read, self._write = os.pipe()
        try:
            fcntl.fcntl(self._write, fcntl.F_SETPIPE_SZ, max(length // PAGE_SIZE, 1) * PAGE_SIZE)
            vector = _Iovec(address, length)
            libc = ctypes.CDLL(None, use_errno=True)
            got = libc.vmsplice(self._write, ctypes.byref(vector), ctypes.c_ulong(1), ctypes.c_uint(0))
            if got != length:
                code = ctypes.get_errno()
                raise OSError(code, f"vmsplice() of {length} bytes at {address:#x} gave {got}: {os.strerror(code)}")
        except BaseException:
            self.close()
            raise

    def read(self, length: int) -> bytes:
        """Take ``length`` bytes out: what is in the pages now."""
        return os.read(self._read, length)

    def close(self) -> None:
        """Let go of the pages."""
        os.close(self._read)
        os.close(self._write)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Pinner(Protocol):
    def close(self) -> None:
        """Unpin."""


# The same numbers on every architecture.
_IO_URING_SETUP: Final = 425
_IO_URING_REGISTER: Final = 427
_REGISTER_BUFFERS: Final = 0
_UNREGISTER_BUFFERS: Final = 1


def _raw(number: int, *args: object) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(ctypes.c_long(number), *args))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"system call {number} failed: {errno.errorcode.get(code, code)}")
    return result


class Ring:
    """An io_uring that can pin one buffer at a time (CONFIG_IO_URING, sysctl kernel.io_uring_disabled)."""

    def __init__(self) -> None:
        parameters = ctypes.create_string_buffer(120)  # struct io_uring_params
        self._fd = _raw(_IO_URING_SETUP, ctypes.c_ulong(1), parameters)

    def pin(self, address: int, length: int) -> None:
        """Pin memory as a fixed buffer.

        :raises OSError: EFAULT if it is not mapped.
        """
        vector = _Iovec(address, length)
        self._register(_REGISTER_BUFFERS, ctypes.byref(vector), 1)

    def unpin(self) -> None:
        """Undo :meth:`pin`."""
        self._register(_UNREGISTER_BUFFERS, None, 0)

    def close(self) -> None:
        """End it. The kernel may unpin only later: :meth:`unpin` first."""
        os.close(self._fd)

    def _register(self, what: int, vector: object, number: int) -> None:
        fd = ctypes.c_ulong(self._fd)
        _raw(_IO_URING_REGISTER, fd, ctypes.c_ulong(what), vector, ctypes.c_ulong(number))


class _RingPin:
    def __init__(self, address: int, length: int) -> None:
        self._ring = Ring()
        try:
            self._ring.pin(address, length)
        except BaseException:
            self._ring.close()
            raise

    def close(self) -> None:
        self._ring.unpin()
        self._ring.close()


_GUP_TEST: Final = "/sys/kernel/debug/gup_test"
# _IOW('g', 7, struct pin_longterm_test) and _IO('g', 8), mm/gup_test.h of Linux 7.3
_PIN_LONGTERM_TEST_START: Final = 0x40186707
_PIN_LONGTERM_TEST_STOP: Final = 0x6708


class _GupTestPin:
    def __init__(self, address: int, length: int) -> None:
        self._fd = os.open(_GUP_TEST, os.O_RDWR | os.O_CLOEXEC)
        try:
            request = b"".join(number.to_bytes(8, "little") for number in (address, length, 1))
            fcntl.ioctl(self._fd, _PIN_LONGTERM_TEST_START, request)
        except BaseException:
            os.close(self._fd)
            raise

    def close(self) -> None:
        fcntl.ioctl(self._fd, _PIN_LONGTERM_TEST_STOP)
        os.close(self._fd)


def require_ring() -> None:
    """Skip the test where there is no io_uring."""
    system.require_config("IO_URING")
    try:
        Ring().close()
    except OSError as error:
        pytest.skip(f"needs io_uring, but {error}: CONFIG_IO_URING=y and sysctl kernel.io_uring_disabled=0 bring it")


@contextmanager
def pinned(address: int, length: int = PAGE_SIZE) -> Iterator[None]:
    """Pin memory for as long as the block lasts, as for direct memory access; skips where nothing can.

    By an io_uring fixed buffer, else by gup_test.
    """
    pin: _Pinner
    if Path(_GUP_TEST).exists():
        pin = _GupTestPin(address, length)
    else:
        require_ring()
        pin = _RingPin(address, length)
    try:
        yield
    finally:
        pin.close()


# --- large folios ------------------------------------------------------------------------------------------------

_THP: Final = Path("/sys/kernel/mm/transparent_hugepage")
#: how many huge pages a guest's memory must have room for, so that one can be had when it is needed
_ROOM: Final = 32


def pmd_size() -> int:
    """Bytes in a huge page that is mapped by a PMD. Skips where there are none, or they are too large for a guest."""
    system.require_config("TRANSPARENT_HUGEPAGE")
    try:
        size = int((_THP / "hpage_pmd_size").read_text())
    except FileNotFoundError:
        pytest.skip(f"needs CONFIG_TRANSPARENT_HUGEPAGE=y: this kernel has no {_THP}")
    have, needed = vmstat.meminfo()["MemTotal"] >> 10, _ROOM * size >> 20
    if have < needed:
        pytest.skip(f"needs {needed} MB of memory for huge pages of {size >> 20} MB, has {have}: give --guest-memory")
    return size


@contextmanager
def knob(path: Path | str, value: str) -> Iterator[None]:
    """Write ``value`` to a file of the kernel for as long as the block lasts."""
    file = Path(path)
    before = file.read_text()
    _, bracket, rest = before.partition("[")  # "always [madvise] never": the one in brackets holds
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(rest.partition("]")[0] if bracket else before.strip())


@contextmanager
def thp(value: str = "always") -> Iterator[None]:
    """Huge pages for every fault that fits ("always"), or for none ("never"), for as long as the block lasts.

    Skips where there are none, if they are wanted.
    """
    if value == "never" and not _THP.exists():
        yield
        return
    if value != "never":
        pmd_size()
    with knob(_THP / "enabled", value):
        yield


def mthp_size() -> int:
    """Bytes in the smallest large folio of at least 8 pages that anonymous memory can have (6.8); else skips."""
    wanted = {size for size in (8 * PAGE_SIZE, 16 * PAGE_SIZE) if (_THP / f"hugepages-{size >> 10}kB/enabled").exists()}
    if not wanted:
        pytest.skip(
            f"needs Linux 6.8 and CONFIG_TRANSPARENT_HUGEPAGE: no {_THP}/hugepages-*kB/enabled, "
            f"this is {platform.release()}"
        )
    return max(wanted)


@contextmanager
def mthp(size: int) -> Iterator[None]:
    """Folios of ``size`` bytes for faults, and no larger ones, for as long as the block lasts."""
    with knob(_THP / f"hugepages-{size >> 10}kB/enabled", "always"):
        yield


def is_large(address: int) -> bool:
    """Whether the page at ``address`` belongs to a large folio."""
    flags = kpage.flags_at(address)
    return bool(flags & (kpage.Flag.COMPOUND_HEAD | kpage.Flag.COMPOUND_TAIL))


def huge_page(mapping: Mapping, at: int) -> Mapping:
    """Touch ``mapping`` at the PMD-aligned address ``at`` and get a huge page there; call within :func:`thp`."""
    # No read first: 6.12 and older never turn the huge zero page into a huge page (do_huge_pmd_wp_page()).
    ctypes.memset(at, 0, 1)
    assert is_large(at), f"no huge page at {at:#x}: is memory too fragmented? {kpage.describe(pagemap.pfn(at))}"
    return mapping.part((at - mapping.address) // PAGE_SIZE, pmd_size() // PAGE_SIZE)


# --- threads -----------------------------------------------------------------------------------------------------


class Busy:
    """A thread that repeats a step until its ``with`` block ends. What it raises is raised there.

    System calls release the interpreter, so that they really run side by side, on a machine with two CPUs at once.
    """

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._stop = threading.Event()
        self._error: BaseException | None = None
        #: how often the step was done
        self.rounds = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._step()
                self.rounds += 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(patience(30))
        if self._thread.is_alive():
            raise TimeoutError("a thread does not come back from a system call")
        if self._error is not None:
            raise self._error


def rounds(seconds: float, fewest: int) -> Iterator[int]:
    """Count up for some seconds of this machine, but to ``fewest`` at least."""
    end = time.monotonic() + seconds
    number = 0
    while number < fewest or time.monotonic() < end:
        yield number
        number += 1
