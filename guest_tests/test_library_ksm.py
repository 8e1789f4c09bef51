# SPDX-License-Identifier: GPL-2.0
"""Tests of the library on the kernel under test: KSM."""

from __future__ import annotations

import time

import pytest

from guest_tests.mm import kpage, ksm, maps, pagemap, syscalls, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, carve_out, map_anonymous
from guest_tests.mm.proctree import Child


@pytest.fixture(name="quiet_ksm")
def _quiet_ksm(ksm: Ksm) -> Ksm:
    """The shared fixture under a name that does not hide the module."""
    return ksm


def test_identical_pages_share_one_frame_after_a_merge(quiet_ksm: Ksm, area: CarveOut) -> None:
    mapping = area.map(0, 10).fill_same()
    assert not ksm.is_ksm(mapping.address)
    quiet_ksm.merge(mapping)
    assert len(set(pagemap.pfns(mapping.address, 10))) == 1
    assert ksm.stat().rmap_items >= 10
    assert ksm.merging_pages() >= 10
    assert ksm.counters().pages_sharing >= 9
    mapping.check()
    if system.release() >= (6, 7, 0):
        assert maps.kilobytes(mapping.address, mapping.end, "KSM") == 10 * PAGE_SIZE // 1024


def test_a_merge_that_did_not_happen_is_an_error(quiet_ksm: Ksm, area: CarveOut) -> None:
    mapping = area.map(0, 3).fill()
    with pytest.raises(AssertionError, match=r"page 0 of mapping .* was not merged"):
        quiet_ksm.merge(mapping)


def test_ksmd_stands_still_between_scans(quiet_ksm: Ksm, area: CarveOut) -> None:
    mapping = area.map(0, 2).fill_same()
    quiet_ksm.merge(mapping)
    scans = ksm.read("full_scans")
    mapping.fill_same()  # breaks the sharing
    time.sleep(0.2)
    assert ksm.read("full_scans") == scans
    assert not ksm.is_ksm(mapping.address)
    quiet_ksm.scan()
    assert ksm.is_ksm(mapping.address)


def test_unmerging_all_gives_every_page_its_own_frame(quiet_ksm: Ksm, area: CarveOut) -> None:
    mapping = area.map(0, 4).fill_same()
    quiet_ksm.merge(mapping)
    quiet_ksm.unmerge_all()
    assert len(set(pagemap.pfns(mapping.address, 4))) == 4
    assert ksm.counters().pages_shared == 0
    mapping.check()


def test_knobs_are_restored_even_while_pages_are_shared(area: CarveOut) -> None:
    system.require_config("KSM")
    knobs = [knob for knob in ksm.KNOBS if (ksm.DIRECTORY / knob).exists()]
    before = {knob: ksm.read_text(knob) for knob in knobs}
    with Ksm() as controlled:
        controlled.set(max_page_sharing=7, use_zero_pages=1)
        if "merge_across_nodes" in knobs:
            controlled.set(merge_across_nodes=0)
        controlled.merge(area.map(0, 5).fill_same())
        with pytest.raises(OSError, match="busy"):
            ksm.write("max_page_sharing", 8)
    assert {knob: ksm.read_text(knob) for knob in knobs} == before


def test_knobs_are_restored_under_the_advisor() -> None:
    if not (ksm.DIRECTORY / "advisor_mode").exists():
        pytest.skip("needs Linux 6.8 (the advisor of KSM) with CONFIG_KSM=y")
    with Ksm() as outer:
        outer.set(advisor_mode="scan-time")
        with Ksm():
            assert ksm.read_text("advisor_mode") == "none"
        assert ksm.read_text("advisor_mode") == "scan-time"
        outer.set(advisor_mode="none", pages_to_scan=123)
        with Ksm():
            assert ksm.read("pages_to_scan") != 123
        assert ksm.read("pages_to_scan") == 123


def test_zero_pages_of_ksm_are_counted_and_are_not_ksm_pages(quiet_ksm: Ksm, area: CarveOut) -> None:
    system.require_kernel(6, 6, "ksm_zero_pages")
    quiet_ksm.set(use_zero_pages=1)
    before = ksm.stat().zero_pages
    mapping = area.map(0, 4).touch().madvise(syscalls.MADV_MERGEABLE)
    quiet_ksm.scan()
    after = ksm.stat().zero_pages
    assert before is not None
    assert after == before + 4
    assert not ksm.is_ksm(mapping.address)


def test_all_memory_of_a_process_can_be_offered(quiet_ksm: Ksm) -> None:
    system.require_kernel(6, 4, "PR_SET_MEMORY_MERGE")
    with Child() as child:
        child.call(syscalls.set_memory_merge)
        with carve_out(5) as area:
            child.call(_map_same, area.address)
            quiet_ksm.scan()
            assert ksm.is_ksm(area.address, child.pid)
            assert ksm.stat(child.pid).merge_any in (True, None)


def _map_same(address: int) -> None:
    map_anonymous(5, address).fill_same()


def test_merged_pages_are_told_from_others_page_by_page(quiet_ksm: Ksm, area: CarveOut) -> None:
    mapping = area.map(0, 6).fill_same()
    mapping.part(1).fill()
    mapping.part(4).fill(seed=1)
    mapping.madvise(syscalls.MADV_MERGEABLE)
    quiet_ksm.scan()
    expected = [True, False, True, True, False, True]
    assert ksm.merged(mapping.address, 6) == expected
    with Child() as child:
        child.call(mapping.part(2).fill)
        child.call(mapping.part(1).fill)
        child.call(mapping.part(4).fill)
        assert ksm.merged(mapping.address, 6) == expected
        assert ksm.merged(mapping.address, 6, child.pid) == [True, False, False, True, False, True]


def test_where_a_kernel_does_not_tell_merged_pages_nobody_guesses(
    quiet_ksm: Ksm, area: CarveOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.require_kernel(6, 7, "KSM: in smaps")
    monkeypatch.setattr(kpage, "tells_ksm", lambda: False)
    mapping = area.map(0, 4).fill_same()
    quiet_ksm.merge(mapping)
    assert ksm.merged(mapping.address, 4) == [True] * 4
    mapping.part(3).fill()
    assert ksm.merged(mapping.address, 4) == [True, True, True, False]
    with Child(), pytest.raises(RuntimeError, match="cannot tell which 3 of 4 pages"):
        ksm.merged(mapping.address, 4)  # what was not merged is shared with the child now
