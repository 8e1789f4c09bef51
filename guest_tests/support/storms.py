# SPDX-License-Identifier: GPL-2.0
"""Processes that work on much memory of a test while the test moves it, in an order that a seed decides.

::

    with Storm([area.page(0), area.page(pages)], pages, seed=1) as storm:  # before the memory is mapped
        mapping = area.map(0, pages)
        storm.begin()
        ...                                                                # moves

They migrate, reclaim, age, merge, split and soft-offline its pages, compact memory, turn swap off and on, and read and
write through process_vm_readv(2). They share no memory with the test. When a step comes, nobody can repeat.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import struct
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from guest_tests.mm import ksm, numa, pagemap, swap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE
from guest_tests.mm.probes import offline

#: how often a step is chosen, against the others
_WEIGHTS: Final[Mapping[str, int]] = {
    "migrate": 12,
    "page out": 6,
    "words": 6,
    "cold": 2,
    "reclaim": 3,
    "idle": 3,
    "split": 3,
    "soft offline": 2,
    "clear references": 2,
    "merge": 2,
    "compact": 1,
    "swapoff": 1,
}
#: steps of the first process alone: a word has one writer, and ksmd and the swap area are there once
_ALONE: Final = frozenset({"words", "merge", "swapoff"})
#: pages of one step at most
_CHUNK: Final = 512
#: how long ksmd may scan in one step, in seconds
_SCAN: Final = 0.005
_MM: Final = Path("/sys/kernel/mm")
_SPLIT: Final = Path("/sys/kernel/debug/split_huge_pages")
_IDLE: Final = _MM / "page_idle/bitmap"
_COMPACT: Final = Path("/proc/sys/vm/compact_memory")
_libc: Final[Any] = ctypes.CDLL(None, use_errno=True)

Step = Callable[[], bool]


class Storm:
    """Such processes, which wait until :meth:`begin` and end with the ``with`` block.

    Enter it before the memory is mapped: it forks, and what a forked process has too is not relocated.

    :param places: where the memory may be, in bytes.
    :param pages: how long it is.
    :param words: the numbers of pages whose first 8 bytes count writes: the test must not write to these pages.
    :param group: the control group that is reclaimed; None for none.
    :param processes: how many there are.
    :raises AssertionError: at the end of the block, if a write to a word was lost.
    """

    def __init__(
        self,
        places: Sequence[int],
        pages: int,
        seed: int,
        *,
        words: Sequence[int] = (),
        group: Path | None = None,
        processes: int = 2,
    ) -> None:
        self._target = _Target(os.getpid(), places, pages, words, group)
        self._seed, self._processes = seed, processes
        self._counts = mmap.mmap(-1, mmap.PAGESIZE)
        self._names = [*_steps(self._target, random.Random(seed))]
        self._pids: list[int] = []
        self._said, self._say = os.pipe()
        self._areas = swap.areas()

    @property
    def done(self) -> dict[str, int]:
        """How often each step had an effect. Steps that this kernel cannot do are left out."""
        return {
            name: sum(self._count(process, number) for process in range(self._processes))
            for number, name in enumerate(self._names)
        }

    @property
    def failed(self) -> bool:
        """Whether one of them has ended because something is wrong. The end of the block says what."""
        return any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in self._pids)

    def begin(self) -> None:
        """Let them work."""
        for pid in self._pids:
            os.kill(pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        for process in range(self._processes):
            pid = os.fork()
            if pid == 0:
                self._work(process)
            self._pids.append(pid)
            os.waitpid(pid, os.WUNTRACED)  # it stops itself
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for pid in self._pids:
            os.kill(pid, signal.SIGKILL)
        for pid in self._pids:
            os.waitpid(pid, 0)
        os.close(self._say)
        with open(self._said, errors="replace") as file:
            said = file.read()
        for area in self._areas:
            if area.path not in {each.path for each in swap.areas()}:
                swap.turn_on(area)
        if error is not None:
            error.add_note(f"the storm of seed {self._seed} did: {self.done}")
        elif said:
            raise AssertionError(f"{said.strip()} (seed {self._seed}, {self.done})")

    def _count(self, process: int, number: int) -> int:
        count: int = struct.unpack_from("=I", self._counts, _place(process, number))[0]
        return count

    def _work(self, process: int) -> None:
        try:
            syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
            order = random.Random(self._seed * 64 + process)
            steps = _steps(self._target, order)
            numbers = [number for number, name in enumerate(self._names) if process == 0 or name not in _ALONE]
            weights = [_WEIGHTS[self._names[number]] for number in numbers]
            os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                (number,) = order.choices(numbers, weights)
                # The memory may be gone from a place, or busy. Whether that is so is for the test to judge.
                with suppress(OSError):
                    if steps[self._names[number]]():
                        struct.pack_into("=I", self._counts, _place(process, number), self._count(process, number) + 1)
        except BaseException as error:
            os.write(self._say, "".join(traceback.format_exception_only(error)).encode())
        finally:
            os._exit(1)


def _place(process: int, number: int) -> int:
    """Where the count of a step of a process is."""
    return (process * len(_WEIGHTS) + number) * 4


class _Target:
    """The memory of a test."""

    def __init__(self, pid: int, places: Sequence[int], pages: int, words: Sequence[int], group: Path | None) -> None:
        self.pid, self.places, self.pages, self.words, self.group = pid, places, pages, words, group

    def chunk(self, order: random.Random) -> tuple[int, int]:
        """Some pages at one of the places: address and number."""
        pages = order.randint(1, min(_CHUNK, self.pages))
        return order.choice(self.places) + order.randint(0, self.pages - pages) * PAGE_SIZE, pages

    def frame(self, order: random.Random) -> int | None:
        """The frame of one page; None if it is not present."""
        return pagemap.entry(order.choice(self.places) + order.randrange(self.pages) * PAGE_SIZE, self.pid).pfn


def _steps(target: _Target, order: random.Random) -> dict[str, Step]:
    """What this kernel can do to memory; each step says whether it did something."""
    steps = {
        "page out": _advice(target, order, syscalls.MADV_PAGEOUT),
        "cold": _advice(target, order, syscalls.MADV_COLD),
        "clear references": lambda: _written(Path(f"/proc/{target.pid}/clear_refs"), order.choice("14")),
    }
    if len(numa.nodes()) > 1:
        steps["migrate"] = _migrate(target, order)
    if target.words:
        steps["words"] = _words(target)
    # Without swap there is nothing to reclaim of anonymous memory, and the kernel answers EAGAIN.
    if target.group is not None and (reclaim := target.group / "memory.reclaim").exists() and swap.areas():
        steps["reclaim"] = lambda: _written(reclaim, "2M")
    if _IDLE.exists():
        steps["idle"] = lambda: _age(target.frame(order))
    if _SPLIT.exists():
        steps["split"] = lambda: _split(target, order)
    if offline.missing("soft") is None and system.is_disposable():
        steps["soft offline"] = lambda: _soft_offline(target.frame(order))
    if ksm.available():
        steps["merge"] = _merge
    if _COMPACT.exists():
        steps["compact"] = lambda: _written(_COMPACT, "1")
    if areas := swap.areas():
        steps["swapoff"] = lambda: _off_and_on(areas[0])
    return {name: steps[name] for name in _WEIGHTS if name in steps}


def _written(path: Path, text: str) -> bool:
    path.write_text(text)
    return True


def _migrate(target: _Target, order: random.Random) -> Step:
    def step() -> bool:
        start, pages = target.chunk(order)
        node = order.choice(numa.nodes()[:2])
        addresses = [start + index * PAGE_SIZE for index in range(pages)]
        return node in numa.move_pages(target.pid, addresses, [node] * pages, numa.MPOL_MF_MOVE_ALL)

    return step


def _advice(target: _Target, order: random.Random, advice: int) -> Step:
    process = -1

    def step() -> bool:
        nonlocal process
        if process < 0:
            process = syscalls.call("pidfd_open", target.pid)
        start, pages = target.chunk(order)
        return syscalls.process_madvise(process, start, pages * PAGE_SIZE, advice) > 0

    return step


def _words(target: _Target) -> Step:
    written = dict.fromkeys(target.words, 0)

    def step() -> bool:
        for page in target.words:
            now = _transfer("process_vm_readv", target, page, 0)
            if now is None:
                continue
            assert now == written[page], f"a write was lost: the word of page {page} holds {now}, not {written[page]}"
            if _transfer("process_vm_writev", target, page, now + 1) is not None:
                written[page] = now + 1
        return any(written.values())

    return step


def _transfer(call: str, target: _Target, page: int, number: int) -> int | None:
    """Read or write a word wherever its page is mapped; returns it, or None if that is nowhere at the moment."""
    word = ctypes.c_uint64(number)
    here = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(word), 8))
    for place in target.places:
        there = ctypes.create_string_buffer(struct.pack("=QQ", place + page * PAGE_SIZE, 8))
        if _libc[call](target.pid, here, ctypes.c_ulong(1), there, ctypes.c_ulong(1), ctypes.c_ulong(0)) == 8:
            return word.value
    return None


def _age(frame: int | None) -> bool:
    """Mark frames as idle, and ask whether they are: both walk to their mappings (mm/page_idle.c)."""
    if frame is None:
        return False
    fd = os.open(_IDLE, os.O_RDWR)
    try:
        os.pwrite(fd, b"\xff" * 8, frame // 64 * 8)
        return len(os.pread(fd, 8, frame // 64 * 8)) == 8
    finally:
        os.close(fd)


def _split(target: _Target, order: random.Random) -> bool:
    start, pages = target.chunk(order)
    return _written(_SPLIT, f"{target.pid},{start:#x},{start + pages * PAGE_SIZE:#x}")


def _soft_offline(frame: int | None) -> bool:
    if frame is None or offline.over_budget() or offline.offline("soft", frame):
        return False
    offline.restore(frame)
    return True


def _merge() -> bool:
    ksm.scan_for(_SCAN)
    return True


def _off_and_on(area: swap.Area) -> bool:
    swap.turn_off_and_on(area)
    return True
