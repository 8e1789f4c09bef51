# SPDX-License-Identifier: GPL-2.0
"""Keeps programs from one exploration to the next: those that were the first to meet many situations.

A few of them meet what takes the generator many programs, so that they run first. Kernels with the same operations
share one file below the state directory. It may be deleted.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from harness import paths
from harness.host.cache import host_trouble
from harness.host.files import write
from harness.programs import language
from harness.programs.generate import Made
from harness.programs.language import KINDS, BadProgram, Kind, Program
from harness.programs.situations import Situation

#: how many programs are kept. They run in a few seconds.
MOST: Final = 2000
#: how large the file may be, in bytes
_MOST_BYTES: Final = 1 << 22


class Corpus:
    """The programs that are kept for kernels with these operations.

    :param kinds: the kinds of operations that a kernel has.
    """

    def __init__(self, kinds: Iterable[Kind]) -> None:
        # Programs are kept as numbers, which mean the same only as long as the language does.
        about = json.dumps([language.VERSION, KINDS, sorted(kinds)])
        self.path = paths.state_dir() / "explored" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"

    def read(self) -> list[Program]:
        """The programs; none if nothing was kept, or nothing that can be read."""
        try:
            with open(self.path, "rb") as file:
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                return []
            return [_program(each) for each in json.loads(text)["programs"][:MOST]]
        except (OSError, ValueError, KeyError, TypeError, BadProgram):
            return []

    def write(self, programs: Sequence[Program]) -> None:
        """Keep these programs in place of those from before.

        :raises HostError: if the disk is full, or not writable.
        """
        with host_trouble(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(language.to_wire(each), separators=(",", ":")) for each in programs)
        write(self.path, f'{{"programs": [\n{lines}\n]}}\n')


def _program(data: Any) -> Program:
    return tuple(language.decoded(each) for each in language.from_wire(data))


class Best:
    """The programs of an exploration that were the first to meet the most situations."""

    def __init__(self) -> None:
        #: all situations that were met
        self.seen: set[Situation] = set()
        self._heap: list[tuple[int, int, Program]] = []
        self._count = 0

    def add(self, made: Made) -> None:
        """Consider a program."""
        self._count += 1
        before = len(self.seen)
        self.seen.update(made.situations)
        if len(self.seen) == before:
            return
        # Of two that are equally good the earlier one stays.
        entry = (len(self.seen) - before, -self._count, made.program)
        if len(self._heap) < MOST:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapq.heapreplace(self._heap, entry)

    def programs(self) -> list[Program]:
        """The best first."""
        return [program for _, _, program in sorted(self._heap, reverse=True)]
