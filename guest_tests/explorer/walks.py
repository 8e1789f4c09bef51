# SPDX-License-Identifier: GPL-2.0
"""Forces the kernel to walk the reverse map of every page of a program, and sees which mappings followed.

All pages are asked to move to a node where they are not: moving a page to the node where it is succeeds without a walk.
"""

from __future__ import annotations

import errno
import time
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from guest_tests.explorer.arena import PAGE, Arena, address, frame
from guest_tests.explorer.oracles import Failure
from guest_tests.mm import numa, syscalls
from harness.programs import memory
from harness.programs.memory import ARENA_PAGES, HELD, READ, Machine, Pages, Step

#: how often a page is asked to move before it is called lost
_TRIES: Final = 4
#: seconds between two tries
_PAUSE: Final = 0.002
#: The page behind the arena, which moves in each call. If it does not, the call says nothing of the other pages.
CONTROL: Final = ARENA_PAGES


class Walker:
    """Moves the pages of programs from node to node."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._nodes = numa.nodes()
        self._boundaries = _first_frames(self._nodes)
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED_NOREPLACE
        syscalls.mmap(address(CONTROL), PAGE, syscalls.PROT_RW, flags)
        arena.fill(CONTROL, CONTROL + 1, b"c")
        #: the frame of the shared zero page, which has no reverse map
        self.zero = _zero_page(arena)
        #: whether follow_page() finds pages that nobody may read, as move_pages() shows; taken to be so with one node
        self.finds_inaccessible = not self.possible or _finds_inaccessible(arena, self._nodes)
        #: how many pages were seen to move
        self.moved = 0
        #: how many walks say nothing, because the control page did not move either
        self.unable = 0

    @property
    def possible(self) -> bool:
        """Whether there is another node to move to."""
        return len(self._nodes) > 1

    def check_plan(self, first: int, end: int) -> bool:
        """Move every page of the calling process in a range; returns whether all followed at once."""
        if not self.possible:
            return True
        before = self._entries()
        return self._at_once(
            [page for page in range(first, end) if before[page] >> 63 and frame(before[page]) != self.zero], before
        )

    def _at_once(self, present: list[int], before: array[int]) -> bool:
        """Move pages of the calling process with the control page; returns whether all moved."""
        present.append(CONTROL)
        self._ask(0, present, before)
        after = self._arena.entries()
        for page in present:
            if frame(after[page]) == frame(before[page]):
                return False
        self.moved += len(present) - 1
        return True

    def check(self, machine: Machine, pids: Sequence[int], only: Step | None = None) -> Failure | None:
        """Move every page of a program, and return the first one that did not follow.

        :param pids: of the processes, 0 for the caller and for those that do not exist.
        :param only: move only the pages that this step is about.
        """
        if not self.possible:
            return None
        self._entries()
        waiting = {
            process: self._present(pages, pids[process], only)
            for process, pages in enumerate(machine.processes)
            if pages is not None and (only is None or only.process == process)
        }
        total = sum(map(len, waiting.values()))
        if [*waiting] == [0] and self._at_once([*waiting[0]], self._arena.entries()):
            return None
        for attempt in range(_TRIES):
            time.sleep(_PAUSE * attempt)
            control = frame(self._arena.entries()[CONTROL])
            self._ask(0, [CONTROL], self._arena.entries())
            # A page that a process shares with an earlier one has moved with that one already.
            for process, before in waiting.items():
                left = self._left(before, pids[process])
                if left:
                    self._ask(pids[process], left, self._arena.entries(pids[process]))
            for process, before in waiting.items():
                left = self._left(before, pids[process])
                waiting[process] = {page: before[page] for page in left}
            if not any(waiting.values()):
                self.moved += total
                return None
        if frame(self._arena.entries()[CONTROL]) == control:
            self.unable += 1
            return None
        process, before = next((process, before) for process, before in waiting.items() if before)
        page = next(iter(before))
        text = f"page {page} does not move to another node, and a page that was not part of the program does"
        return Failure("walk", process, page, text)

    def _entries(self) -> array[int]:
        """What pagemap says, with the control page present: it may have been swapped out."""
        self._arena.tags(CONTROL, CONTROL + 1)
        return self._arena.entries()

    def _present(self, pages: Pages, pid: int, only: Step | None) -> dict[int, int]:
        """The frame of each page that can be asked to move."""
        entries = self._arena.entries(pid)
        return {
            page: number
            for start, end in (memory.runs(pages) if only is None else [(only.start, only.end)])
            for page in range(start, end)
            if (number := frame(entries[page])) and number != self.zero and not pages.more[page] & HELD
            if self.finds_inaccessible or pages.attr[page] & READ
        }

    def _left(self, before: dict[int, int], pid: int) -> list[int]:
        """The pages that are where they were."""
        entries = self._arena.entries(pid)
        return [page for page, number in before.items() if frame(entries[page]) == number]

    def _ask(self, pid: int, pages: Iterable[int], entries: array[int]) -> None:
        """Ask for pages to move to a node where they are not."""
        asked = [*pages]
        if len(self._nodes) == 2:
            first, second = self._nodes
            border = self._boundaries[1]
            nodes = [first if frame(entries[page]) >= border else second for page in asked]
        else:
            nodes = [self._other(frame(entries[page])) for page in asked]
        self._arena.migrate(pid, [address(page) for page in asked], nodes)

    def _other(self, number: int) -> int:
        """A node that the frame does not belong to."""
        here = sum(number >= each for each in self._boundaries) - 1
        return self._nodes[(here + 1) % len(self._nodes)]


def _map_first_page() -> None:
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED
    syscalls.mmap(address(0), PAGE, syscalls.PROT_RW, flags)


def _zero_page(arena: Arena) -> int:
    """Its frame, which a page shows that was read and never written."""
    _map_first_page()
    arena.tags(0, 1)
    found = frame(arena.entries()[0])
    arena.reset()
    return found


def _finds_inaccessible(arena: Arena, nodes: Sequence[int]) -> bool:
    """Whether move_pages() moves a page that nobody may read.

    It answers ENOENT on 6.1.192. Since 474098edac26 (6.1) follow_page() treats PROT_NONE entries as those of NUMA
    balancing, which it does not follow. d74943a2f3cd (6.5) is right again.
    """
    _map_first_page()
    arena.fill(0, 1, b"n")
    syscalls.mprotect(address(0), PAGE, syscalls.PROT_NONE)
    answers = [numa.move_pages(0, [address(0)], [node], numa.MPOL_MF_MOVE) for node in nodes]
    arena.reset()
    return [-errno.ENOENT] not in answers


def _first_frames(nodes: Sequence[int]) -> list[int]:
    """The first page frame of each node, of /proc/zoneinfo. Nodes are consecutive in the harness's machines."""
    first: dict[int, int] = {}
    node = -1
    for line in Path("/proc/zoneinfo").read_text().splitlines():
        words = line.split()
        if line.startswith("Node"):
            node = int(words[1].rstrip(","))
        elif words and words[0] == "start_pfn:" and int(words[1]):
            first[node] = min(first.get(node, 1 << 60), int(words[1]))
    return [0, *(first[each] for each in nodes[1:])]
