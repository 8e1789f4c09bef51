# SPDX-License-Identifier: GPL-2.0
"""A probe that declares a page lost, which the kernel has to tell every process that maps it."""

from __future__ import annotations

import os
from contextlib import ExitStack

from guest_tests.mm import sigbus, system
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.base import Answer, Probe
from guest_tests.mm.probes.place import Page, Place, changes, observe


class HwPoison(Probe):
    """Hard offline with early kill.

    Two walks happen. The first collects the processes to tell (collect_procs_ksm(), mm/ksm.c, or collect_procs_anon(),
    mm/memory-failure.c): each gets one SIGBUS, however many places it has, and the address in it must be one of these.
    The second unmaps (unmap_poisoned_folio()): every place must end as a poison entry for the frame. A place is found
    if both reached it. Reading it afterwards is fatal.
    """

    name = "hwpoison"
    consumes_pages = True

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`.

        Before 6.4 ("mm: ksm: support hwpoison for ksm page") hwpoison_user_mappings() (mm/memory-failure.c) refuses KSM
        pages with "can't handle KSM pages": the frame is marked, nobody is told, and nothing is unmapped.
        """
        if system.release() < (6, 4, 0):
            return "needs Linux 6.4: before, memory failure does nothing for a KSM page (hwpoison_user_mappings())"
        return offline.missing("hard")

    def refuse(self, page: Page) -> str | None:
        """See :meth:`Probe.refuse`."""
        own = any(place.child is None for place in page.places)
        if own and len(os.listdir("/proc/self/task")) > 1:
            # The signal goes to any thread that does not block it, and kills.
            return "this process maps the page and has several threads: ask from another, or map it in children only"
        return offline.over_budget()

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        return offline.offline("hard", page.pfn)

    def look(self, page: Page) -> Answer:
        """See :meth:`Probe.look`."""
        wanted = frozenset(page.places)
        one_of_each = {place.pid: place for place in page.places}
        with ExitStack() as stack:
            for place in one_of_each.values():
                place.run(_arm)
                stack.callback(place.run, _disarm)
            remark = self.force(page)
            signals = {pid: place.run(_collect) for pid, place in one_of_each.items()}
        after = observe(page.places)
        unmapped = {place for place in page.mapped if after[place].swap and after[place].swap_offset == page.pfn}
        told = {place for place in page.mapped if self._told(place, page, signals[place.pid])}
        found = frozenset(unmapped & told) if offline.poisoned(page.pfn) else frozenset()
        heard = ", ".join(f"process {pid} got {_words(received)}" for pid, received in signals.items())
        remarks = [changes(page.before, after), heard, remark, offline.restore(page.pfn)]
        return Answer(self.name, found, wanted - found, "; ".join(filter(None, remarks)))

    @staticmethod
    def _told(place: Place, page: Page, received: list[sigbus.Sigbus]) -> bool:
        own = {other.address for other in page.mapped if other.pid == place.pid}
        return any(signal.code == sigbus.MCEERR_AO and signal.address in own for signal in received)


# --- in the process of a place -----------------------------------------------------------------------------------

_watches: list[sigbus.Watch] = []


def _arm() -> None:
    _watches.append(sigbus.Watch().__enter__())


def _collect() -> list[sigbus.Sigbus]:
    # Signals are queued before the kernel's walk returns: there is nothing to wait for.
    received = []
    while (signal := sigbus.take(0)) is not None:
        received.append(signal)
    return received


def _disarm() -> None:
    _watches.pop().__exit__(None, None, None)


def _words(received: list[sigbus.Sigbus]) -> str:
    if not received:
        return "no SIGBUS"
    kinds = {sigbus.MCEERR_AO: "AO", sigbus.MCEERR_AR: "AR"}
    return ", ".join(f"SIGBUS {kinds.get(each.code, each.code)} for {each.address:#x}" for each in received)
