# SPDX-License-Identifier: GPL-2.0
"""A scene for the audit: a process with memory of every kind in a real guest, and small dumps of that guest.

``python -m tests.audit_scene SPEC ARCH VMLINUX`` writes a dump below ``tests/audit_dumps``, for tests that boot no
guest. It is an ELF dump that holds only the memory which an audit reads: page tables and the kernel's structures, but
no page of any process.
"""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zstandard

from harness import arch
from harness.agent import protocol
from harness.audit import dump, layout, memory, walk
from harness.deadline import Deadline
from harness.guests.fleet import Fleet
from harness.kernels import grammar, kernel
from harness.machine import provision
from harness.machine.payload import tests_archive
from harness.machine.vm import Vm
from harness.markers import MARKERS
from harness.options import MachineOptions

DUMPS = Path(__file__).parent / "audit_dumps"

#: a test that leaves behind a process with memory of every kind, and a child of that process
SOURCE = """
    import ctypes

    from guest_tests.support import ksm_scenes
    from guest_tests.mm.ksm import Ksm
    from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, move
    from guest_tests.mm.proctree import Child
    from guest_tests.mm import pagemap, syscalls

    PAGES = @pages@
    KEPT = []
    HUGE = 2 << 20

    def build(pages):
        area = CarveOut(60)
        with Ksm() as controlled:
            pair = ksm_scenes.hugh(area, controlled, dontfork=False)
            moved = move(area.map(10, 6).fill().part(2, 2), area.page(20))
            stayed = area.map(30, 4).fill(seed=1)
            joined = area.map(40, 2).fill(seed=2), move(area.map(50, 2).fill(seed=3), area.page(42))
            controlled.stop()
        address = syscalls.mmap(0, 2 * HUGE, 3, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS)
        huge = (address + HUGE - 1) & -HUGE
        syscalls.madvise(huge, HUGE, 14)
        ctypes.memset(huge, 1, HUGE)
        if pages:
            KEPT.append(CarveOut(pages))
            KEPT[-1].map(0, pages).fill(seed=4)
        KEPT.extend([area, Child(outlive_parent=True)])
        return {
            "page_size": PAGE_SIZE,
            "ksm": [pair.stayed.address, pair.moved.address],
            "moved": moved.page_addresses,
            "stayed": stayed.page_addresses,
            "apart": joined[1].address,
            "huge": huge,
            "child": KEPT[-1].pid,
            "pfns": {str(at): pagemap.entry(at).pfn for at in [pair.stayed.address, *moved.page_addresses]},
        }

    def test_scene(record_property):
        process = Child(outlive_parent=True)
        record_property("scene", {"pid": process.pid} | process.call(build, PAGES))
"""


@dataclass(frozen=True)
class Scene:
    """Where things are in the scene. Addresses are those of its process."""

    pid: int
    #: a process that inherited all of it by fork
    child: int
    page_size: int
    #: the two addresses of one KSM page: one that never moved, and one where it was moved before it merged again
    ksm: list[int]
    #: addresses of pages that were moved
    moved: list[int]
    #: addresses of pages that were not moved
    stayed: list[int]
    #: a mapping that was moved next to another one, and did not merge with it
    apart: int
    #: a transparent huge page, if the kernel made one
    huge: int
    #: address to frame number, as the guest itself saw it
    pfns: dict[str, int]


@contextlib.contextmanager
def standing(spec: str, wanted: str, pages: int = 0) -> Iterator[tuple[Vm, Scene]]:
    """A running guest with the scene in it, and with a mapping of ``pages`` more pages."""
    chosen = grammar.parse(spec, arch.find(wanted))
    assert isinstance(chosen, kernel.BootSpec)
    _, machine = provision.provision(chosen, MachineOptions(), lambda message: None)
    with tempfile.TemporaryDirectory() as directory:
        tests = Path(directory) / "scene"
        tests.mkdir()
        (tests / "test_scene.py").write_text(textwrap.dedent(SOURCE).replace("@pages@", str(pages)))
        archive = tests_archive(tests, MARKERS)
    fleet = Fleet(machine, archive, ["scene"], False, lambda message: None)
    try:
        guest, collected = fleet.fresh()
        assert guest.vm is not None
        with guest.vm as vm:
            assert isinstance(vm, Vm)
            properties: dict[str, Any] = {}
            run = protocol.Run(collected.nodeids[0], "", "scene")
            for answer in guest.run(run, Deadline.after(60 * machine.accelerator.slowdown)):
                if isinstance(answer, dict):
                    assert answer["outcome"] == "passed", answer["longrepr"]
                    properties |= dict(answer["user_properties"])
            yield vm, Scene(**properties["scene"])
    finally:
        fleet.close()


class _Noting(memory.Image):
    """Another image, with a record of what was read from it."""

    def __init__(self, image: memory.Image) -> None:
        self._image = image
        self.vmcoreinfo, self.machine = image.vmcoreinfo, image.machine
        self.units: dict[int, bytes] = {}

    def unit(self, number: int) -> tuple[Any, int]:
        buffer, offset = self._image.unit(number)
        self.units[number] = bytes(buffer[offset : offset + memory.UNIT])
        return buffer, offset

    def close(self) -> None:
        pass


def small_elf(units: dict[int, bytes], vmcoreinfo: bytes, machine: int) -> bytes:
    """An ELF dump that holds these units of memory, by number."""
    runs: list[tuple[int, bytearray]] = []
    for number in sorted(units):
        if runs and runs[-1][0] + len(runs[-1][1]) // memory.UNIT == number:
            runs[-1][1].extend(units[number])
        else:
            runs.append((number, bytearray(units[number])))
    note = struct.pack("<III12s", 11, len(vmcoreinfo), 0, b"VMCOREINFO\0") + vmcoreinfo
    note += bytes(-len(note) % 4)
    count = len(runs) + 1
    offset = 64 + 56 * count
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 4, machine, 1, 0, 64, 0, 0, 64, 56, count, 0, 0, 0)
    headers = [struct.pack("<IIQQQQQQ", 4, 0, offset, 0, 0, len(note), len(note), 0)]
    body = [note]
    offset += len(note)
    for number, data in runs:
        at = number * memory.UNIT
        headers.append(struct.pack("<IIQQQQQQ", 1, 7, offset, 0, at, len(data), len(data), 0))
        body.append(bytes(data))
        offset += len(data)
    return header + b"".join(headers) + b"".join(body)


def main(spec: str, wanted: str, vmlinux: str) -> None:
    """Make one small dump."""
    known = layout.read(Path(vmlinux))
    with standing(spec, wanted) as (vm, scene), dump.memory_of(vm, Deadline.after(60)) as image:
        noting = _Noting(image)
        audit = walk.audit(noting, known)
        print(audit.report())
        assert not audit.discrepancies
    DUMPS.mkdir(exist_ok=True)
    name = f"{known.arch}-{audit.release.split('+')[0]}"
    data = small_elf(noting.units, noting.vmcoreinfo, noting.machine)
    (DUMPS / f"{name}.elf.zst").write_bytes(zstandard.ZstdCompressor(19).compress(data))
    (DUMPS / f"{name}.layout.json").write_text(known.to_json())
    (DUMPS / f"{name}.scene.json").write_text(json.dumps(vars(scene)))
    print(f"{name}: {len(data) >> 10} KiB")


if __name__ == "__main__":
    main(*sys.argv[1:])
