# SPDX-License-Identifier: GPL-2.0
"""The address spaces of a guest and their VMAs, including those that no task or no VMA tree holds any more."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping

from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind
from harness.audit.kernel import Process, Vma
from harness.audit.ledger import Values, Where
from harness.audit.memory import DumpError, Unreadable


class AddressSpaces:
    """Every address space of a guest.

    :param pids: audit only these processes and their descendants; all processes if empty.
    :raises DumpError: if one of these processes does not exist, or the list of tasks is damaged.
    """

    def __init__(self, context: Context, pids: Collection[int]) -> None:
        self._context = context
        #: whether all processes are audited
        self.whole = not pids
        #: by address of the mm_struct
        self.processes: dict[int, Process] = {each.mm: each for each in context.kernel.processes()}
        #: by address of the vm_area_struct
        self.vmas: dict[int, Vma] = {}
        self._selected = set(self.processes) if self.whole else _family(self.processes, pids)
        self._vmas_of: dict[int, list[Vma]] = {}
        #: address spaces whose VMA tree cannot be read
        self._unread: set[int] = set()

    def read(self) -> None:
        """Read all VMAs, and tell the ledger which address spaces are being changed."""
        for process in list(self.processes.values()):
            try:
                vmas = self._context.kernel.vmas(process.mm)
            except Unreadable as error:
                self._context.ledger.unreadable(f"the VMA tree of {process}", error, process)
                vmas = []
                self._unread.add(process.mm)
            self._note_space(process, vmas)
        self._find_detached()
        changing = {mm for mm, process in self.processes.items() if self._is_changing(process)}
        self._context.ledger.unsettled = changing | self._unread

    def to_audit(self) -> Iterator[Process]:
        """The processes whose page tables are to be audited.

        A process without a readable VMA tree is not among them: every entry of it would look like a stray one.
        """
        for mm, process in self.processes.items():
            if mm not in self._unread and (mm in self._selected or (self.whole and not process.pid)):
                yield process

    def of(self, process: Process) -> list[Vma]:
        """The VMAs of a process, in order of their addresses."""
        return self._vmas_of[process.mm]

    def _note_space(self, process: Process, vmas: list[Vma]) -> None:
        self.processes[process.mm] = process
        self._vmas_of[process.mm] = vmas
        self.vmas |= {vma.at: vma for vma in vmas}
        for vma in vmas:
            if vma.mm != process.mm or vma.start >= vma.end:
                problem = f"belongs to mm {vma.mm:#x}" if vma.mm != process.mm else "does not end after its start"
                self._context.ledger.add(
                    DiscrepancyKind.BROKEN_CHAIN,
                    Where(vma.at, process, vma),
                    Values(expected=f"a VMA of mm {process.mm:#x}", actual=f"mm {vma.mm:#x}, {vma}"),
                    f"the VMA tree of {process} holds the VMA {vma} at {vma.at:#x}, which {problem}",
                )

    def _find_detached(self) -> None:
        """Find address spaces that no task holds, and VMAs that no VMA tree holds.

        Fork and exit make such address spaces, and munmap() makes such VMAs, for a moment. KSM and the anon_vmas
        still lead to them.
        """
        context = self._context
        slot = context.layout.offsets.get("mm_slot.mm")
        if slot is not None:
            # KSM holds the mm_struct of an exited process until ksmd visits it again (__ksm_exit(), mm/ksm.c).
            with contextlib.suppress(Unreadable):
                for at in context.kernel.ksm_slots():
                    self._read_detached(context.memory.u64(at + context.layout["ksm_mm_slot.slot"] + slot))
        queue = [vma.anon_vma for vmas in self._vmas_of.values() for vma in vmas if vma.anon_vma]
        while queue:
            at = queue.pop()
            if at in context.rmap.anon_vmas:
                continue
            anon_vma = context.rmap.anon_vma(at)
            if anon_vma is None or not anon_vma.links:
                continue
            # An anon_vma with VMAs in its tree keeps its parent alive, because these VMAs are in the parent's tree
            # too. KSM alone may hold an anon_vma that has no VMA; this does not keep the parent alive.
            queue.append(anon_vma.parent)
            for link in anon_vma.links.values():
                queue += self._follow(link.vma)

    def _follow(self, vma: Vma) -> list[int]:
        """Read the address space of a VMA that an anon_vma leads to; returns further anon_vmas to look at."""
        more = [each.anon_vma for each in self._read_detached(vma.mm) if each.anon_vma]
        if vma.at not in self.vmas and vma.mm in self.processes and self._context.kernel.held(vma.mm):
            # munmap() removes a VMA from the VMA tree first and from the anon_vmas last. In between it may hold
            # mmap_lock for reading only (vms_complete_munmap_vmas(), mm/vma.c).
            self.vmas[vma.at] = vma
            more += [vma.anon_vma] if vma.anon_vma else []
        return more

    def _read_detached(self, mm: int) -> list[Vma]:
        """Read an address space that no task holds; returns its VMAs if it was not read before."""
        if mm in self._vmas_of:
            return []
        # exit_mmap() frees the pages first, then unlinks the anon_vmas, and frees the VMA tree last. As long as an
        # anon_vma leads here, the VMA tree exists. Anything else at this address is reported as stale later.
        self._vmas_of[mm] = []
        with contextlib.suppress(Unreadable, DumpError):
            # During fork() the child's tree holds VMAs of the parent until they have been copied.
            own = [each for each in self._context.kernel.vmas(mm) if each.mm == mm]
            if own:
                self._note_space(Process(0, 0, "", mm), own)
        return self._vmas_of[mm]

    def _is_changing(self, process: Process) -> bool:
        """Whether a process is being forked, is exiting, or is changing its VMAs."""
        if not process.pid:
            return True
        try:
            return self._context.kernel.mmap_write_locked(process.mm)
        except Unreadable:
            return False


def _family(processes: Mapping[int, Process], pids: Collection[int]) -> set[int]:
    """The address spaces of some processes and of all their descendants.

    :raises DumpError: if one of the processes does not exist.
    """
    everybody = {mm: {each.pid, *each.sharing} for mm, each in processes.items()}
    missing = set(pids).difference(*everybody.values())
    if missing:
        raise DumpError(
            f"no process {', '.join(map(str, sorted(missing)))} with user memory exists in the guest at this moment. "
            "Give the IDs of processes that exist, or none to audit all"
        )
    selected = {mm for mm, own in everybody.items() if not own.isdisjoint(pids)}
    while True:
        known = {pid for mm in selected for pid in everybody[mm]}
        children = {mm for mm, each in processes.items() if each.parent in known} - selected
        if not children:
            return selected
        selected |= children
