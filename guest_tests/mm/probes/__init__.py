# SPDX-License-Identifier: GPL-2.0
"""Probes: which of these mappings does the kernel's reverse walk find?

::

    for probe in PROBES:
        if probe.missing() is None:
            answer = probe.walk([Place(here.address), Place(there.address, child)])
            assert answer.complete, answer

A walk changes the page for good: it is moved, swapped out (and then no longer KSM's), or poisoned. So each walk needs
memory prepared for it.

=================  ==============================================================  ==================================
probe              the kernel walks in order to                                    a lost mapping shows
=================  ==============================================================  ==================================
``move_pages``     move the page to another node                                   all places keep the old frame
``soft_offline``   move it anywhere and take the frame out of use                  all places keep the old frame
``compaction``     move it to a free frame further up in its zone                  all places keep the old frame
``reclaim``        swap it out on behalf of its control group                      the place stays present
``damon_pageout``  swap it out because DAMON was told to                           the place stays present
``hwpoison``       tell all its users that it is lost, and unmap it                no signal, or the place stays
``damon``          learn whether it was accessed                                   accesses through it are not seen
``idle_bitmap``    learn whether it was accessed                                   accesses through it are not seen
``pageout``        swap out a page that is mapped once                             the place stays present
=================  ==============================================================  ==================================
"""

from typing import Final

from guest_tests.mm.probes.ageing import DamonAccess, IdleBitmap
from guest_tests.mm.probes.base import Answer, Probe
from guest_tests.mm.probes.compaction import Compaction
from guest_tests.mm.probes.migration import MovePages, SoftOffline
from guest_tests.mm.probes.place import Place
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.probes.reclaim import DamonPageout, Pageout, Reclaim

__all__ = ["EXCLUSIVE_PROBES", "PROBES", "Answer", "Place", "Probe"]

#: all probes that can ask about a page mapped any number of times
PROBES: Final[tuple[Probe, ...]] = (
    MovePages(),
    SoftOffline(),
    Compaction(),
    Reclaim(),
    DamonPageout(),
    HwPoison(),
    DamonAccess(),
    IdleBitmap(),
)
#: the same and those that only ask about pages mapped once
EXCLUSIVE_PROBES: Final[tuple[Probe, ...]] = (*PROBES, Pageout())
