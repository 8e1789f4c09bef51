# SPDX-License-Identifier: GPL-2.0
"""Tests of the probes: each finds every place, reports a place it cannot reach as lost, and never claims a find.

Places that a walk cannot reach are made without changing the kernel:

* a *twin* holds the same bytes as the page, but is another page: no walk from the page can find it;
* a page with one more reference, from a pipe, is refused by migration after its entries were found and put back;
* a locked page is refused by reclaim;
* an inaccessible mapping cannot be touched, so that no ageing is seen through it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from guest_tests.mm import kpage, ksm, memcg, numa, pagemap, syscalls, vmstat
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, map_anonymous
from guest_tests.mm.probes import EXCLUSIVE_PROBES, PROBES, Answer, Place, Probe
from guest_tests.mm.probes.ageing import DamonAccess, IdleBitmap
from guest_tests.mm.probes.compaction import Compaction
from guest_tests.mm.probes.control import plain_control
from guest_tests.mm.probes.migration import MovePages, SoftOffline
from guest_tests.mm.probes.place import Page, observe
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.probes.reclaim import DamonPageout, Pageout, Reclaim
from guest_tests.mm.proctree import Child
from guest_tests.support.found import every_probe, usable
from guest_tests.support.holds import Spliced

# Reclaim needs memory that was charged to a group of its own.
pytestmark = pytest.mark.usefixtures("own_group")


@pytest.fixture(name="quiet_ksm")
def _quiet_ksm(ksm: Ksm) -> Ksm:
    """The shared fixture under a name that does not hide the module."""
    return ksm


@pytest.fixture
def merged(area: CarveOut, quiet_ksm: Ksm) -> list[Place]:
    """One KSM page at two addresses of this process."""
    mappings = [area.map(at, 1).fill(seed=5) for at in (0, 2)]
    quiet_ksm.merge(*mappings)
    return same_frame([Place(mapping.address) for mapping in mappings])


@pytest.fixture
def child() -> Iterator[Child]:
    with Child() as forked:
        yield forked


def same_frame(places: Sequence[Place]) -> list[Place]:
    frames = {pagemap.pfn(place.address, place.pid) for place in places}
    assert len(frames) == 1, f"the places do not share a page: {frames}"
    return list(places)


def map_mergeable(address: int, seed: int) -> None:
    map_anonymous(1, address).fill(seed).madvise(syscalls.MADV_MERGEABLE)


def conclusive(answer: Answer) -> Answer:
    """The answer, which must be conclusive. Skips for compaction, which may have no reason to move the page."""
    if answer.inconclusive and answer.probe == Compaction.name:
        pytest.skip(str(answer))
    assert not answer.inconclusive, answer
    return answer


# --- what is there is found --------------------------------------------------------------------------------------


@every_probe
def test_finds_a_merged_page_at_both_addresses_of_a_process(probe: Probe, merged: list[Place]) -> None:
    answer = conclusive(probe.walk(merged))
    assert answer.complete, answer
    assert answer.found == set(merged)


@every_probe
def test_finds_a_merged_page_in_two_processes(probe: Probe, area: CarveOut, quiet_ksm: Ksm, child: Child) -> None:
    map_mergeable(area.page(0), 6)
    child.call(map_mergeable, area.page(5), 6)
    quiet_ksm.scan()
    places = same_frame([Place(area.page(0)), Place(area.page(5), child)])
    assert ksm.is_ksm(area.page(0))
    answer = conclusive(probe.walk(places))
    assert answer.complete, answer


@every_probe
def test_finds_a_page_shared_with_a_forked_child(probe: Probe, area: CarveOut) -> None:
    mapping = area.map(0, 1).fill()
    with Child() as child:
        places = same_frame([Place(mapping.address), Place(mapping.address, child)])
        answer = conclusive(probe.walk(places))
        assert answer.complete, answer


@pytest.mark.parametrize("probe", EXCLUSIVE_PROBES, ids=repr, indirect=True)
def test_finds_the_one_mapping_of_an_exclusive_page(probe: Probe, area: CarveOut) -> None:
    place = Place(area.map(0, 1).fill().address)
    answer = conclusive(probe.walk([place]))
    assert answer.complete, answer


@every_probe
def test_finds_a_page_that_was_in_use_just_before(probe: Probe, area: CarveOut) -> None:
    # The page is young, dirty and perhaps in a per-CPU batch. It must not be called lost for that.
    mapping = area.map(0, 1)
    for seed in range(3):
        mapping.fill(seed)
    assert conclusive(probe.walk([Place(mapping.address)])).complete


# --- what is not is lost -----------------------------------------------------------------------------------------


@every_probe
def test_an_unmerged_twin_is_lost_and_nobody_else(probe: Probe, merged: list[Place], area: CarveOut) -> None:
    twin = Place(area.map(9, 1).fill(seed=5).address)
    assert pagemap.pfn(twin.address) != pagemap.pfn(merged[0].address)
    answer = conclusive(probe.walk([*merged, twin]))
    assert answer.found == set(merged), answer
    assert answer.lost == {twin}, answer


@every_probe
def test_a_place_where_nothing_is_mapped_is_lost(probe: Probe, merged: list[Place], area: CarveOut) -> None:
    empty = Place(area.map(9, 1).address)
    answer = conclusive(probe.walk([*merged, empty]))
    assert answer.lost == {empty}, answer


@pytest.mark.parametrize("probe", [MovePages(), SoftOffline()], ids=repr, indirect=True)
def test_a_page_that_migration_must_refuse_is_lost(probe: Probe, area: CarveOut) -> None:
    mapping = area.map(0, 1).fill()
    with Spliced(mapping.address):
        answer = probe.walk([Place(mapping.address)])
    assert answer.lost == {Place(mapping.address)}, answer
    assert "control page found" in answer.evidence
    assert probe.walk([Place(mapping.address)]).complete, "it stays lost without the reference"
    mapping.check()


@pytest.mark.parametrize("probe", [Reclaim(), DamonPageout(), Pageout()], ids=repr, indirect=True)
def test_a_locked_page_is_lost_to_reclaim(probe: Probe, area: CarveOut) -> None:
    mapping = area.map(0, 1).fill()
    syscalls.mlock(mapping.address, mapping.length)
    answer = probe.walk([Place(mapping.address)])
    assert answer.lost == {Place(mapping.address)}, answer
    syscalls.munlock(mapping.address, mapping.length)
    assert probe.walk([Place(mapping.address)]).complete, "it stays lost when unlocked"
    mapping.check()


@pytest.mark.parametrize("probe", [IdleBitmap(), DamonAccess()], ids=repr, indirect=True)
def test_an_access_that_cannot_happen_is_not_seen(probe: Probe, merged: list[Place]) -> None:
    syscalls.mprotect(merged[1].address, PAGE_SIZE, syscalls.PROT_NONE)
    answer = probe.walk(merged)
    assert answer.found == {merged[0]}, answer
    assert answer.lost == {merged[1]}, answer


# --- it cannot be made to lie ------------------------------------------------------------------------------------


@every_probe
def test_a_probe_that_does_not_walk_finds_nothing(
    probe: Probe, merged: list[Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(probe), "force", lambda *_: "")
    answer = probe.walk(merged)
    assert not answer.found, answer
    assert not answer.complete
    assert answer.inconclusive, "its control page was not found either"


@every_probe
def test_a_probe_that_walks_every_page_but_ours_loses_ours(
    probe: Probe, merged: list[Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(probe, DamonAccess | IdleBitmap | Compaction):
        pytest.skip("it notices that itself and does not answer: see the test above")
    real: Callable[[Probe, Page], str] = type(probe).force

    def skip_ours(self: Probe, page: Page) -> str:
        return "" if merged[0] in page.places else real(self, page)

    monkeypatch.setattr(type(probe), "force", skip_ours)
    answer = probe.walk(merged)
    assert not answer.found, answer
    assert answer.lost == set(merged), answer
    assert not answer.inconclusive


def test_a_page_that_moves_without_its_mappings_is_lost(merged: list[Place], area: CarveOut) -> None:
    # All places must map the same new frame. A new frame in each place is not enough.
    usable(SoftOffline())

    class Scatters(SoftOffline):
        def force(self, page: Page) -> str:
            remark = super().force(page)
            for place in page.places[1:]:
                Mapping(place.address, 1).touch()
            return remark

    answer = Scatters().walk(merged)
    assert answer.found == {merged[0]} or answer.found == {merged[1]}, answer
    assert not answer.complete


def test_nodes_between_which_no_page_can_move_are_missing_something(monkeypatch: pytest.MonkeyPatch) -> None:
    # Since 7.3 a kernel can have nodes and no move_pages() (CONFIG_NUMA_MIGRATION, mm/Kconfig).
    def not_there(*_: object) -> list[int]:
        raise OSError(errno.ENOSYS, "not there")

    monkeypatch.setattr(numa, "nodes", lambda: [0, 1])
    monkeypatch.setattr(numa, "nodes_of", not_there)
    assert "needs CONFIG_NUMA_MIGRATION=y" in str(MovePages().missing())


def test_the_idle_bitmap_refuses_frames_that_it_does_not_show(area: CarveOut) -> None:
    probe = usable(IdleBitmap())
    place = Place(area.map(0, 1).fill().address)
    page = Page(pagemap.pfn(place.address), (place,), observe([place]))
    assert probe.refuse(page) is None
    assert "cannot be read" in str(probe.refuse(replace(page, pfn=1 << 50)))


def test_without_a_page_the_answer_is_inconclusive(area: CarveOut) -> None:
    for probe in PROBES:
        if probe.missing() is None:
            answer = probe.walk([Place(area.map(0, 1).address)])
            assert "no page is present" in answer.inconclusive
            assert not answer.found | answer.lost


def test_a_control_page_that_is_lost_too_makes_the_answer_inconclusive(area: CarveOut) -> None:
    probe = usable(SoftOffline())
    ours, control = area.map(0, 1).fill(1), area.map(5, 1).fill(2)
    with Spliced(ours.address), Spliced(control.address):
        answer = probe.walk([Place(ours.address)], [Place(control.address)])
    assert not answer.lost | answer.found
    assert "control page" in answer.inconclusive


def test_the_control_page_is_left_alone_when_nothing_is_lost(area: CarveOut) -> None:
    probe = usable(SoftOffline())
    with plain_control() as control:
        before = pagemap.pfn(control[0].address)
        assert probe.walk([Place(area.map(0, 1).fill().address)], control).complete
        assert pagemap.pfn(control[0].address) == before


# --- what it leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [probe for probe in PROBES if probe.consumes_pages], ids=repr, indirect=True)
def test_a_frame_that_was_used_up_is_given_back(probe: Probe, merged: list[Place]) -> None:
    if not Path("/sys/kernel/debug/hwpoison/unpoison-pfn").exists():
        pytest.skip("needs CONFIG_HWPOISON_INJECT, its module loaded, and debugfs mounted")
    lost, frame = vmstat.meminfo()["HardwareCorrupted"], pagemap.pfn(merged[0].address)
    assert probe.walk(merged).complete
    assert vmstat.meminfo()["HardwareCorrupted"] == lost
    assert kpage.Flag.HWPOISON not in kpage.flags(frame)


@every_probe
def test_what_survives_a_walk_is_intact(probe: Probe, area: CarveOut) -> None:
    if isinstance(probe, HwPoison):
        pytest.skip("poisoning destroys the page: that is its purpose")
    mapping = area.map(0, 1).fill(3)
    conclusive(probe.walk([Place(mapping.address)]))
    mapping.check()


def test_damon_is_left_as_it_was(merged: list[Place]) -> None:
    usable(DamonAccess())
    stat = Path("/sys/module/damon_stat/parameters/enabled")
    before = stat.read_text() if stat.exists() else None
    DamonAccess().walk(merged)
    assert Path("/sys/kernel/mm/damon/admin/kdamonds/nr_kdamonds").read_text().strip() == "0"
    assert (stat.read_text() if stat.exists() else None) == before


def test_poison_names_an_address_of_each_process(area: CarveOut) -> None:
    probe = usable(HwPoison())
    mapping = area.map(0, 1).fill()
    with Child() as one, Child() as other:
        places = [Place(mapping.address, one), Place(mapping.address, other)]
        answer = probe.walk(places)
    assert answer.complete, answer
    for process in (one, other):
        assert f"process {process.pid} got SIGBUS AO for {mapping.address:#x}" in answer.evidence


def test_a_page_of_the_root_group_is_refused_by_reclaim() -> None:
    probe = usable(Reclaim())
    (memcg.ROOT / "cgroup.procs").write_text(str(os.getpid()))
    mapping = map_anonymous(1).fill()
    try:
        answer = probe.walk([Place(mapping.address)])
    finally:
        mapping.unmap()
    assert "enter one before allocating" in answer.inconclusive


def test_the_names_of_probes_are_different() -> None:
    assert len({probe.name for probe in EXCLUSIVE_PROBES}) == len(EXCLUSIVE_PROBES)
