# SPDX-License-Identifier: GPL-2.0
"""Small dumps of real guests, whose memory tests of the audit can change after opening them.

There is no broken kernel for most kinds of discrepancies. The tests change a dump instead, as such a kernel would.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from harness.audit import layout, walk
from harness.audit.discrepancies import DiscrepancyKind
from harness.audit.kernel import Kernel, Vma
from harness.audit.memory import ElfImage
from harness.audit.pagetable import EntryKind
from harness.audit.result import Audit
from harness.audit.rmap import AnonVma, Item, ReverseMap, StableNode
from tests.audit_scene import DUMPS, Scene

NAMES = ("x86_64-7.3.4", "arm64-6.12.117")


class Case:
    """An open dump of a real guest. Its memory can be changed; the file stays as it is."""

    def __init__(self, name: str, directory: Path) -> None:
        self.path = directory / name
        packed = (DUMPS / f"{name}.elf.zst").read_bytes()
        self.path.write_bytes(zstandard.ZstdDecompressor().decompress(packed))
        self.layout = layout.Layout.from_json((DUMPS / f"{name}.layout.json").read_text())
        self.scene = Scene(**json.loads((DUMPS / f"{name}.scene.json").read_text()))
        self.image = ElfImage(self.path)
        self.kernel = Kernel(self.image, self.layout)
        self.memory = self.kernel.memory
        self.rmap = ReverseMap(self.kernel)

    def audit(self, **options: object) -> Audit:
        return walk.audit(self.image, self.layout, **options)  # type: ignore[arg-type]

    def put(self, address: int, value: int, form: str = "<Q") -> None:
        """Change kernel memory."""
        buffer, offset = self.memory.where(address)
        struct.pack_into(form, buffer, offset, value)

    def member(self, at: int, name: str) -> int:
        return at + self.layout[name]

    def lock(self, semaphore: int, count: int = 1) -> None:
        """Give an rw_semaphore a writer (1), or readers (256 for each)."""
        self.put(self.member(semaphore, "rw_semaphore.count"), count)

    def lock_mm(self, pid: int, count: int = 1) -> None:
        self.lock(self.member(self.mm(pid), "mm_struct.mmap_lock"), count)

    def set_ksm_to_work(self) -> None:
        """Make ksm_thread_mutex look held, by using a word that is not 0 as its owner."""
        word = self.layout.symbols["init_task"] + self.layout["task_struct.tasks"] - self.layout["mutex.owner"]
        self.layout = replace(self.layout, symbols={**self.layout.symbols, "ksm_thread_mutex": word})

    def end(self, pid: int) -> None:
        """Take a process out of the list of tasks."""
        mm = self.mm(pid)
        tasks, task = self.layout["task_struct.tasks"], self.kernel.symbol("init_task")
        while self.memory.u64(task + self.layout["task_struct.mm"]) != mm:
            place, task = task + tasks, self.memory.u64(task + tasks) - tasks
        self.put(place, self.memory.u64(task + tasks))

    def detach(self, vma: Vma) -> None:
        """Take a VMA out of the tree of its process."""
        layout = self.layout
        nodes = [self.memory.u64(vma.mm + layout["mm_struct.mm_mt"] + layout["maple_tree.ma_root"])]
        while nodes:
            node = nodes.pop()
            kind = node >> 3 & 15
            name = "maple_arange_64" if kind == 3 else "maple_range_64"
            for index in range(layout.slots[kind == 3]):
                place = (node & ~255) + layout[f"{name}.slot"] + 8 * index
                slot = self.memory.u64(place)
                if slot == vma.at:
                    self.put(place, 0)
                    return
                if kind != 1 and slot >> 63:
                    nodes.append(slot)
        raise AssertionError(f"{vma} is not in the tree of VMAs")

    # --- what is in the scene

    def mm(self, pid: int) -> int:
        (mm,) = (each.mm for each in self.kernel.processes() if each.pid == pid)
        return mm

    def vma(self, address: int, pid: int | None = None) -> Vma:
        vmas = self.kernel.vmas(self.mm(pid or self.scene.pid))
        (vma,) = (each for each in vmas if each.start <= address < each.end)
        return vma

    def entry(self, address: int) -> int:
        """The page-table entry for a user address."""
        return int(struct.unpack("<Q", self.memory.physical(self.entry_place(address), 8))[0])

    def put_entry(self, address: int, value: int, pid: int | None = None) -> None:
        """Change a page-table entry."""
        place = self.entry_place(address, pid)
        buffer, offset = self.memory.unit(place >> 12)
        struct.pack_into("<Q", buffer, offset + (place & 4095), value)

    def entry_place(self, address: int, pid: int | None = None) -> int:
        """The physical address of the page-table entry for a user address."""
        tables, mm = self.kernel.tables, self.mm(pid or self.scene.pid)
        pgd = self.memory.u64(self.member(mm, "mm_struct.pgd"))
        table = self.memory.translate(pgd)
        for level in reversed(range(tables.levels)):
            place = table + 8 * tables.index(address, level)
            (value,) = struct.unpack("<Q", self.memory.physical(place, 8))
            entry = tables.decode(value, level)
            if entry.kind is not EntryKind.TABLE:
                break
            table = entry.pfn << tables.page_shift
        return place

    def pfn(self, address: int) -> int:
        return self.kernel.tables.decode(self.entry(address), 0).pfn

    def page(self, address: int) -> int:
        return self.kernel.page(self.pfn(address))

    def anon_vma(self, address: int) -> AnonVma:
        """The anon_vma that the page at an address points to."""
        found = self.rmap.anon_vma(self.memory.u64(self.member(self.page(address), "folio.mapping")) & ~3)
        assert found is not None
        return found

    def node(self) -> StableNode:
        at = self.memory.u64(self.member(self.page(self.scene.ksm[0]), "folio.mapping")) & ~3
        found = self.rmap.stable_node(at)
        assert found is not None
        return found

    def item(self, address: int) -> Item:
        (item,) = (each for each in self.node().items if each.address == address)
        return item


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    opened = Case(request.param, tmp_path)
    yield opened
    opened.image.close()


def errors_of(audit: Audit, kind: DiscrepancyKind) -> set[tuple[int, int | None]]:
    """Address and frame number of each error of one kind."""
    return {(each.address, each.pfn) for each in audit.errors if each.kind is kind}
