# SPDX-License-Identifier: GPL-2.0
"""Tests of the library on the kernel under test: nodes, groups, swap, counters, poison, userfaultfd and huge pages."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import maps, memcg, numa, pagemap, sigbus, swap, syscalls, system, userfault, vmstat, waiting
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.probes.ageing import drain
from guest_tests.mm.proctree import Child, ChildDied
from guest_tests.support.folios import THP, huge_kb, knob, pmd_size, thp
from guest_tests.support.races import Busy


@pytest.fixture
def group() -> Iterator[memcg.Memcg]:
    """A group that these tests put processes into; ``own_group`` would have this process in it already."""
    memcg.require_memcg()
    with memcg.Memcg("library") as made:
        yield made


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
        # The kernel adds up the statistics of its CPUs every two seconds, or after many changes.
        waiting.wait_until(lambda: group.stat()["anon"] >= mapping.length, "the pages to be in the statistics")
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
    drain()
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


# --- huge pages --------------------------------------------------------------------------------------------------


def require_init_of_harness() -> None:
    pmd_size()
    if (THP / "khugepaged/scan_sleep_millisecs").read_text() != "4294967295\n":
        pytest.skip("needs a guest of the harness, whose init has khugepaged sleep")


def test_huge_pages_are_on_in_guests() -> None:
    """Also with less than 512 MB, for which the kernel turns them off."""
    require_init_of_harness()
    if "transparent_hugepage=" in Path("/proc/cmdline").read_text():
        pytest.skip("the kernel's command line says whether there are huge pages")
    assert "[never]" not in (THP / "enabled").read_text()


def test_khugepaged_sleeps_in_guests() -> None:
    """It collapses nothing by itself; the same memory is collapsed as soon as it may scan."""
    require_init_of_harness()
    pages = pmd_size() // PAGE_SIZE
    sleep = THP / "khugepaged/scan_sleep_millisecs"
    with thp(), carve_out(3 * pages) as area:
        memory = area.map(0, 2 * pages + 1).madvise(mmap.MADV_NOHUGEPAGE).touch(range(pages))
        memory.madvise(mmap.MADV_HUGEPAGE)
        time.sleep(0.2)
        assert huge_kb(memory) == 0, "khugepaged collapsed memory of a test"
        with knob(sleep, "10"), knob(THP / "khugepaged/pages_to_scan", "4096"):
            waiting.wait_until(lambda: huge_kb(memory) > 0, "khugepaged to collapse the memory")
        memory.check()


# --- what looks for bugs while tests run --------------------------------------------------------------------------

_KCSAN: Final = Path("/sys/kernel/debug/kcsan")


def _kcsan() -> dict[str, int]:
    """What KCSAN counts (show_info(), kernel/kcsan/debugfs.c)."""
    pairs = (line.partition(":") for line in _KCSAN.read_text().splitlines())
    return {name: int(value) for name, _, value in pairs if value.strip().isdigit()}


def require_kcsan() -> None:
    if not _KCSAN.exists():
        pytest.skip("needs CONFIG_KCSAN, and debugfs at /sys/kernel/debug")


def test_kcsan_watches_memory_while_tests_run() -> None:
    """A KCSAN that is compiled in and not enabled reports nothing (CONFIG_KCSAN_EARLY_ENABLE, lib/Kconfig.kcsan)."""
    require_kcsan()
    before = _kcsan()
    assert before["enabled"] == 1, "KCSAN is in this kernel, and is off"
    waiting.wait_until(
        lambda: _kcsan()["setup_watchpoints"] > before["setup_watchpoints"], "KCSAN to set up another watchpoint"
    )


def test_kcsan_finds_a_data_race() -> None:
    """F_SETFL reads the flags of a file without the lock under which it writes them (setfl(), fs/fcntl.c).

    KCSAN is told not to report races there, so that the console stays clean. It counts them all the same.
    """
    require_kcsan()
    system.require_cpus(2)
    _KCSAN.write_text(f"!__{'x64' if os.uname().machine == 'x86_64' else 'arm64'}_sys_fcntl")
    reader, writer = os.pipe()

    def change_flags() -> None:
        for flag in (os.O_NONBLOCK, 0) * 100:
            fcntl.fcntl(reader, fcntl.F_SETFL, flag)

    def found() -> bool:
        change_flags()
        return _kcsan()["data_races"] > before

    before = _kcsan()["data_races"]
    try:
        with Busy(change_flags):
            waiting.wait_until(found, "KCSAN to find a data race")
    finally:
        os.close(reader)
        os.close(writer)
