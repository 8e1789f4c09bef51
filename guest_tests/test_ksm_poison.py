# SPDX-License-Identifier: GPL-2.0
"""Which processes get SIGBUS for a poisoned KSM page, after one has moved its inherited page away."""

from __future__ import annotations

import pytest

from guest_tests.mm import pagemap, sigbus
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MADV_MERGEABLE

_watches: list[sigbus.Watch] = []


def _listen() -> None:
    _watches.append(sigbus.Watch().__enter__())


def _heard() -> sigbus.Sigbus | None:
    return sigbus.take(0)


def _move_away(inherited: Mapping, to: int) -> None:
    move(inherited, to).fill(8)


@pytest.mark.finding("ksm-poison-bystander", match="where it maps nothing")
def test_a_process_that_moved_its_inherited_page_away_is_not_told_of_anothers_poison(area: CarveOut, ksm: Ksm) -> None:
    """Row 115 (rmap-hwpoison): a child moves its inherited page away and writes to it; then the parent's page is merged
    and poisoned.

    The child's VMA at page 10 keeps the page offset and the anon_vma of page 0. collect_procs_ksm() (mm/ksm.c of
    6.12.117 and 7.3.4) signals every process with a VMA in that anon_vma, for the address in the rmap item. It lacks
    the check of rmap_walk_ksm() that the VMA contains the address. So the child gets SIGBUS for page 0, where it maps
    nothing, and dies if it does not catch the signal.

    ::

        page:       0        10       30
        parent   [ KSM ]   ....    [ KSM ]       one frame, poisoned
        child     ....   [ own ]    ....         page 0 as inherited, moved to 10, written

    Every kernel: only the process that maps the page gets SIGBUS. This fails: finding ksm-poison-bystander.
    """
    if missing := HwPoison().missing():
        pytest.skip(missing)
    first = area.map(0, 1).fill(1).madvise(MADV_MERGEABLE)
    with Child() as child:
        child.call(_move_away, first, area.page(10))
        second = area.map(30, 1)
        second.madvise(MADV_MERGEABLE)
        first.fill_same(0x77)
        second.fill_same(0x77)
        ksm.merge(first, second)
        frame = pagemap.pfns(first.address, 1)[0]
        bystander = pagemap.pfns(area.page(10), 1, child.pid)[0]
        assert frame is not None
        assert bystander != frame, "the child maps the very page that is about to be poisoned"
        child.call(_listen)
        with sigbus.Watch():
            offline.offline("hard", frame)
            own = sigbus.take(0)
        heard = child.call(_heard)
        first.unmap()  # reading poisoned memory would kill this process, also when evidence is collected
        second.unmap()
        offline.restore(frame)
        assert own is not None, "the process that maps the poisoned page was told nothing"
        assert heard is None, (
            f"the child got SIGBUS for {heard.address:#x}, where it maps nothing, when PFN {frame:#x} was poisoned; "
            f"its only page is at {area.page(10):#x}, PFN {bystander:#x}"
        )
