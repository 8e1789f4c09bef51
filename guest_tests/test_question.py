# SPDX-License-Identifier: GPL-2.0
"""The question that this project began with, in the smallest form that answers it. ``make run`` runs it.

On 16 June 2025 David Hildenbrand asked whether mremap() breaks KSM's reverse map: the rmap items of a KSM page hold
virtual addresses, and a moved page is mapped at another one (b65dd020-5e02-4863-8994-def576e3d3dd@redhat.com). The
answer has two parts. A move first un-merges KSM pages, so that no rmap item with the old address is left. But KSM
merges them again at the new place, in a VMA that still has the page offset of the old place. Hugh Dickins showed in
April 2026 that a walk which takes one for the other loses the page
(02e1b8df-d568-8cbb-b8f6-46d5476d9d75@google.com).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from guest_tests.mm import ksm as ksm_knobs
from guest_tests.mm import pagemap
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes import PROBES, Place, Probe
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MADV_MERGEABLE, MREMAP_FIXED, MREMAP_MAYMOVE

pytestmark = pytest.mark.question

Record = Callable[[str, object], None]

#: The carve-outs that a process keeps. A variable of the module, because a child runs build() by name.
_kept: list[CarveOut] = []


def build() -> tuple[int, int]:
    """Map two mergeable pages of equal content, two pages apart. Returns their addresses.

    ::

        page:    0      1      2      3
              [ 0x77 ] ....  [ 0x77 ] ....
    """
    area = carve_out(4)
    _kept.append(area)
    stays, goes = area.map(0, 1), area.map(2, 1)
    for mapping in (stays, goes):
        mapping.fill_same(0x77).madvise(MADV_MERGEABLE)
    return stays.address, goes.address


def move_second(stays: int, goes: int) -> int:
    """Move the second page next to the first. Returns its new address.

    ::

        page:    0      1      2      3
              [ 0x77 ][ 0x77 ] ....  ....        the VMA at 1 still has the page offset of 2
    """
    second = Mapping(goes, 1)
    target = stays + second.length
    return move(second, target, MREMAP_MAYMOVE | MREMAP_FIXED).address


def test_a_move_unmerges_ksm_pages(ksm: Ksm, record_property: Record) -> None:
    """No row: one of two merged pages moves.

    Every kernel: it has a frame of its own and is no KSM page.
    """
    stays, goes = build()
    ksm.scan()
    before = pagemap.pfns(goes, 1)[0]
    assert ksm_knobs.is_ksm(goes), f"KSM did not merge the page at {goes:#x}, so the test cannot tell anything"
    assert before == pagemap.pfns(stays, 1)[0], "two pages of equal content were merged with something else"
    moved = move_second(stays, goes)
    after = pagemap.pfns(moved, 1)[0]
    still = ksm_knobs.is_ksm(moved)
    record_property(
        "question",
        {"step": "unmerge", "from": goes, "to": moved, "pfn": [before, after], "unmerged": not still},
    )
    assert not still, (
        f"the page moved from {goes:#x} to {moved:#x} is still a KSM page, with an rmap item for the old address"
    )
    assert after != before, f"the page at {moved:#x} still shares PFN {before:#x} with the page at {stays:#x}"


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.name)
@pytest.mark.usefixtures("own_group")
def test_the_walk_finds_pages_merged_again_after_the_move(probe: Probe, ksm: Ksm, record_property: Record) -> None:
    """No row: a process and its child each move one of two equal pages, KSM merges all four, and each kind of walk is
    forced.

    Every kernel: each walk finds all four places.
    """
    if missing := probe.missing():
        record_property("question", {"step": "walk", "probe": probe.name, "missing": missing})
        pytest.skip(missing)
    with Child() as child:
        places = []
        for process in (None, child):
            run = process.call if process else lambda function, *args: function(*args)
            stays, goes = run(build)
            ksm.scan()
            places += [Place(stays, process), Place(run(move_second, stays, goes), process)]
        ksm.scan()
        frames = {pagemap.pfns(place.address, 1, place.pid)[0] for place in places}
        assert len(frames) == 1, f"KSM did not merge the four pages into one again: PFNs {frames}"
        answer = probe.walk(places)
        record_property(
            "question",
            {
                "step": "walk",
                "probe": probe.name,
                "places": len(places),
                "found": len(answer.found),
                "lost": sorted(map(str, answer.lost)),
                "inconclusive": answer.inconclusive,
                "evidence": answer.evidence,
            },
        )
        if answer.inconclusive:
            pytest.skip(f"{probe.name} cannot tell: {answer.inconclusive}")
        assert not answer.lost, str(answer)
