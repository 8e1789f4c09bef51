# SPDX-License-Identifier: GPL-2.0
"""Checks the list of anon_vma_chains that links each VMA to its anon_vmas."""

from __future__ import annotations

from harness.audit.chain import Endless, chain
from harness.audit.context import Context
from harness.audit.kernel import Process, Vma
from harness.audit.memory import Unreadable
from harness.audit.rmap import AnonVma, Link


class VmaLinkChecks:
    """Checks the lists of VMAs, and remembers what they held."""

    def __init__(self, context: Context) -> None:
        self._context = context
        #: VMAs whose list was followed to its end
        self._followed: set[int] = set()
        #: anon_vma_chains that were in one of the lists
        self._listed: set[int] = set()

    def may_list(self, link: Link) -> bool:
        """Whether the list of the link's VMA holds the link; True if that list could not be read to its end."""
        return link.vma.at not in self._followed or link.at in self._listed

    def check(self, process: Process, vma: Vma) -> frozenset[int]:
        """Check the list of one VMA; returns the anon_vmas that the VMA is linked to.

        The first fault in a VMA stores its anon_vma and then links it. It holds mmap_lock for reading only, but holds
        the lock of the anon_vma for writing (__anon_vma_prepare(), mm/rmap.c).
        """
        layout, memory, ledger = self._context.layout, self._context.memory, self._context.ledger
        head = vma.at + layout["vm_area_struct.anon_vma_chain"]
        found: list[int] = []
        try:
            for link in chain(memory.u64(head), memory.u64, head):
                anon_vma = self._check_link(process, vma, link - layout["anon_vma_chain.same_vma"], found)
                if anon_vma is not None:
                    found.append(anon_vma.at)
            self._followed.add(vma.at)
        except Endless as error:
            ledger.broken_links(
                process, vma, f"the anon_vma_chain list of VMA {vma} of {process} does not end: {error}"
            )
        except Unreadable as error:
            ledger.unreadable(f"the anon_vma_chain list of VMA {vma} of {process}", error, process, vma)
        if vma.anon_vma and vma.anon_vma not in found:
            own = self._context.rmap.anon_vma(vma.anon_vma)
            ledger.broken_links(
                process,
                vma,
                f"VMA {vma} of {process} adds new pages to anon_vma {vma.anon_vma:#x}, but is not linked to it",
                tree_locked=own is not None and self._context.rmap.locked(own),
            )
        return frozenset(found)

    def _check_link(self, process: Process, vma: Vma, at: int, found: list[int]) -> AnonVma | None:
        """Check one anon_vma_chain of a VMA; returns its anon_vma, or None if that cannot be read.

        :param at: the address of the anon_vma_chain.
        :param found: the anon_vmas of the links before it.
        """
        layout, memory, ledger = self._context.layout, self._context.memory, self._context.ledger
        link = f"the anon_vma_chain at {at:#x} in the list of VMA {vma} of {process}"
        if memory.u64(at + layout["anon_vma_chain.vma"]) != vma.at:
            ledger.broken_links(process, vma, f"{link} points to another VMA")
        self._listed.add(at)
        anon_vma = self._context.rmap.anon_vma(memory.u64(at + layout["anon_vma_chain.anon_vma"]))
        if anon_vma is None:
            ledger.broken_links(process, vma, f"{link} does not point to an anon_vma")
            return None
        if anon_vma.at in found:
            ledger.broken_links(
                process,
                vma,
                f"VMA {vma} of {process} is linked to anon_vma {anon_vma.at:#x} twice, by the anon_vma_chain at "
                f"{at:#x} and by another one: rmap walks visit its pages twice",
                tree_locked=self._context.rmap.locked(anon_vma),
            )
        if at + layout["anon_vma_chain.rb"] not in anon_vma.links:
            ledger.broken_links(
                process,
                vma,
                f"{link} is not in the interval tree of its anon_vma {anon_vma.at:#x}: rmap walks cannot find the "
                "pages of this VMA",
                tree_locked=self._context.rmap.locked(anon_vma),
            )
        return anon_vma
