# SPDX-License-Identifier: GPL-2.0
"""Memory control groups, version 2 (CONFIG_MEMCG), at /sys/fs/cgroup.

::

    with Memcg() as group:
        group.enter()
        mapping = ...          # charged to the group
        group.reclaim(mapping.length)
"""

from __future__ import annotations

import errno
import itertools
import os
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from guest_tests.mm.waiting import wait_until

ROOT: Final = Path("/sys/fs/cgroup")

_serial = itertools.count()


def available() -> bool:
    """Whether version 2 is mounted and has the memory controller."""
    try:
        return "memory" in (ROOT / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def require_memcg() -> None:
    """Skip the test where there is no memory controller."""
    if not available():
        pytest.skip(f"needs CONFIG_MEMCG and cgroup version 2 mounted at {ROOT}, with the memory controller")


def current(pid: int | str = "self") -> Path:
    """The directory of the group that a process is in."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return ROOT / line[3:].lstrip("/")
    raise LookupError(f"process {pid} is in no group of version 2")


class Memcg:
    """A group of its own below the root. In the end its processes go back and it is removed.

    What a process had charged before it entered stays charged to its old group.
    """

    def __init__(self, name: str = "mm") -> None:
        self.path = ROOT / f"{name}-{os.getpid()}-{next(_serial)}"
        self._came_from: dict[int, Path] = {}

    def __enter__(self) -> Self:
        (ROOT / "cgroup.subtree_control").write_text("+memory")
        self.path.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.remove()

    def enter(self, pid: int = 0) -> None:
        """Move a process (0: this one) into the group; what it allocates from now on is charged to it."""
        pid = pid or os.getpid()
        self._came_from.setdefault(pid, current(pid))
        self._write("cgroup.procs", pid)

    def leave(self, pid: int = 0) -> None:
        """Move a process (0: this one) back to where it came from; its charges stay."""
        pid = pid or os.getpid()
        (self._came_from.pop(pid, ROOT) / "cgroup.procs").write_text(str(pid))

    def remove(self) -> None:
        """Move all processes back and remove the group.

        :raises TimeoutError: if the kernel does not let go of it.
        """
        for pid in self.processes():
            try:
                self.leave(pid)
            except ProcessLookupError:
                continue
        wait_until(self._gone, f"the removal of {self.path}")

    def _gone(self) -> bool:
        try:
            self.path.rmdir()
        except OSError as error:
            # Processes that died but were not reaped yet keep it busy for a moment.
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    def processes(self) -> list[int]:
        """Who is in the group."""
        return [int(line) for line in self._read("cgroup.procs").split()]

    @property
    def current(self) -> int:
        """Bytes charged to the group (memory.current)."""
        return int(self._read("memory.current"))

    @property
    def swap_current(self) -> int:
        """Bytes of the group that are in swap (memory.swap.current; CONFIG_SWAP)."""
        return int(self._read("memory.swap.current"))

    def set_max(self, limit: int | None) -> None:
        """Limit the group to that many bytes (memory.max); None for no limit."""
        self._write("memory.max", "max" if limit is None else limit)

    def set_high(self, limit: int | None) -> None:
        """Reclaim above that many bytes (memory.high); None for no limit."""
        self._write("memory.high", "max" if limit is None else limit)

    def set_swap_max(self, limit: int | None) -> None:
        """Limit the group to that many bytes of swap (memory.swap.max); None for no limit, 0 for no swap."""
        self._write("memory.swap.max", "max" if limit is None else limit)

    def reclaim(self, length: int) -> bool:
        """Have the kernel reclaim ``length`` bytes from the group (memory.reclaim, 5.19).

        :returns: whether it got that much; False (EAGAIN) still means that it reclaimed what it could.
        :raises FileNotFoundError: before 5.19.
        """
        try:
            self._write("memory.reclaim", length)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return False
            raise
        return True

    def events(self) -> dict[str, int]:
        """memory.events: ``low``, ``high``, ``max``, ``oom``, ``oom_kill`` …."""
        return self._pairs("memory.events")

    def stat(self) -> dict[str, int]:
        """memory.stat: ``anon``, ``pgsteal``, ``pswpout`` …, bytes or events."""
        return self._pairs("memory.stat")

    def _pairs(self, name: str) -> dict[str, int]:
        pairs = (line.split() for line in self._read(name).splitlines())
        return {key: int(value) for key, value in pairs}

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def _write(self, name: str, value: int | str) -> None:
        with open(self.path / name, "w") as file:
            file.write(str(value))
