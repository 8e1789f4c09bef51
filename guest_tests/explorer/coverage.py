# SPDX-License-Identifier: GPL-2.0
"""Says which code of the kernel programs reach: for ``tests/benchmark_coverage.py``, on a kernel with CONFIG_KCOV.

The host sends ``{"functions": [...]}`` and after that ``{"programs": [...]}``, again and again. Each is answered by
``{"reached": N, "failed": N}``: how many places in these functions were ever reached, and how many programs failed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.explorer.serve import own_group, settings
from guest_tests.mm import syscalls
from harness.agent.session import Exchange
from harness.programs import language

_KCOV: Final = "/sys/kernel/debug/kcov"
# Documentation/dev-tools/kcov.rst
_INIT_TRACE: Final = 0x80086301
_ENABLE: Final = 0x6364
_DISABLE: Final = 0x6365
_TRACE_PC: Final = 0
#: how many places a program may reach, counted each time; more are not noted
_WORDS: Final = 1 << 20


class Coverage:
    """Collects the places that this task reaches in some functions."""

    def __init__(self, functions: Sequence[str]) -> None:
        self._fd = os.open(_KCOV, os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(self._fd, _INIT_TRACE, _WORDS)
        address = syscalls.mmap(0, _WORDS * 8, syscalls.PROT_RW, syscalls.MAP_SHARED, self._fd, 0)
        self._words = memoryview((ctypes.c_char * (_WORDS * 8)).from_address(address)).cast("B").cast("Q")
        self._starts, self._wanted = _symbols(set(functions))
        self._known: set[int] = set()
        #: the places in these functions
        self.reached: set[int] = set()

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Note what this task reaches in the block."""
        self._words[0] = 0
        fcntl.ioctl(self._fd, _ENABLE, _TRACE_PC)
        try:
            yield
        finally:
            fcntl.ioctl(self._fd, _DISABLE, 0)
        new = set(self._words[1 : self._words[0] + 1]) - self._known
        self._known |= new
        self.reached.update(each for each in new if self._wanted[bisect(self._starts, each) - 1])


def _symbols(functions: set[str]) -> tuple[list[int], list[bool]]:
    """The first address of each function, and whether it is one of those."""
    lines = [line.split() for line in Path("/proc/kallsyms").read_text().splitlines()]
    found = sorted((int(words[0], 16), words[2].split(".")[0] in functions) for words in lines if words[1] in "tT")
    return [address for address, _ in found], [wanted for _, wanted in found]


def main(exchange: Exchange, _data: dict[str, Any]) -> None:
    """Answer the host until it sends an empty order."""
    exchange.say({"kinds": kinds()})
    coverage = Coverage(exchange.hear()["functions"])
    executor, failed = Executor(), 0
    with settings(), own_group():
        while order := exchange.hear():
            for data in order["programs"]:
                with coverage.collecting():
                    failed += executor.run(language.from_wire(data)).failure is not None
            exchange.say({"reached": len(coverage.reached), "failed": failed})
