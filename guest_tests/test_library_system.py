# SPDX-License-Identifier: GPL-2.0
"""Tests of the library on the kernel under test, second part: KSM, nodes, groups, swap, processes, and more."""

from __future__ import annotations

import errno
import functools
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_tests.mm import (
    kpage,
    ksm,
    maps,
    memcg,
    numa,
    pagemap,
    sigbus,
    swap,
    syscalls,
    system,
    userfault,
    vmstat,
    waiting,
)
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, map_anonymous, move
from guest_tests.mm.proctree import Child, ChildDied


@pytest.fixture(name="quiet_ksm")
def _quiet_ksm(ksm: Ksm) -> Ksm:
    """The shared fixture under a name that does not hide the module."""
    return ksm


@pytest.fixture
def group() -> Iterator[memcg.Memcg]:
    """A group that these tests put processes into; ``own_group`` would have this process in it already."""
    memcg.require_memcg()
    with memcg.Memcg("library") as made:
        yield made


# --- KSM ---------------------------------------------------------------------------------------------------------


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


# --- nodes -------------------------------------------------------------------------------------------------------


def test_a_page_is_on_a_node_that_has_memory(area: CarveOut) -> None:
    mapping = area.map(0, 2).touch([0])
    assert numa.node_of(mapping.page(0)) in numa.nodes()
    # follow_page() with FOLL_DUMP, which do_pages_stat_array() used before 46d6a9b4450b (6.12), gives EFAULT for
    # anonymous memory that was never touched (no_page_table(), mm/gup.c).
    absent = "ENOENT" if system.release() >= (6, 12, 0) else "EFAULT"
    with pytest.raises(OSError, match=absent) as caught:
        numa.node_of(mapping.page(1))
    assert caught.value.errno == getattr(errno, absent)


def test_pages_move_to_the_node_asked_for(area: CarveOut) -> None:
    system.require_nodes(2)
    mapping = area.map(0, 4).fill()
    events = vmstat.vmstat()
    for node in numa.nodes()[:2]:
        assert numa.move_pages(0, mapping.page_addresses, [node] * 4, numa.MPOL_MF_MOVE) == [node] * 4
        assert numa.nodes_of(mapping.page_addresses) == [node] * 4
    mapping.check()
    assert vmstat.delta(events, "pgmigrate_success") >= 4


def test_policies_place_pages(area: CarveOut) -> None:
    system.require_nodes(2)
    for index, node in enumerate(numa.nodes()[:2]):
        mapping = area.map(index * 4, 4)
        numa.mbind(mapping.address, mapping.length, numa.MPOL_BIND, [node])
        mapping.touch()
        assert numa.nodes_of(mapping.page_addresses) == [node] * 4
    child_pages = area.map(20, 3).fill()
    with Child() as child:
        child.call(child_pages.fill, 8)
        target = numa.nodes()[1]
        assert numa.migrate_pages(child.pid, [numa.nodes()[0]], [target]) >= 0
        assert child.call(numa.node_of, child_pages.address) == target


def test_lists_of_the_kernel_are_parsed() -> None:
    assert numa.parse_list("0-2,5\n") == [0, 1, 2, 5]
    assert numa.parse_list("\n") == []


# --- groups, swap, counters --------------------------------------------------------------------------------------


def test_a_group_is_charged_for_what_its_processes_use(group: memcg.Memcg, area: CarveOut) -> None:
    mapping = area.map(0, 40)
    with Child() as child:
        group.enter(child.pid)
        assert group.processes() == [child.pid]
        before = group.current
        child.call(mapping.fill)
        assert group.stat()["anon"] >= mapping.length
        assert group.current >= before + mapping.length


def test_this_process_goes_back_when_the_group_is_removed() -> None:
    memcg.require_memcg()
    home = memcg.current()
    with memcg.Memcg() as group:
        group.enter()
        assert memcg.current() == group.path
    assert memcg.current() == home
    assert not group.path.exists()


def test_reclaim_of_a_group_sends_its_pages_to_swap(group: memcg.Memcg, area: CarveOut) -> None:
    swap.require_swap(4 * 40 * PAGE_SIZE // 1024)
    system.require_kernel(5, 19, "memory.reclaim")
    mapping = area.map(0, 40)
    with Child() as child:
        group.enter(child.pid)
        mapping = child.call(mapping.fill)
        waiting.wait_until(lambda: _swapped(group, mapping, child.pid) > 0, "the first page in swap")
        assert group.swap_current > 0
        child.call(mapping.check)


def _swapped(group: memcg.Memcg, mapping: Mapping, pid: int) -> int:
    group.reclaim(mapping.length)
    return sum(entry.swap for entry in pagemap.entries(mapping.address, mapping.pages, pid))


def test_a_group_without_a_limit_reads_back_the_limit_it_is_given(group: memcg.Memcg) -> None:
    group.set_max(1 << 24)
    group.set_high(1 << 23)
    group.set_max(None)
    assert "oom" in group.events()
    with pytest.raises(OSError, match="Invalid argument"):
        group._write("memory.max", "nonsense")


def test_pageout_swaps_and_touching_brings_back(area: CarveOut) -> None:
    swap.require_swap(64 * PAGE_SIZE // 1024)
    mapping = area.map(0, 4).fill()
    mapping.madvise(syscalls.MADV_PAGEOUT)
    entry = pagemap.entry(mapping.address)
    assert entry.swap
    assert not entry.present
    assert entry.pfn is None
    mapping.check()
    assert pagemap.entry(mapping.address).present


def test_counters_are_integers_of_the_right_size(area: CarveOut) -> None:
    before = vmstat.status()
    area.map(0, 40).touch()
    after = vmstat.status()
    assert after["VmPeak"] >= before["VmPeak"]
    assert vmstat.meminfo()["MemTotal"] > 1024
    assert vmstat.vmstat()["pgfault"] > 0
    assert swap.total_kb() == pytest.approx(sum(item.size for item in swap.areas()), abs=64)


# --- processes ---------------------------------------------------------------------------------------------------


def test_a_child_sees_our_memory_and_keeps_its_own_changes(area: CarveOut) -> None:
    mapping = area.map(0, 3).fill()
    with Child() as child:
        child.call(mapping.check)
        child.call(mapping.fill, seed=7)
        mapping.check()
        with pytest.raises(AssertionError, match="page 0") as caught:
            child.call(mapping.check)
        assert any(f"in process {child.pid}" in note for note in caught.value.__notes__)


def test_a_raised_error_keeps_its_errno() -> None:
    with Child() as child, pytest.raises(OSError, match="EINVAL") as caught:
        child.call(syscalls.mprotect, 1, PAGE_SIZE, syscalls.PROT_READ)  # not aligned
    assert caught.value.errno == errno.EINVAL


def test_a_skip_in_a_child_is_a_skip_here() -> None:
    with Child() as child, pytest.raises(pytest.skip.Exception, match="needs Linux 99"):
        child.call(system.require_kernel, 99, 0, "the future")


def test_children_run_side_by_side() -> None:
    with Child() as first, Child() as second:
        first.start(os.getpid)
        second.start(os.getpid)
        assert (second.result(), first.result()) == (second.pid, first.pid)


def test_a_killed_child_is_reported_with_its_signal_and_what_it_was_doing() -> None:
    with Child() as child:
        with pytest.raises(ChildDied, match=r"was killed by SIGSEGV during Mapping\.touch") as caught:
            child.call(Mapping(PAGE_SIZE, 1).touch)
        assert caught.value.signal == signal.SIGSEGV
        with pytest.raises(ChildDied):
            child.call(os.getpid)


def test_an_exiting_child_is_reported_with_its_status() -> None:
    with Child() as child, pytest.raises(ChildDied, match="exited with status 3"):
        child.call(os._exit, 3)


def test_a_child_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Child() as child:
        child.start(signal.pause)
        with pytest.raises(TimeoutError, match="did not finish"):
            child.result(seconds=0.05)
        assert child.alive
    assert not child.alive


def test_grandchildren_are_forked_by_children(area: CarveOut) -> None:
    mapping = area.map(0, 2).fill()
    with Child() as child:
        child.call(mapping.fill, seed=1)
        with child.fork() as grandchild:
            assert grandchild.call(os.getppid) == child.pid
            assert grandchild.call(mapping.read, 0) == child.call(mapping.read, 0) != mapping.read(0)


def test_nothing_is_left_of_a_tree() -> None:
    with Child() as child:
        first, second = child.fork(), child.fork()
        third = second.fork()
        second.start(signal.pause)
        tree = [child.pid, first.pid, second.pid, third.pid]
        assert all(Path(f"/proc/{pid}").exists() for pid in tree)
    assert not [pid for pid in tree if Path(f"/proc/{pid}").exists()]


def test_a_grandchild_may_outlive_its_parent(area: CarveOut) -> None:
    mapping = area.map(0, 2).fill()
    with Child() as child:
        mortal, survivor = child.fork(), child.fork(outlive_parent=True)
        assert child.kill() == signal.SIGKILL
        assert mortal.wait() == signal.SIGKILL
        assert survivor.call(os.getppid) == os.getpid()
        survivor.call(mapping.check)
    assert not survivor.alive


def test_a_childs_own_children_die_with_it() -> None:
    with Child() as child:
        pid = child.call(_fork_without_telling)
        assert Path(f"/proc/{pid}").exists()
    waiting.wait_until(functools.partial(_dead, pid), "the grandchild's end")


def _fork_without_telling() -> int:
    global _untold
    _untold = Child()
    return _untold.pid


_untold: Child | None = None


def _dead(pid: int) -> bool:
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
    return False


# --- poison ------------------------------------------------------------------------------------------------------


def test_a_watched_sigbus_is_taken_like_a_message() -> None:
    with sigbus_watch() as watch:
        assert watch.wait(0) is None
        os.kill(os.getpid(), signal.SIGBUS)
        taken = watch.wait()
        assert taken is not None
        assert taken.code == 0  # SI_USER
        os.kill(os.getpid(), signal.SIGBUS)  # left pending: must not kill us when the watch ends


def sigbus_watch() -> sigbus.Watch:
    system.require_config("MEMORY_FAILURE")
    try:
        sigbus.early_kill(False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        pytest.skip("needs CONFIG_MEMORY_FAILURE=y: this kernel does not know PR_MCE_KILL")
    return sigbus.Watch()


def test_poison_is_reported_early_with_its_address(area: CarveOut) -> None:
    system.require_disposable()
    mapping = area.map(0, 2).fill()
    with sigbus_watch() as watch:
        with Child() as injector, pytest.raises(ChildDied) as caught:
            injector.call(mapping.part(1).madvise, syscalls.MADV_HWPOISON)
        assert caught.value.signal == signal.SIGBUS
        assert watch.wait() == sigbus.Sigbus(sigbus.MCEERR_AO, mapping.page(1), PAGE_SIZE.bit_length() - 1)
        assert watch.wait(0) is None
    mapping.part(0).check()


# --- userfaultfd -------------------------------------------------------------------------------------------------


def test_registered_memory_is_marked_and_its_move_is_an_event(area: CarveOut) -> None:
    system.require_config("USERFAULTFD")
    mapping = area.map(0, 2).fill()
    with Child() as child:
        child.call(_watch_own_move, mapping, area.page(10))


def _watch_own_move(mapping: Mapping, to: int) -> None:
    with userfault.Userfault(userfault.FEATURE_EVENT_REMAP) as uffd:
        uffd.register(mapping)
        assert "um" in maps.vma_at(mapping.address, detailed=True).vm_flags
        events: list[userfault.Event | None] = []
        reader = threading.Thread(target=lambda: events.append(uffd.read()))
        reader.start()
        moved = move(mapping, to)
        reader.join()
        assert events == [userfault.Event(userfault.EVENT_REMAP, (mapping.address, to, mapping.length))]
        uffd.unregister(moved)
        assert "um" not in maps.vma_at(to, detailed=True).vm_flags
        moved.check()
