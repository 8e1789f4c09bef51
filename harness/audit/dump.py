# SPDX-License-Identifier: GPL-2.0
"""Gets at the memory of a running guest: as a dump in a file, or in place while the guest stands still.

In place is the quick way: QEMU is our child, so its memory can be read through /proc, page by page as the audit asks.
A dump of a 640 MiB guest writes 640 MiB first. The kernel's own description of itself (VMCOREINFO) comes in both cases
from a dump; in place, from one of a single page.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.audit.formats import opened
from harness.audit.memory import UNIT, DumpError, ElfImage, Image, Unreadable
from harness.deadline import Deadline
from harness.machine import qemu
from harness.machine.qmp import QmpFailed
from harness.machine.vm import Vm

#: units kept, of 4 KiB
_MOST_KEPT = 1 << 14


@contextlib.contextmanager
def standing_still(vm: Vm, deadline: Deadline) -> Iterator[None]:
    """Freeze a guest between two instructions, and let it go on afterwards if it was running."""
    running = bool(vm.qmp.execute("query-status", deadline)["running"])
    if running:
        vm.stop(deadline)
    try:
        yield
    finally:
        if running:
            vm.run(deadline)


def take(vm: Vm, path: Path, deadline: Deadline, *, compressed: bool = False) -> None:
    """Write a guest's memory to a file. The guest stands still meanwhile.

    :param path: overwritten; 640 MiB for a guest of that size.
    :param compressed: a tenth of the size, to be kept.
    :raises QmpFailed: if QEMU cannot write it.
    """
    form = {"format": "kdump-zlib"} if compressed else {}
    with standing_still(vm, deadline):
        vm.qmp.execute("dump-guest-memory", deadline, paging=False, protocol=f"file:{path}", **form)


@contextlib.contextmanager
def memory_of(vm: Vm, deadline: Deadline) -> Iterator[Image]:
    """The memory of a guest, which stands still until this ends: in place if this host allows, else from a dump.

    :raises DumpError: if the guest's kernel has not described itself.
    :raises QmpFailed: if QEMU cannot dump.
    """
    with standing_still(vm, deadline), tempfile.TemporaryDirectory(prefix="audit-", dir=_roomy()) as directory:
        path = Path(directory) / "dump"
        # The smallest dump there is, for its notes.
        begin = vm.machine.arch.ram_at
        vm.qmp.execute("dump-guest-memory", deadline, paging=False, protocol=f"file:{path}", begin=begin, length=UNIT)
        with opened(path) as notes:
            vmcoreinfo, machine = notes.vmcoreinfo, notes.machine
        try:
            image: Image = InPlace(vm, vmcoreinfo, machine, deadline)
        except (OSError, QmpFailed, DumpError):
            vm.qmp.execute("dump-guest-memory", deadline, paging=False, protocol=f"file:{path}")
            image = ElfImage(path)
        try:
            yield image
        finally:
            image.close()


def _roomy() -> Path:
    shm = Path("/dev/shm")
    return shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())


class InPlace(Image):
    """The memory of a guest that stands still, read from QEMU's.

    :raises OSError: if this host does not let us read the memory of our own child.
    :raises DumpError: if its RAM does not lie in QEMU as we think.
    """

    def __init__(self, vm: Vm, vmcoreinfo: bytes, machine: int, deadline: Deadline) -> None:
        self.vmcoreinfo = vmcoreinfo
        self.machine = machine
        self._units: dict[int, bytes] = {}
        size = (vm.machine.memory << 20) // qemu.NODES
        begin = vm.machine.arch.ram_at
        #: guest-physical start, end, and what to add for QEMU's address
        self._ranges = []
        for node in range(qemu.NODES):
            start = begin + node * size
            first, last = (_host_address(vm, at, deadline) for at in (start, start + size - UNIT))
            if last - first != size - UNIT:
                raise DumpError("the guest's memory has a hole where none was expected")
            self._ranges.append((start, start + size, first - start))
        self._memory = os.open(f"/proc/{vm.child.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def unit(self, number: int) -> tuple[Any, int]:
        """See :meth:`Image.unit`."""
        found = self._units.get(number)
        if found is None:
            address = number * UNIT
            for start, end, offset in self._ranges:
                if start <= address < end:
                    found = os.pread(self._memory, UNIT, address + offset)
                    break
            if found is None or len(found) != UNIT:
                raise Unreadable(address)
            if len(self._units) >= _MOST_KEPT:
                self._units.clear()
            self._units[number] = found
        return found, 0

    def close(self) -> None:
        """See :meth:`Image.close`."""
        os.close(self._memory)
        self._units.clear()


def _host_address(vm: Vm, address: int, deadline: Deadline) -> int:
    """Where QEMU keeps the byte at a guest-physical address."""
    said = str(vm.qmp.execute("human-monitor-command", deadline, command_line=f"gpa2hva {address:#x}"))
    match = re.search(r"is (0x[0-9a-f]+)", said)
    if match is None:
        raise DumpError(f"QEMU does not say where it keeps the guest's memory: {said.strip()[:200]!r}")
    return int(match[1], 16)
