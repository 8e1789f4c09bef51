# SPDX-License-Identifier: GPL-2.0
"""KSM's counters and knobs after moves."""

from __future__ import annotations

import errno
import os

import pytest

from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import maps, syscalls, system, userfault
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, move
from guest_tests.mm.proctree import Child
from guest_tests.support.found import places_of
from guest_tests.support.ksm_scenes import SAME, assert_merged, assert_unmerged, hugh


def test_run_2_unmerges_what_moved(area: CarveOut, ksm: Ksm) -> None:
    """Row 127 (run-2): a pair is moved and merged, and 2 is written to KSM's ``run``.

    ::

        moved and merged  | A | . | A |
        run = 2           | a | . | b |

    Every kernel: every page is un-merged, and no page is counted as shared.
    """
    pair = hugh(area, ksm)
    mm_ksm.write("run", 2)
    for mapping, other in ((pair.stayed, pair.moved), (pair.moved, pair.stayed)):
        assert_unmerged(mapping, [other])
    counters = ksm.counters()
    assert (counters.pages_shared, counters.pages_sharing) == (0, 0), counters
    pair.check()


def test_calling_merging_off_unmerges_what_moved(area: CarveOut, ksm: Ksm) -> None:
    """Row 128 (unmergeable-after): a pair is moved and merged, and the moved mapping is made unmergeable.

    ::

        moved and merged  | A | . | A |
        MADV_UNMERGEABLE  | A | . | b |    for the moved mapping

    Every kernel: the moved page has a frame of its own, also after further scans, and the mapping is not mergeable.
    """
    pair = hugh(area, ksm)
    pair.moved.madvise(syscalls.MADV_UNMERGEABLE)
    assert_unmerged(pair.moved, [pair.stayed])
    vma = maps.vma_at(pair.moved.address, detailed=True)
    if system.release() >= (6, 7, 0):  # before that smaps has no such line
        assert vma.size("KSM") == 0, vma
    assert "mg" not in vma.vm_flags, f"{vma} is still mergeable: {sorted(vma.vm_flags)}"
    ksm.scan()
    assert_unmerged(pair.moved, [pair.stayed])
    pair.check()


@pytest.mark.finding("ksm-fork-counters", match="a new child starts with")
def test_counters_of_a_process_follow_forks_moves_and_exits(area: CarveOut, ksm: Ksm) -> None:
    """Row 131 (counters): a process merges pages, forks twice, and each child moves its copy and ends.

    ::

        parent  | A A A A |             4 merged
        child   | A A A A |             inherited, 0 counted until ksmd sees them
        child   |         | a b c d |   moved

    Every kernel: each process counts what it has merged itself: a child starts at 0, and everything is 0 in the end.
    Before 4d6fc29f3634 (6.18) dup_mm() copies the parent's numbers and nothing resets them: finding ksm-fork-counters.
    """
    source = area.map(0, 4).fill_same(SAME)
    ksm.merge(source)
    assert mm_ksm.merging_pages() == 4
    for _ in range(2):
        with Child() as child:
            start = (mm_ksm.merging_pages(child.pid), mm_ksm.stat(child.pid).rmap_items)
            assert start == (0, 0), (
                f"a new child starts with {start[0]} merged pages and {start[1]} entries, not with 0"
            )
            child.call(move, source, area.page(10))
            ksm.scan()
            assert mm_ksm.merging_pages(child.pid) == 4
        assert mm_ksm.merging_pages() == 4, "the end of a child changed the parent's count"
    assert_merged(places_of(source))
    source.unmap()
    other = area.map(20, 1).fill().madvise(syscalls.MADV_MERGEABLE)  # ksmd sleeps if no memory is mergeable
    ksm.scan()
    assert mm_ksm.merging_pages() == 0
    counters = ksm.counters()
    assert (counters.pages_shared, counters.pages_sharing) == (0, 0), counters
    other.check()


@pytest.mark.finding("ksm-unmergeable-flags", match="cleared userfaultfd's minor flag")
def test_calling_merging_off_keeps_the_other_flags_of_a_mapping(area: CarveOut, ksm: Ksm) -> None:
    """Row 132 (cve-40040): a mapping that is registered for userfaultfd's minor faults is made unmergeable.

    VM_MERGEABLE was an unsigned int, so that its complement in ksm_madvise() has no upper half. MADV_UNMERGEABLE then
    cleared the upper half of the VMA's flags (CVE-2025-40040, fixed by f04aad36a07c): finding ksm-unmergeable-flags.

    Every kernel: the mapping is still registered.
    """
    try:
        faults = userfault.Userfault(userfault.FEATURE_MINOR_SHMEM)
    except OSError as error:
        pytest.skip(f"needs CONFIG_USERFAULTFD with minor faults of shared memory (5.14): {error}")
    with faults:
        fd = syscalls.memfd_create("minor")
        try:
            os.ftruncate(fd, 2 * PAGE_SIZE)
            mapping = area.map_file(0, 2, fd)
        finally:
            os.close(fd)
        mapping.madvise(syscalls.MADV_MERGEABLE)
        faults.register(mapping, userfault.MODE_MINOR)
        assert {"ui", "mg"} <= maps.vma_at(mapping.address, detailed=True).vm_flags
        mapping.madvise(syscalls.MADV_UNMERGEABLE)
        flags = maps.vma_at(mapping.address, detailed=True).vm_flags
        # A mapping that is registered and lacks the flag is a BUG() when the userfaultfd is closed
        # (userfaultfd_release_all(), mm/userfaultfd.c), and this process would hang.
        mapping.unmap()
    assert "mg" not in flags
    assert "ui" in flags, f"MADV_UNMERGEABLE cleared userfaultfd's minor flag too: {sorted(flags)} are left"


def _refused(knob: str, value: int | str, code: int) -> None:
    before = mm_ksm.read_text(knob)
    with pytest.raises(OSError, match=r".") as refused:
        mm_ksm.write(knob, value)
    name = errno.errorcode[refused.value.errno or 0]
    assert refused.value.errno == code, f"writing {value} to {knob} fails with {name}"
    assert mm_ksm.read_text(knob) == before, f"{knob} changed although {value} was refused"


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("run", 3),
        ("run", -1),
        ("max_page_sharing", 1),
        ("merge_across_nodes", 2),
        ("advisor_target_scan_time", 0),
        ("advisor_mode", "bogus"),
    ],
)
def test_values_out_of_range_are_refused(knob: str, value: int | str, ksm: Ksm) -> None:
    """Row 136 (knob-errors): a value out of range is written to a knob of KSM.

    Every kernel: EINVAL, and the knob keeps its value.
    """
    if not (mm_ksm.DIRECTORY / knob).exists():
        pytest.skip(f"this kernel has no {knob}")
    _refused(knob, value, errno.EINVAL)


def test_the_number_of_pages_to_scan_belongs_to_the_advisor(ksm: Ksm) -> None:
    """Row 136 (knob-errors): pages_to_scan is written while the advisor is active (6.8), and after it was turned off.

    Every kernel: EINVAL while the advisor is active, success afterwards.
    """
    if not (mm_ksm.DIRECTORY / "advisor_mode").exists():
        pytest.skip("needs Linux 6.8 (the KSM advisor)")
    mm_ksm.write("advisor_mode", "scan-time")
    _refused("pages_to_scan", 100, errno.EINVAL)
    mm_ksm.write("advisor_mode", "none")
    mm_ksm.write("pages_to_scan", 100)


@pytest.mark.parametrize(("knob", "value"), [("max_page_sharing", 3), ("merge_across_nodes", 0)])
def test_knobs_that_shape_the_trees_are_busy_while_pages_are_shared(
    knob: str, value: int, area: CarveOut, ksm: Ksm
) -> None:
    """Row 137 (knob-busy): max_page_sharing and merge_across_nodes are written while a moved page is merged, and after
    it was un-merged.

    ::

        moved and merged  | A | . | A |    EBUSY
        run = 2           | a | . | b |    accepted

    Every kernel: EBUSY while any page is merged, success afterwards.
    """
    if not (mm_ksm.DIRECTORY / knob).exists():
        pytest.skip(f"this kernel has no {knob}")
    pair = hugh(area, ksm)
    _refused(knob, value, errno.EBUSY)
    assert_merged(pair.places)
    ksm.unmerge_all()
    mm_ksm.write(knob, value)
    pair.check()
