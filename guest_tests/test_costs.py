# SPDX-License-Identifier: GPL-2.0
"""How many instructions of the guest a move takes, for the sizes and alignments of row 88 and each flag.

These tests need a guest whose clock counts instructions, one for each nanosecond (``--icount``). Machine code in this
module reads the clock right before and after the system call. The cost of a call that is refused at once (EINVAL) is
subtracted: reading the clock, entering and leaving the kernel. The rest is the kernel's work. Each repetition of a
string instruction (``rep movs``) counts.

The cheapest of many moves is recorded, because every disturbance makes a move more expensive: an interrupt, a per-CPU
list that runs empty, a tree of VMAs that is rebalanced. Whether the tree is rebalanced depends on how many VMAs the
process has. It was seen to cost 10 000 instructions on 7.3.4, as much as a small move, so the tests vary that number.

Instructions are no measure of time: a TLB flush counts as one, and so does an access that misses every cache. The
figures are for comparisons between kernels, flags and alignments.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import statistics
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, swap, syscalls, vmstat
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, map_anonymous
from guest_tests.mm.syscalls import MADV_MERGEABLE, MAP_NORESERVE, MREMAP_FIXED, MREMAP_MAYMOVE
from guest_tests.support.checks import counted
from guest_tests.support.folios import is_large, pmd_size, thp
from guest_tests.support.found import assert_found
from guest_tests.support.moves import ways
from guest_tests.support.swapping import assert_pages_out

# Moves leave nothing behind, and the figures do not depend on what ran before.
pytestmark = [pytest.mark.icount, pytest.mark.shared_guest, pytest.mark.guest_timeout(20)]

Record = Callable[[str, object], None]

_KB: Final = 1 << 10
_MB: Final = 1 << 20
#: what an entry of the page table's two levels above the last one maps
_PMD: Final = PAGE_SIZE * PAGE_SIZE // 8
_PUD: Final = _PMD * PAGE_SIZE // 8

# --- the instrument ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Code:
    """Machine code of two functions. Both return how many ticks of the clock they took.

    The first takes a block of six words, the number and the arguments of a system call. It makes the call and replaces
    the number by the result. The second takes a number of rounds and runs a loop of two instructions as often.
    """

    #: the code of both functions
    text: bytes
    #: where the second function begins, in bytes
    loop: int
    #: where a function begins that returns the clock's ticks per second; None if there is one tick per nanosecond
    frequency: int | None = None


_CODES: Final = {
    "x86_64": _Code(
        bytes.fromhex(
            "53 4154 4889fb"  # push rbx; push r12; mov rbx, rdi
            "0f31 48c1e220 4809d0 4989c4"  # rdtsc; shl rdx, 32; or rax, rdx; mov r12, rax
            "488b03 488b7b08 488b7310"  # mov rax, [rbx]; mov rdi, [rbx+8]; mov rsi, [rbx+16]
            "488b5318 4c8b5320 4c8b4328"  # mov rdx, [rbx+24]; mov r10, [rbx+32]; mov r8, [rbx+40]
            "0f05 4889c1"  # syscall; mov rcx, rax
            "0f31 48c1e220 4809d0 4c29e0"  # rdtsc; shl rdx, 32; or rax, rdx; sub rax, r12
            "48890b 415c 5b c3"  # mov [rbx], rcx; pop r12; pop rbx; ret
            "0f31 48c1e220 4809d0 4889c6"  # rdtsc; shl rdx, 32; or rax, rdx; mov rsi, rax
            "48ffcf 75fb"  # 1: dec rdi; jnz 1b
            "0f31 48c1e220 4809d0 4829f0 c3"  # rdtsc; shl rdx, 32; or rax, rdx; sub rax, rsi; ret
        ),
        loop=0x41,
    ),
    "aarch64": _Code(
        bytes.fromhex(
            "e90300aa 280140f9"  # mov x9, x0; ldr x8, [x9]
            "208540a9 228d41a9 241540f9"  # ldp x0, x1, [x9, #8]; ldp x2, x3, [x9, #24]; ldr x4, [x9, #40]
            "4ae03bd5 010000d4 4be03bd5"  # mrs x10, cntvct_el0; svc #0; mrs x11, cntvct_el0
            "200100f9 60010acb c0035fd6"  # str x0, [x9]; sub x0, x11, x10; ret
            "4ae03bd5"  # mrs x10, cntvct_el0
            "000400f1 e1ffff54"  # 1: subs x0, x0, #1; b.ne 1b
            "4be03bd5 60010acb c0035fd6"  # mrs x11, cntvct_el0; sub x0, x11, x10; ret
            "00e03bd5 c0035fd6"  # mrs x0, cntfrq_el0; ret
        ),
        loop=0x2C,
        frequency=0x44,
    ),
}


class Counter:
    """Counts instructions by the guest's clock."""

    def __init__(self) -> None:
        code = _CODES[platform.machine()]
        page = map_anonymous(1)
        ctypes.memmove(page.address, code.text, len(code.text))
        # The kernel makes new code visible to instruction fetches when a page becomes executable.
        page.mprotect(syscalls.PROT_READ | syscalls.PROT_EXEC)
        # PYFUNCTYPE keeps the GIL. Releasing it would take instructions, and let another thread run.
        self._call = ctypes.PYFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(page.address)
        self._loop = ctypes.PYFUNCTYPE(ctypes.c_uint64, ctypes.c_uint64)(page.address + code.loop)
        frequency = 1_000_000_000
        if code.frequency is not None:
            frequency = ctypes.PYFUNCTYPE(ctypes.c_uint64)(page.address + code.frequency)()
        #: instructions in a tick of the clock
        self.resolution = 1_000_000_000 // frequency
        #: instructions of a system call that does nothing, and of reading the clock
        self.overhead = 0
        self.overhead = min(self._refused() for _ in range(32))

    def loop(self, rounds: int) -> int:
        """How many instructions a loop of two instructions took, with those around it.

        :param rounds: how often the loop runs.
        """
        with _undisturbed():
            ticks = self._loop(rounds)
        return int(ticks) * self.resolution

    def mremap(self, old: int, length: int, flags: int, new: int) -> tuple[int, int]:
        """Move memory; returns the result of the system call, and the instructions that it took inside the kernel."""
        block = (ctypes.c_int64 * 6)(syscalls.number("mremap"), old, length, length, flags, new)
        with _undisturbed():
            ticks = self._call(ctypes.addressof(block))
        return block[0], ticks * self.resolution - self.overhead

    def _refused(self) -> int:
        result, cost = self.mremap(0, PAGE_SIZE, 1 << 30, 0)
        assert result == -errno.EINVAL, f"mremap() with a flag that no kernel knows returned {result}"
        return cost


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep other processes from running: their instructions would be counted too. Interrupts still arrive."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


@pytest.fixture
def counter(request: pytest.FixtureRequest) -> Counter:
    """The instrument, calibrated; skips where the clock does not count instructions."""
    if not request.config.getoption("--icount", False):
        pytest.skip("needs a guest whose clock counts instructions: give --icount")
    if platform.machine() not in _CODES:
        pytest.skip(f"needs machine code that reads the clock, and there is none for {platform.machine()}")
    counter = Counter()
    # The cheapest of five, because an interrupt may arrive. The two loops differ by nothing but their rounds.
    short, long = (min(counter.loop(rounds) for _ in range(5)) for rounds in (10_000, 30_000))
    off = long - short - 2 * 20_000
    assert abs(off) < counter.resolution, f"20000 rounds of 2 instructions make {off:+} instructions too many"
    return counter


def test_the_clock_counts_instructions(counter: Counter, record_property: Record) -> None:
    """No row: a loop of 100 million instructions is counted, with the interrupts that come meanwhile.

    Every kernel: the clock counts each instruction, and interrupts add less than 5 %.
    """
    rounds = 50_000_000
    taken = statistics.median(counter.loop(rounds) for _ in range(5))
    share = (taken - 2 * rounds) / (2 * rounds)
    record_property(
        "cost",
        {
            "step": "clock",
            "resolution": counter.resolution,
            "overhead": counter.overhead,
            "interrupts": round(share * 1_000_000),
        },
    )
    assert 0 <= share < 0.05, f"a loop of {2 * rounds} instructions took {share:+.1%} more"


# --- what is moved -----------------------------------------------------------------------------------------------


def _nothing(_: Mapping) -> None:
    pass


@dataclass(frozen=True)
class Move:
    """Memory of one kind, and places to move it from and to."""

    #: what the memory is made of
    kind: str
    #: its size in bytes
    size: int
    #: the largest unit that the addresses are multiples of; see :meth:`places`
    alignment: str
    #: which part of the memory is present, from 0 to 1
    touched: float = 1.0
    #: further ``MAP_*`` flags
    flags: int = 0
    #: the ``MADV_*`` advice given for all of it; 0 for none
    advice: int = 0
    #: whether all pages hold the same
    same: bool = False
    #: called after the pages were written, to bring them into the state in which they move
    prepare: Callable[[Mapping], object] = _nothing

    def __str__(self) -> str:
        # The id of a test, which must be the same on the host, whose pages may be of another size.
        size = f"{self.size >> 20}MiB" if self.size >= _MB else f"{self.size >> 10}KiB"
        return f"{'a-PUD' if self.size == _PUD else size}-{self.alignment.replace(' ', '')}"

    @property
    def pages(self) -> int:
        """How many pages are present."""
        return int(self.size * self.touched) // PAGE_SIZE

    def places(self) -> tuple[int, int]:
        """The offsets of source and target in an area, in bytes.

        There is a free piece of the alignment's size below each, so that nothing keeps the kernel from moving whole
        page tables (``try_realign_addr()``, 6.7)::

            alignment   [ free  ][source ][ free  ][target ]
            1 MiB       [ free  ][ .sourc][e free ][ .targe][t
            page        [ free  ][.source][. free ][..targe][t      differ, so that each page moves by itself
            PMD to page [ free  ][source ][ free  ][.target][
        """
        step = _PUD if self.alignment == "PUD" else _PMD
        source, target = _OFFSETS.get(self.alignment, (0, 0))
        return step + source, step + target + -(-self.size // step) * step + step

    def room(self) -> int:
        """How many pages an area needs for it."""
        return (self.places()[1] + self.size) // PAGE_SIZE + 1


#: offsets of source and target in a page table, in bytes
_OFFSETS: Final = {"page": (PAGE_SIZE, 2 * PAGE_SIZE), "1 MiB": (_MB, _MB), "PMD to page": (0, PAGE_SIZE)}


def _words(address: int, pages: int) -> memoryview:
    """The first word of each page."""
    memory = (ctypes.c_char * (pages * PAGE_SIZE)).from_address(address)
    return memoryview(memory).cast("B").cast("Q")[:: PAGE_SIZE // 8]


def _move_once(counter: Counter, relocate: bool, what: Move, flags: int, neighbours: int, *, last: bool) -> int:
    """Move fresh memory, and assert that it arrived, and was relocated if a flag asks for that.

    :param neighbours: how many other VMAs the area has.
    :param last: also assert that the pages are found.
    :returns: the cost in instructions.
    """
    numbers = memoryview(array("Q", [7] * what.pages if what.same else range(1, what.pages + 1)))
    with carve_out(what.room()) as area:
        area.hole(0, area.pages)
        for index in range(neighbours):
            area.map(2 * index, 1)
        source, target = what.places()
        memory = area.map(source // PAGE_SIZE, what.size // PAGE_SIZE, flags=what.flags)
        memory.contents = [None] * memory.pages
        if what.advice:
            memory.madvise(what.advice)
        _words(memory.address, what.pages)[:] = numbers
        what.prepare(memory)
        present = sum(entry.present for entry in pagemap.entries(memory.address, what.pages))
        with counted(relocate, relocated=1 if flags else 0, relocated_pages=present if flags else 0):
            result, cost = counter.mremap(
                memory.address, memory.length, flags | MREMAP_MAYMOVE | MREMAP_FIXED, area.address + target
            )
        assert result == area.address + target, f"mremap() returned {result:#x}"
        memory.address = result
        native = _is_native(memory, what, area)
        assert native == bool(flags), f"moved with flags {flags:#x}, memory has {'its' if native else 'an old'} offset"
        assert _words(memory.address, what.pages) == numbers, "the data did not arrive"
        if last:
            few = min(what.pages // 2, 64)
            assert_found(memory.part(0, few), memory.part(what.pages - few, few))
    return cost


def _is_native(memory: Mapping, what: Move, area: CarveOut) -> bool:
    """Whether memory has the page offset of its place: only then a new mapping right behind it merges with it."""
    behind = area.map((memory.end - area.address) // PAGE_SIZE, 1, flags=what.flags)
    if what.advice:
        behind.madvise(what.advice)
    return maps.vma_at(memory.address).end == behind.end


# --- measuring ---------------------------------------------------------------------------------------------------

#: A node of the tree of VMAs has 16 slots, two of which a neighbour takes, with the hole beside it.
_NEIGHBOURS: Final = 8
#: Two series of moves must find the same minimum, up to this part of it: every long move has interrupts.
_TOLERANCE: Final = 0.02


def _measure(counter: Counter, relocate: bool, record: Record, what: Move, flags: int) -> None:
    """Move memory of one kind many times, and record what it costs."""
    told = {"step": "move", "kind": what.kind, "size": what.size, "alignment": what.alignment, "flags": flags}
    if flags and not relocate:
        record("cost", told | {"missing": "EINVAL"})
        pytest.skip(f"needs a kernel whose mremap() knows flag {flags}")
    if what.size % PAGE_SIZE:
        pytest.skip(f"needs pages of at most {what.size >> 10} KiB, these have {PAGE_SIZE >> 10}")
    needed, free = what.pages * PAGE_SIZE >> 10, vmstat.meminfo()["MemAvailable"]
    if needed > free:
        pytest.skip(f"needs {needed >> 10} MiB of free memory, there are {free >> 10}: give more by --guest-memory")
    series = [
        [
            _move_once(counter, relocate, what, flags, neighbours, last=turn and neighbours == _NEIGHBOURS - 1)
            for neighbours in range(_NEIGHBOURS)
        ]
        for turn in (False, True)
    ]
    costs = sorted(series[0] + series[1])
    first, second = map(min, series)
    assert abs(first - second) <= max(_TOLERANCE * costs[0], counter.resolution), (
        f"two series of moves cost {first} and {second} instructions at least: {series}"
    )
    record(
        "cost",
        told | {"pages": what.pages, "instructions": costs[0], "median": round(statistics.median(costs))},
    )


# A guest has 640 MiB. More than 16 MiB only adds page tables of the same kind. The moves of 1 GiB (one PUD) have a part
# of their pages present.
_MATRIX: Final = [
    Move("small pages", size, alignment)
    for alignment, sizes in {
        "page": (8 * _KB, 64 * _KB, _MB, 2 * _MB, 16 * _MB, 128 * _MB),
        "1 MiB": (5 * _MB, 128 * _MB),
        "PMD": (2 * _MB, 16 * _MB, 128 * _MB),
    }.items()
    for size in sizes
] + [Move("small pages, 1/16 present", _PUD, alignment, 1 / 16, MAP_NORESERVE) for alignment in ("PMD", "PUD")]


@ways
@pytest.mark.parametrize("what", _MATRIX, ids=str)
def test_small_pages(counter: Counter, relocate: bool, record_property: Record, what: Move, flags: int) -> None:
    """Row 88 (size-matrix): moves of 8 KiB to 1 GiB of small pages are counted in instructions, for several alignments.

    Unpatched: a plain move is counted; with a flag the test skips.
    Patched: each of the three ways is counted, and two series of moves agree.
    """
    with thp("madvise"):
        _measure(counter, relocate, record_property, what, flags)


@ways
@pytest.mark.parametrize("alignment", ["PMD", "PMD to page"])
def test_a_huge_page(counter: Counter, relocate: bool, record_property: Record, alignment: str, flags: int) -> None:
    """Rows 76 (thp-aligned) and 77 (thp-misaligned): moves of a huge page are counted in instructions.

    Unpatched: a plain move is counted; with a flag the test skips.
    Patched: each of the three ways is counted.
    """
    what = Move("huge page", pmd_size(), alignment, prepare=_is_huge)
    with thp():
        _measure(counter, relocate, record_property, what, flags)


def _is_huge(memory: Mapping) -> None:
    assert is_large(memory.address), f"no huge page at {memory.address:#x}: is memory too fragmented?"


@ways
def test_swapped_out(counter: Counter, relocate: bool, record_property: Record, flags: int) -> None:
    """Row 70 (swapped): moves of swap entries are counted in instructions.

    Unpatched: a plain move is counted; with a flag the test skips.
    Patched: each of the three ways is counted.
    """
    what = Move("swapped out", _MB, "page", prepare=assert_pages_out)
    swap.require_swap(what.size >> 10)
    with thp("madvise"):
        _measure(counter, relocate, record_property, what, flags)


@ways
def test_merged(counter: Counter, relocate: bool, record_property: Record, ksm: Ksm, flags: int) -> None:
    """Row 133 (relocate-ksm): moves of merged pages, which the move un-merges by copying, are counted in instructions.

    Unpatched: a plain move is counted; with a flag the test skips.
    Patched: each of the three ways is counted.
    """
    what = Move("KSM pages", _MB, "page", advice=MADV_MERGEABLE, same=True, prepare=ksm.merge)
    with thp("madvise"):
        _measure(counter, relocate, record_property, what, flags)
