# SPDX-License-Identifier: GPL-2.0
"""Reads a kernel's processes and VMAs from a guest's memory. Memory may be corrupt, so every loop has an end."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from harness import arch
from harness.audit.chain import Endless, chain
from harness.audit.layout import Layout
from harness.audit.memory import DumpError, Facts, Image, Memory, Unreadable
from harness.audit.pagetable import Format

#: levels of a maple tree; with ten entries in each node, so many levels hold more VMAs than there are addresses
_MOST_DEPTH = 16

_MASK = (1 << 64) - 1

#: VMA flags from include/linux/mm.h; they are the same in all kernels that can be audited
VM_SHARED = 0x8
VM_PFNMAP = 0x400
VM_IO = 0x4000
VM_HUGETLB = 0x400000
VM_SOFTDIRTY = 0x8000000
VM_MIXEDMAP = 0x10000000


@dataclass(frozen=True, slots=True)
class Vma:
    """A vm_area_struct."""

    #: the address of the vm_area_struct
    at: int
    start: int
    end: int
    mm: int
    flags: int
    pgoff: int
    #: the index of its first anonymous page; equals ``pgoff``, except for private file mappings from 7.3 on
    anon_pgoff: int
    anon_vma: int
    ops: int
    file: int
    policy: int = 0
    name: int = 0
    uffd: int = 0

    def index(self, address: int, page_shift: int) -> int:
        """The index of the anonymous page at an address.

        :param page_shift: log2 of the kernel's page size.
        """
        return self.anon_pgoff + (address - self.start >> page_shift)

    def last(self, page_shift: int) -> int:
        """The index of its last anonymous page.

        :param page_shift: log2 of the kernel's page size.
        """
        return self.anon_pgoff + (self.end - self.start >> page_shift) - 1

    def __str__(self) -> str:
        return f"{self.start:x}-{self.end:x}"


@dataclass(frozen=True, slots=True)
class Process:
    """An address space and the process it belongs to."""

    #: 0 if no task holds the address space, because the process is starting or exiting
    pid: int
    #: the process ID of its parent
    parent: int
    comm: str
    #: the address of the mm_struct
    mm: int
    #: the IDs of other processes that share the address space, after vfork() or clone() with CLONE_VM
    sharing: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.comm}[{self.pid}]" if self.pid else f"a starting or exiting process (mm {self.mm:#x})"


class Kernel:
    """The kernel of a guest that stands still.

    :param image: the guest's memory.
    :param layout: the structure layout of the kernel build that runs in it.
    :raises DumpError: if the layout is of another build, or the memory is damaged.
    """

    def __init__(self, image: Image, layout: Layout) -> None:
        self.layout = layout
        self.facts = Facts.parse(image.vmcoreinfo)
        facts = self.facts
        architecture = arch.find(layout.arch)
        if architecture.page_tables is None:
            raise DumpError(f"there is no audit on {architecture}")
        self._form = architecture.page_tables
        if image.machine not in (0, architecture.elf_machine):
            raise DumpError(f"the dump is of another machine: the vmlinux is for {layout.arch}")
        if not facts.build_id:
            raise DumpError("the dump's VMCOREINFO note has no BUILD-ID: kernels before 5.10 cannot be audited")
        if facts.build_id != layout.build_id:
            raise DumpError(
                f"the dump is not of this vmlinux: its kernel is {facts.release}, build ID {facts.build_id}, and the "
                f"vmlinux has build ID {layout.build_id}. Give the vmlinux of the dump's kernel"
            )
        self.page_size = facts.page_size
        self.page_shift = facts.page_size.bit_length() - 1
        self._slide = facts.number("KERNELOFFSET", 0)
        translation = self._form.translation(facts)
        if not 32 < translation.bits <= self._form.most_bits:
            raise DumpError(f"the dump's VMCOREINFO note is damaged: {translation.bits} bits of virtual addresses")
        self.tables = Format(self._form, self.page_shift, translation.bits)
        self.memory = Memory(image, self.tables, translation.root & _MASK, (1 << translation.bits) - 1)
        self._vmemmap = self._find_vmemmap()
        self._parse_vma = self._vma_parser()

    def symbol(self, name: str) -> int:
        """The address of a variable; 0 if the kernel has no variable of that name."""
        address = self.layout.symbols.get(name, 0)
        return address + self._slide & _MASK if address else 0

    def _find_vmemmap(self) -> int:
        def variable(name: str) -> int:
            return self.memory.u64(self.symbol(name))

        try:
            return self._form.vmemmap(self.facts, self.layout.sizes["page"], variable) & _MASK
        except Unreadable as error:
            raise DumpError(f"the kernel's memory map cannot be found in the dump ({error}): it is damaged") from error

    def page(self, pfn: int) -> int:
        """The address of the struct page of a frame number."""
        return self._vmemmap + pfn * self.layout.sizes["page"] & _MASK

    def pfn(self, page: int) -> int:
        """The frame number of a struct page."""
        return (page - self._vmemmap) // self.layout.sizes["page"]

    # --- processes ---------------------------------------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """Every user address space that a task holds, once each.

        :raises DumpError: if the list of tasks cannot be followed.
        """
        layout, memory = self.layout, self.memory
        first = self.symbol("init_task")
        tasks = layout["task_struct.tasks"]
        found: dict[int, Process] = {}
        # A kernel thread that calls the firmware uses the firmware's address space for a moment. That one has page
        # tables, but never a VMA (arch_efi_call_virt_setup(), arch/arm64/kernel/efi.c).
        firmware = self.symbol("efi_mm")
        try:
            # init_task, which has no user memory, is the head of the list.
            for link in chain(memory.u64(first + tasks), memory.u64, first + tasks):
                task = link - tasks
                mm = self._mm_of(task)
                if mm in (0, firmware):
                    continue
                pid = memory.s32(task + layout["task_struct.pid"])
                if mm in found:
                    found[mm] = replace(found[mm], sharing=(*found[mm].sharing, pid))
                else:
                    parent = memory.u64(task + layout["task_struct.real_parent"])
                    comm = memory.read(task + layout["task_struct.comm"], 16).split(b"\0")[0]
                    name = "".join(c if c.isprintable() else "?" for c in comm.decode(errors="replace"))
                    ppid = memory.s32(parent + layout["task_struct.pid"])
                    found[mm] = Process(pid, ppid, name, mm)
        except Endless as error:
            raise DumpError(f"the list of tasks does not end ({error}): the dump is damaged") from error
        except Unreadable as error:
            raise DumpError(f"the list of tasks leads out of memory ({error}): the dump is damaged") from error
        if not found:
            raise DumpError("the dump has no user process, so there is nothing to audit: take it while processes run")
        return list(found.values())

    def _mm_of(self, leader: int) -> int:
        """The address space of a process, also if its first thread has exited; 0 for a kernel thread."""
        layout, memory = self.layout, self.memory
        mm = memory.u64(leader + layout["task_struct.mm"])
        if mm:
            return mm
        node = layout["task_struct.thread_node"]
        head = memory.u64(leader + layout["task_struct.signal"]) + layout["signal_struct.thread_head"]
        for link in chain(memory.u64(head), memory.u64, head):
            mm = memory.u64(link - node + layout["task_struct.mm"])
            if mm:
                return mm
        return 0

    # --- VMAs --------------------------------------------------------------------------------------------------------

    def vmas(self, mm: int) -> list[Vma]:
        """The VMAs of an address space, in order of their addresses.

        :param mm: the address of the mm_struct.
        :raises Unreadable: if their tree cannot be read.
        :raises DumpError: if the tree has a loop.
        """
        layout = self.layout
        root = self.memory.u64(mm + layout["mm_struct.mm_mt"] + layout["maple_tree.ma_root"])
        return [self.vma(at) for at in self._entries(root, _MASK, 0, set())]

    def _entries(self, node: int, upper: int, depth: int, seen: set[int]) -> Iterator[int]:
        """The entries below a node of a maple tree (include/linux/maple_tree.h)."""
        if depth == 0 and (node & 3 != 2 or node < 4096):  # not xa_is_node(): an entry that is the whole tree, or none
            if node:
                yield node
            return
        layout, kind, at = self.layout, node >> 3 & 15, node & ~255
        if depth > _MOST_DEPTH or at in seen:
            raise DumpError(f"a VMA tree does not end, or reaches its node at {at:#x} twice: the dump is damaged")
        seen.add(at)
        if kind not in (1, 2, 3):  # maple_leaf_64, maple_range_64, maple_arange_64
            raise DumpError(f"a VMA tree has a node of unknown type {kind}: the dump is damaged")
        name, count = ("maple_arange_64", layout.slots[1]) if kind == 3 else ("maple_range_64", layout.slots[0])
        data = self.memory.read(at, 256)
        pivots = struct.unpack_from(f"<{count - 1}Q", data, layout[f"{name}.pivot"])
        slots = struct.unpack_from(f"<{count}Q", data, layout[f"{name}.slot"])
        for index, slot in enumerate(slots):
            pivot = pivots[index] if index < count - 1 else upper
            if (pivot == 0 and index > 0) or pivot > upper:
                pivot = upper
            if kind == 1:
                if slot > 4096:
                    yield slot
            elif slot:
                yield from self._entries(slot, pivot, depth + 1, seen)
            if pivot >= upper:
                return

    def vma(self, at: int) -> Vma:
        """Read the vm_area_struct at an address.

        :raises Unreadable: if there is no memory at that address.
        """
        return self._parse_vma(at)

    def _vma_parser(self) -> Callable[[int], Vma]:
        layout, memory = self.layout, self.memory
        size = layout.sizes["vm_area_struct"]
        names = ("vm_start", "vm_end", "vm_mm", "vm_flags", "vm_pgoff", "anon_vma", "vm_ops", "vm_file")
        places = [layout[f"vm_area_struct.{name}"] for name in names]
        further = ("vm_policy", "anon_name", "vm_userfaultfd_ctx")
        optional = [layout.offsets.get(f"vm_area_struct.{name}") for name in further]
        low = layout.offsets.get("vm_area_struct.__vm_anon_pgoff_lo")
        high = layout.offsets.get("vm_area_struct.__vm_anon_pgoff_hi")
        u64, u32 = struct.Struct("<Q").unpack_from, struct.Struct("<I").unpack_from

        def parse(at: int) -> Vma:
            data = memory.read(at, size)
            start, end, mm, flags, pgoff, anon_vma, ops, file = (u64(data, place)[0] for place in places)
            anon_pgoff = pgoff
            if low is not None:
                anon_pgoff = u32(data, low)[0] | (u32(data, high)[0] << 32 if high is not None else 0)
            policy, name, uffd = (u64(data, place)[0] if place is not None else 0 for place in optional)
            return Vma(at, start, end, mm, flags, pgoff, anon_pgoff, anon_vma, ops, file, policy, name, uffd)

        return parse

    # --- locks -------------------------------------------------------------------------------------------------------

    def locked_for_writing(self, semaphore: int) -> bool:
        """Whether an rw_semaphore has a writer (bit 0 of its count, kernel/locking/rwsem.c)."""
        return bool(self.memory.u64(semaphore + self.layout["rw_semaphore.count"]) & 1)

    def locked(self, semaphore: int) -> bool:
        """Whether an rw_semaphore has a writer (bit 0 of its count) or readers (counted from bit 8 on)."""
        count = self.memory.u64(semaphore + self.layout["rw_semaphore.count"])
        return bool(count & 1 or count >> 8)

    def mmap_write_locked(self, mm: int) -> bool:
        """Whether the mmap_lock of an address space is held for writing.

        :raises Unreadable: if there is no memory at that address.
        """
        return self.locked_for_writing(mm + self.layout["mm_struct.mmap_lock"])

    @cached_property
    def ksm_at_work(self) -> bool:
        """Whether ksm_thread_mutex is held. KSM merges pages and changes its lists under it (mm/ksm.c).

        False if the layout of a mutex is not known.
        """
        mutex = self.symbol("ksm_thread_mutex")
        if not mutex or not self.layout.has("mutex.owner"):
            return False
        try:
            return bool(self.memory.u64(mutex + self.layout["mutex.owner"]))
        except Unreadable:
            return False

    def held(self, mm: int) -> bool:
        """Whether the mmap_lock of an address space is held for reading or writing; False if it cannot be read."""
        try:
            return self.locked(mm + self.layout["mm_struct.mmap_lock"])
        except Unreadable:
            return False

    def read_locked(self, vma: Vma) -> bool:
        """Whether the lock of a single VMA is held for reading, as page faults and madvise() do instead of mmap_lock.

        False if the kernel has no such lock, or it cannot be read.
        """
        layout, memory = self.layout, self.memory
        count, lock = layout.offsets.get("vm_area_struct.vm_refcnt"), layout.offsets.get("vm_area_struct.vm_lock")
        try:
            if count is not None:  # 1 for the VMA tree, and 1 for each reader
                return memory.u32(vma.at + count) > 1
            if lock is not None and layout.has("vma_lock.lock"):
                return self.locked(memory.u64(vma.at + lock) + layout["vma_lock.lock"])
        except Unreadable:
            pass
        return False

    # --- KSM ---------------------------------------------------------------------------------------------------------

    def ksm_slots(self) -> Iterator[int]:
        """The addresses of all ksm_mm_slots: KSM has one for each address space that it scans.

        :raises Unreadable: if the list cannot be read, or does not end.
        """
        head = self.symbol("ksm_mm_head")
        if not head or not self.layout.has("ksm_mm_slot.slot"):
            return
        node = self.layout["ksm_mm_slot.slot"] + self.layout["mm_slot.mm_node"]
        for link in chain(self.memory.u64(head + node), self.memory.u64, head + node):
            yield link - node
