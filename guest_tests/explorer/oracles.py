# SPDX-License-Identifier: GPL-2.0
"""What is checked after a program besides the walks: the bytes of each page, the layout, the accounts, the marks of a
userfaultfd, and KSM.

Each check returns what is wrong, or None. The text of a failure names pages of the arena, never addresses, so that
equal failures have equal texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from guest_tests.explorer.arena import BASE, LENGTH, PAGE, frame
from guest_tests.mm import maps
from guest_tests.mm.pagemap import Entry
from harness.programs.memory import (
    ARENA_PAGES,
    FILED,
    GUARD,
    HELD,
    LAZY,
    LOCKED,
    MAPPED,
    MERGEABLE,
    PROTECTED,
    READ,
    REGISTERED,
    SHARED,
    TOUCHED,
    WRITE,
    Machine,
    Pages,
    runs,
)

#: Entries of migrations have swap types behind those of swap devices (include/linux/swapops.h), of which a guest has
#: one or two.
_NO_DEVICE: Final = 16


@dataclass(frozen=True)
class Failure:
    """What an oracle found wrong."""

    #: "bytes", "walk", "layout", "accounts", "marks", "refused" or "merge"
    oracle: str
    #: which process of the program
    process: int
    #: the first page concerned
    page: int
    text: str


class Memory(Protocol):
    """The arena of one process of a program, as the first process can look at it."""

    def tags(self, start: int, end: int) -> tuple[bytes, bytes]:
        """See :meth:`Arena.tags`."""

    def first_wrong(self, start: int, expected: bytes) -> int | None:
        """See :meth:`Arena.first_wrong`."""


# --- bytes -------------------------------------------------------------------------------------------------------


def check_bytes(machine: Machine, process: int, memory: Memory, *, all_bytes: bool) -> Failure | None:
    """Compare the contents of each readable page with the model.

    :param all_bytes: every byte, and not only the first and last of each page, which are the ones that are written.
    """
    pages = machine.processes[process]
    assert pages is not None
    for start, end in _readable(pages):
        expected = machine.contents(pages, start, end)
        first, last = memory.tags(start, end)
        if first != expected or last != expected:
            for index in range(start, end):
                want, lazy = expected[index - start], pages.attr[index] & LAZY
                for byte, where in ((first[index - start], "first"), (last[index - start], "last")):
                    if byte != want and not (lazy and byte == 0):
                        text = f"page {index} holds {byte} in its {where} byte, {want} was written"
                        return Failure("bytes", process, index, text)
        elif all_bytes:
            wrong = memory.first_wrong(start, expected)
            if wrong is not None:
                return Failure("bytes", process, wrong, f"page {wrong} holds bytes that nobody wrote")
    return None


def _readable(pages: Pages) -> list[tuple[int, int]]:
    """The ranges that may be read. Guard markers and protections interrupt them."""
    return [
        part
        for start, end in runs(pages, MAPPED | READ)
        for part in ([(start, end)] if pages.none_has(start, end, GUARD) else _between_guards(pages, start, end))
    ]


def _between_guards(pages: Pages, start: int, end: int) -> list[tuple[int, int]]:
    found = []
    first = start
    for index in range(start, end + 1):
        if index == end or pages.attr[index] & GUARD:
            if first < index:
                found.append((first, index))
            first = index + 1
    return found


# --- migration entries -------------------------------------------------------------------------------------------


def check_settled(machine: Machine, entries: Sequence[Sequence[int]]) -> Failure | None:
    """Look for a page that a migration has not put back. Whoever reads it waits for ever.

    :param entries: of pagemap while nothing is migrated, for each process; empty for those that do not exist.
    """
    for process, pages in enumerate(machine.processes):
        if pages is None:
            continue
        for start, end in runs(pages, MAPPED):
            for page in range(start, end):
                kind = Entry(entries[process][page]).swap_type
                if kind is not None and kind >= _NO_DEVICE and not pages.attr[page] & GUARD:
                    text = f"page {page} is still an entry of a migration, and none is under way"
                    return Failure("walk", process, page, text)
    return None


# --- layout ------------------------------------------------------------------------------------------------------


def check_layout(machine: Machine, process: int, pid: int) -> Failure | None:
    """Compare what is mapped, and with which permissions, with the model."""
    pages = machine.processes[process]
    assert pages is not None
    seen = bytearray(ARENA_PAGES)
    for vma in maps.vmas_between(BASE, BASE + LENGTH, pid or "self"):
        bits = MAPPED | _permissions(vma.perms)
        begin, end = (vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE
        seen[begin:end] = bytes((bits,)) * (end - begin)
    wanted = pages.attr.translate(_SHOWN)
    if seen == wanted:
        return None
    page = next(page for page, (here, there) in enumerate(zip(seen, wanted, strict=True)) if here != there)
    text = f"page {page} is {_describe(seen[page])}, it should be {_describe(wanted[page])}"
    return Failure("layout", process, page, text)


def mappings(pid: int) -> list[tuple[int, int, str]]:
    """The mappings in the arena of a process: first page, page behind the last, permissions."""
    return [
        ((vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE, vma.perms)
        for vma in maps.vmas_between(BASE, BASE + LENGTH, pid or "self")
    ]


_SHOWN: Final = bytes(value & (MAPPED | READ | WRITE | SHARED) for value in range(256))


def _permissions(text: str) -> int:
    return (READ if text[0] == "r" else 0) | (WRITE if text[1] == "w" else 0) | (SHARED if text[3] == "s" else 0)


def _describe(bits: int) -> str:
    if not bits & MAPPED:
        return "not mapped"
    access = ("r" if bits & READ else "-") + ("w" if bits & WRITE else "-")
    return f"mapped {access}{'s' if bits & SHARED else 'p'}"


#: flags that smaps shows, and the bit of ``attr`` or ``kept`` that each stands for
_FLAGS: Final = (("mg", MERGEABLE), ("lo", LOCKED))
_KEPT_FLAGS: Final = (("uw", REGISTERED),)


def check_accounts(machine: Machine, process: int, pid: int, entries: Sequence[int], zero: int) -> Failure | None:
    """Compare the sums and flags in smaps with pagemap and the model.

    :param entries: of pagemap.
    :param zero: the frame of the shared zero page, which smaps does not count.
    """
    pages = machine.processes[process]
    assert pages is not None
    for vma in maps.vmas_between(BASE, BASE + LENGTH, pid or "self", detailed=True):
        begin, end = (vma.start - BASE) // PAGE, (vma.end - BASE) // PAGE
        present = sum(frame(each) not in (0, zero) for each in entries[begin:end])
        if vma.size("Rss") * 1024 != present * PAGE:
            text = f"smaps counts {vma.size('Rss')} kB in the mapping of page {begin}, pagemap shows {present} pages"
            return Failure("accounts", process, begin, text)
        for flags, bits in ((_FLAGS, pages.attr[begin]), (_KEPT_FLAGS, pages.kept[begin])):
            for flag, bit in flags:
                if (flag in vma.vm_flags) != bool(bits & bit):
                    shows = "shows" if flag in vma.vm_flags else "does not show"
                    return Failure("accounts", process, begin, f"smaps {shows} {flag} for the mapping of page {begin}")
    return None


# --- marks of a userfaultfd --------------------------------------------------------------------------------------


def check_marks(machine: Machine, process: int, entries: Sequence[int]) -> Failure | None:
    """Compare which pages a userfaultfd write-protects with the model.

    :param entries: of pagemap.
    """
    pages = machine.processes[process]
    assert pages is not None
    for start, end in runs(pages):
        for page in range(start, end):
            marked = Entry(entries[page]).uffd_wp
            # What MADV_FREE was given for may have vanished together with its mark.
            if marked == bool(pages.more[page] & PROTECTED) or pages.attr[page] & LAZY:
                continue
            said = "is write-protected by a userfaultfd, and should not be"
            if not marked:
                said = "is not write-protected by the userfaultfd, and should be"
            return Failure("marks", process, page, f"page {page} {said}")
    return None


# --- KSM ---------------------------------------------------------------------------------------------------------


def check_merged(
    machine: Machine, entries: Sequence[Sequence[int]], zero: int, *, inaccessible: bool
) -> Failure | None:
    """After scans: pages of equal contents that KSM may merge share a frame.

    :param entries: of pagemap, for each process; empty for those that do not exist.
    :param inaccessible: whether the kernel finds pages that nobody may read, see
        :attr:`guest_tests.explorer.walks.Walker.finds_inaccessible`. ksmd looks for pages in the same way.
    """
    mergeable = [
        (process, pages, page)
        for process, pages in enumerate(machine.processes)
        if pages is not None
        for start, end in runs(pages, MAPPED | MERGEABLE)
        for page in range(start, end)
        # What was only read of a file is a page of the file.
        if not pages.kept[page] & FILED or pages.more[page] & TOUCHED
        if inaccessible or pages.attr[page] & READ
    ]
    # A page with further references cannot be write-protected. If it is the one in the unstable tree, ksmd compares all
    # equal pages with it and merges none of them (cmp_and_merge_page(), mm/ksm.c).
    held = {pages.tags[page] for _, pages, page in mergeable if pages.more[page] & HELD}
    frames: dict[int, tuple[int, int]] = {}
    for process, pages, page in mergeable:
        number = frame(entries[process][page])
        if not number or number == zero or pages.tags[page] in held or pages.attr[page] & LAZY:
            continue
        first = frames.setdefault(pages.tags[page], (number, page))
        if first[0] != number:
            text = f"KSM's scans leave page {page} and page {first[1]} apart, which hold the same"
            return Failure("merge", process, page, text)
    return None
