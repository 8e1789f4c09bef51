# SPDX-License-Identifier: GPL-2.0
"""Probes that make the kernel move a page to another frame, which has to change every mapping of it.

Migration replaces each entry it finds by a migration entry, and where the page is still mapped then, it puts the old
entries back and gives up (migrate_folio_unmap(), mm/migrate.c). So these probes are all or nothing: if one mapping is
missed no place follows, and all are reported lost.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping

from guest_tests.mm import numa
from guest_tests.mm.pagemap import Entry
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.base import EffectProbe
from guest_tests.mm.probes.place import Page, Place


class MigrationProbe(EffectProbe):
    """A probe after which every place it found shows one same new frame."""

    def followed(self, page: Page, after: Mapping[Place, Entry]) -> frozenset[Place]:
        """The places of the old frame that share the new one."""
        new = page.moved_to(after)
        return frozenset(place for place in page.mapped if new is not None and after[place].pfn == new)


class MovePages(MigrationProbe):
    """move_pages(2) to another node, with MPOL_MF_MOVE_ALL because the page is mapped more than once.

    The call empties the batches of pages on their way to an LRU list itself (lru_cache_disable() in do_pages_move(),
    mm/migrate.c), so that even a page touched just now can be isolated. A page already on the target node would be
    reported as moved without any walk: the target is always a node it is not on.
    """

    name = "move_pages"

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        have = len(numa.nodes())
        if have < 2:
            return f"needs 2 NUMA nodes with memory, this machine has {have}: boot with numa=fake=2"
        try:
            numa.nodes_of([])
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            return "needs CONFIG_NUMA_MIGRATION=y: this kernel has nodes, but no move_pages()"  # an option since 7.3
        return None

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        place = page.places[0]
        try:
            here = numa.node_of(place.address, place.pid)
            there = next(node for node in numa.nodes() if node != here)
            status = numa.move_pages(place.pid, [place.address], [there], numa.MPOL_MF_MOVE_ALL)[0]
        except OSError as error:
            return str(error)
        return "" if status == there else f"node {here} to {there}: {errno.errorcode.get(-status, str(status))}"


class SoftOffline(MigrationProbe):
    """Soft offline: the page moves to any other frame and the old one is taken out of use.

    One node is enough. The frame is given back afterwards where hwpoison-inject is there.
    """

    name = "soft_offline"
    consumes_pages = True

    def missing(self) -> str | None:
        """See :meth:`Probe.missing`."""
        return offline.missing("soft")

    def refuse(self, page: Page) -> str | None:
        """See :meth:`Probe.refuse`."""
        return offline.over_budget()

    def force(self, page: Page) -> str:
        """See :meth:`Probe.force`."""
        return offline.offline("soft", page.pfn)

    def followed(self, page: Page, after: Mapping[Place, Entry]) -> frozenset[Place]:
        """The places that share one new frame, if the old one was taken out of use."""
        return super().followed(page, after) if offline.poisoned(page.pfn) else frozenset()

    def settle(self, page: Page) -> str:
        """See :meth:`EffectProbe.settle`."""
        return offline.restore(page.pfn)
