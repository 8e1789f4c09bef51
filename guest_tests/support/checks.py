# SPDX-License-Identifier: GPL-2.0
"""Assertions about system calls and memory: how it is laid out, that a refused call changed nothing, accounting."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Final

from guest_tests.mm import kpage, maps, pagemap, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.waiting import wait_until

#: the permissions that maps shows where a carve-out holds no mapping
_RESERVED: Final = "---s"

# --- layout ------------------------------------------------------------------------------------------------------


def layout(area: CarveOut) -> list[tuple[int, int]]:
    """The mappings of a carve-out as (first page, pages), without the reservation: ``[(0, 5), (10, 5)]``.

    :raises AssertionError: if /proc/PID/maps and ``PROCMAP_QUERY`` (6.11) disagree about a mapping.
    """
    found = [vma for vma in maps.vmas_between(area.address, area.end) if vma.perms != _RESERVED]
    if system.release() >= (6, 11, 0):
        for vma in found:
            queried = maps.query(vma.start)
            assert queried is not None, f"PROCMAP_QUERY finds nothing at {vma.start:#x}, but maps has {vma}"
            assert (queried.start, queried.end) == (vma.start, vma.end), f"PROCMAP_QUERY says {queried}, maps {vma}"
    return [((vma.start - area.address) // PAGE_SIZE, vma.length // PAGE_SIZE) for vma in found]


def expect_layout(area: CarveOut, wanted: list[tuple[int, int]], why: str) -> None:
    """Assert that a carve-out holds exactly the mappings ``wanted``, in the form that :func:`layout` returns.

    :param why: the reason for this expectation; begins the message of a failure.
    """
    actual = layout(area)
    assert actual == wanted, f"{why}: expected mappings (first page, pages) {wanted}, the kernel has {actual}"


# --- refusals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Everything user space can see of a carve-out. A refused call must not change it."""

    #: the mappings
    vmas: list[maps.Vma]
    #: pagemap's 64 bits for each page
    words: Sequence[int]
    #: the page frames that belong to large folios
    large: set[int]
    #: how much of it PMDs map, in kB
    huge_kb: int

    @classmethod
    def of(cls, area: CarveOut) -> State:
        """The state of ``area`` now."""
        words = pagemap.words(area.address, area.pages)
        large = kpage.in_large_folios(word & pagemap.FRAME for word in words if word & pagemap.PRESENT)
        huge_kb = maps.kilobytes(area.address, area.end, "AnonHugePages") if large else 0
        return cls(maps.vmas_between(area.address, area.end), words, large, huge_kb)

    def expect(self, area: CarveOut, during: str) -> None:
        """Assert that ``area`` is still in this state: the same VMAs, page frames, large folios and huge mappings.

        :param during: what happened since; begins the message of a failure.
        """
        now = State.of(area)
        assert now.vmas == self.vmas, (
            f"{during} changed mappings: {[str(vma) for vma in self.vmas]} became {[str(vma) for vma in now.vmas]}"
        )
        changed = [
            f"page {index}: {pagemap.Entry(old)} became {pagemap.Entry(new)}"
            for index, (old, new) in enumerate(zip(self.words, now.words, strict=True))
            if old != new
        ]
        assert not changed, f"{during} changed pages of the carve-out: {'; '.join(changed)}"
        split = len(self.large - now.large)
        assert now.large == self.large, (
            f"{during} split large folios with {split} pages, and made some with {len(now.large - self.large)}"
        )
        assert now.huge_kb == self.huge_kb, (
            f"{during} changed what PMDs map in the carve-out: {self.huge_kb} kB became {now.huge_kb} kB"
        )


def fails(code: int, call: Callable[[], object], what: str) -> None:
    """Assert that a system call fails with this error.

    :param code: the expected ``errno``.
    :param what: the call in words, for messages.
    """
    try:
        result = call()
    except OSError as error:
        got = errno.errorcode.get(error.errno or 0, f"error {error.errno}")
    else:
        got = f"success ({result:#x})" if isinstance(result, int) else f"success ({result!r})"
    assert got == errno.errorcode[code], f"{what} gave {got}, expected {errno.errorcode[code]}"


def refused(area: CarveOut, code: int, call: Callable[[], object], what: str, *watched: Mapping) -> None:
    """Assert that a call fails with ``code`` and leaves ``area`` as it was: mappings, frames and every byte.

    :param what: the call in words, for messages.
    :param watched: mappings whose bytes are compared.
    """
    before = State.of(area)
    fails(code, call, what)
    before.expect(area, f"{what}, though it was refused,")
    for mapping in watched:
        mapping.check()


# --- accounting --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accounts:
    """The kernel's accounting of this process and of the system, in kB."""

    vm_size: int
    rss_anon: int
    locked: int
    committed: int
    #: what a control group is charged with
    charged: int

    @classmethod
    def now(cls, group: Memcg | None) -> Accounts:
        """The present numbers."""
        status = vmstat.status()
        committed = vmstat.meminfo()["Committed_AS"]
        charged = 0 if group is None else group.current >> 10
        return cls(status["VmSize"], status["RssAnon"], status["VmLck"], committed, charged)


def same_accounts(call: Callable[[], object], what: str, slack: int = 0, group: Memcg | None = None) -> None:
    """Assert that a call does not change the accounting.

    The interpreter and other processes allocate memory at the same time. Python's allocator maps and unmaps 1 MB at a
    time, which shows in the size and in the committed memory of the one call that happens to need it. A call that leaks
    does so every time, so that one of five calls without a difference is enough.

    :param slack: the difference in kB that the kernel's batches may make, below which there is none.
    :param group: a control group whose charge is compared as well.
    """
    pairs = []
    for _ in range(5):
        before = Accounts.now(group)
        call()
        pairs.append((before, Accounts.now(group)))
        if all(abs(old - new) <= slack for old, new in zip(*map(astuple, pairs[-1]), strict=True)):
            return
    raise AssertionError(f"{what} changes the accounting every time: {pairs[-1][0]} became {pairs[-1][1]}")


#: what a group may be charged with that its statistics do not explain, in bytes: each CPU charges 64 pages ahead
#: (MEMCG_CHARGE_BATCH, include/linux/memcontrol.h), and its statistics may be as many pages behind
_UNEXPLAINED: Final = max(2 << 20, 2 * 64 * (os.cpu_count() or 1) * PAGE_SIZE)


def assert_explained(group: Memcg, seconds: float = 20.0) -> None:
    """Assert that all that is charged to a group is in its statistics.

    A page that nobody maps any more and that was not freed is charged, and in none of them. Kernels before 5.18 do not
    say how much memory of their own they charge; nothing is asserted there.

    :param seconds: how long to wait for pages that are on their way.
    """
    if "kernel" not in group.stat():
        return

    def explained() -> bool:
        stat = group.stat()
        return group.current - sum(stat[name] for name in ("anon", "file", "kernel", "swapcached")) < _UNEXPLAINED

    what = f"what is charged to the group, {group.current} bytes, to be explained by its statistics, {group.stat()}"
    wait_until(explained, what, seconds)


@contextmanager
def counted(relocate: bool, **events: int) -> Iterator[None]:
    """Assert how far the kernel's own counters of relocations rise while the block runs.

    A counter that the kernel does not have is ignored.

    :param relocate: the fixture of that name; a kernel without relocation has nothing to count.
    :param events: names in /proc/vmstat without ``mremap_``. 0 means exactly none, another number at least so many.
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
