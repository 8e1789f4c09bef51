# SPDX-License-Identifier: GPL-2.0
"""Tests of the library on the kernel under test: system calls, mappings, carve-outs, pages."""

from __future__ import annotations

import errno
import pickle
import platform

import pytest

from guest_tests.mm import kpage, maps, pagemap, syscalls, system, waiting
from guest_tests.mm.kpage import Flag
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, map_anonymous, move
from guest_tests.mm.proctree import Child

pytestmark = pytest.mark.shared_guest


# --- system calls ------------------------------------------------------------------------------------------------


def test_a_failed_call_says_what_was_called_with_what_and_why(area: CarveOut) -> None:
    area.hole(0, 5)
    with pytest.raises(OSError, match=rf"mremap\({area.address:#x}, .*\) failed: EFAULT") as caught:
        syscalls.mremap(area.address, PAGE_SIZE, PAGE_SIZE, syscalls.MREMAP_MAYMOVE)
    assert caught.value.errno == errno.EFAULT


@pytest.mark.parametrize("bit", [5, 31, 32, 40, 63])
def test_every_bit_of_the_flags_reaches_the_kernel(area: CarveOut, bit: int) -> None:
    source = area.map(0, 1).fill()
    with pytest.raises(OSError, match="EINVAL"):
        move(source, area.page(10), 1 << bit)
    source.check()


def test_negative_arguments_are_passed_as_all_ones() -> None:
    with pytest.raises(OSError, match="EBADF"):
        syscalls.mmap(0, PAGE_SIZE, syscalls.PROT_READ, syscalls.MAP_PRIVATE, fd=-1)


def test_an_unknown_call_is_refused_before_the_kernel_sees_it() -> None:
    with pytest.raises(NotImplementedError, match=r"no number for frobnicate\(\)"):
        syscalls.call("frobnicate")


def test_both_machines_know_the_same_calls() -> None:
    assert syscalls.NUMBERS["x86_64"].keys() == syscalls.NUMBERS["aarch64"].keys()


def test_a_sealed_mapping_does_not_move() -> None:
    system.require_kernel(6, 10, "mseal")
    with Child() as child:  # sealed memory can only go away with its process
        child.call(_seal_and_move)


def _seal_and_move() -> None:
    sealed = map_anonymous(1).fill()
    syscalls.mseal(sealed.address, sealed.length)
    with carve_out(1) as area, pytest.raises(PermissionError, match="EPERM"):
        move(sealed, area.address)
    sealed.check()


# --- mappings ----------------------------------------------------------------------------------------------------


def test_every_page_holds_its_own_pattern(area: CarveOut) -> None:
    mapping = area.map(0, 8).fill(seed=3)
    mapping.check()
    assert len({mapping.read(index) for index in range(8)}) == 8
    assert mapping.read(0) != area.map(10, 1).fill(seed=4).read(0)


def test_fresh_memory_is_expected_to_be_zero(area: CarveOut) -> None:
    area.map(0, 3).check()


@pytest.mark.parametrize("offset", [0, 17, PAGE_SIZE - 1], ids=["first", "other", "last"])
def test_one_wrong_byte_is_found_and_named(area: CarveOut, offset: int) -> None:
    mapping = area.map(0, 5).fill()
    right = mapping.read(3)
    wrong = bytes(
        [*right[:offset], right[offset] ^ 1, *right[offset + 1 :]],
    )
    Mapping(mapping.address, 5).write(3, wrong)  # through another object, so that ``mapping`` expects the old data
    expected = f"page 3 of mapping {mapping.address:#x} .* byte {wrong[offset]:#04x} at offset {offset}, expected"
    with pytest.raises(AssertionError, match=expected):
        mapping.check()


def test_a_lost_page_is_called_lost(area: CarveOut) -> None:
    mapping = area.map(0, 5).fill()
    mapping.part(2).madvise(syscalls.MADV_DONTNEED)
    with pytest.raises(AssertionError, match=r"page 2 .*data .*was lost"):
        mapping.check()


def test_a_page_in_the_wrong_place_is_recognised(area: CarveOut) -> None:
    mapping = area.map(0, 5).fill()
    Mapping(mapping.address, 5).write(1, mapping.read(4))
    with pytest.raises(AssertionError, match=r"page 1 .* holds what page 4 should hold"):
        mapping.check()


def test_a_part_knows_what_it_should_hold(area: CarveOut) -> None:
    mapping = area.map(0, 6).fill()
    part = mapping.part(2, 3).check()
    assert (part.address, part.pages) == (mapping.page(2), 3)
    with pytest.raises(IndexError, match="no pages 5 to 6"):
        mapping.part(5, 2)


def test_a_mapping_survives_pickling(area: CarveOut) -> None:
    mapping = area.map(0, 3).fill(seed=9)
    assert pickle.loads(pickle.dumps(mapping)).check() == mapping


def test_a_move_carries_the_data_and_what_is_expected(area: CarveOut) -> None:
    source = area.map(0, 5).fill()
    moved = move(source, area.page(10))
    assert moved.address == area.page(10)
    moved.check()
    assert not maps.vmas_between(source.address, source.end)


def test_a_growing_move_appends_zeros(area: CarveOut) -> None:
    moved = move(area.map(0, 3).fill(), area.page(10), pages=6).check()
    assert moved.pages == 6
    assert not any(moved.read(5))


def test_dontunmap_leaves_the_source_empty(area: CarveOut) -> None:
    source = area.map(0, 3).fill()
    moved = move(source, area.page(10), syscalls.MREMAP_DONTUNMAP)
    moved.check()
    source.check()
    assert not any(source.read(0))


def test_touching_changes_nothing_but_makes_pages_present(area: CarveOut) -> None:
    mapping = area.map(0, 4)
    mapping.touch([1, 3])
    assert [entry.present for entry in pagemap.entries(mapping.address, 4)] == [False, True, False, True]
    mapping.check()


# --- carve-outs --------------------------------------------------------------------------------------------------


def test_nothing_merges_with_the_reservation(area: CarveOut) -> None:
    inside = area.map(5, 5, prot=syscalls.PROT_NONE)
    vma = maps.vma_at(inside.address)
    assert (vma.start, vma.end) == (inside.address, inside.end)


def test_a_carve_out_is_aligned_for_huge_pages(area: CarveOut) -> None:
    assert area.address % (1 << 30) == 0


def test_the_kernel_puts_nothing_into_a_hole(area: CarveOut) -> None:
    area.hole(0, area.pages)
    others = [map_anonymous(1) for _ in range(50)]
    try:
        assert not maps.vmas_between(area.address, area.end)
    finally:
        for other in others:
            other.unmap()


def test_nothing_is_left_of_a_carve_out() -> None:
    with carve_out(10) as area:
        area.map(2, 3).fill()
        moved = area.map(6, 2).fill()
        move(moved, area.page(8))
    assert not maps.vmas_between(area.address - (1 << 24), area.end + (1 << 24))


def test_two_carve_outs_do_not_meet() -> None:
    with carve_out(10) as first, carve_out(10) as second:
        assert first.address != second.address
        second.map(0, 10).fill().check()
        first.map(0, 10).fill(seed=1)


def test_places_outside_a_carve_out_are_refused(area: CarveOut) -> None:
    with pytest.raises(IndexError, match="not in a carve-out of 40 pages"):
        area.map(38, 3)
    with pytest.raises(IndexError, match="no page 41"):
        area.page(41)


# --- maps --------------------------------------------------------------------------------------------------------


def test_maps_and_smaps_show_the_same_mapping(area: CarveOut) -> None:
    mapping = area.map(0, 4).touch()
    brief = maps.vma_at(mapping.address)
    full = maps.vma_at(mapping.address, detailed=True)
    assert (
        (brief.start, brief.end, brief.perms)
        == (full.start, full.end, full.perms)
        == (
            mapping.address,
            mapping.end,
            "rw-p",
        )
    )
    assert full.size("Anonymous") == full.size("Rss") == 4 * PAGE_SIZE // 1024
    assert {"rd", "wr"} <= full.vm_flags
    assert maps.kilobytes(mapping.address, mapping.end, "Size") == 4 * PAGE_SIZE // 1024


@pytest.mark.parametrize("detailed", [False, True], ids=["maps", "smaps"])
def test_mappings_in_a_range_are_those_that_overlap_it(area: CarveOut, detailed: bool) -> None:
    area.map(2, 2)
    area.hole(4, 1)
    everything = maps.vmas(detailed=detailed)
    assert len(everything) > 50, "an interpreter has more mappings than that"
    # Elsewhere the interpreter maps and unmaps memory of its own between two looks.
    for start, end in ((area.page(3), area.page(6)), (area.page(4), area.page(5)), (area.address, area.end)):
        ranges = [(each.start, each.end) for each in everything if each.start < end and each.end > start]
        found = maps.vmas_between(start, end, detailed=detailed)
        assert [(each.start, each.end) for each in found] == ranges


def test_nothing_mapped_is_an_error_that_names_the_address(area: CarveOut) -> None:
    area.hole(3, 1)
    with pytest.raises(LookupError, match=f"{area.page(3):#x}"):
        maps.vma_at(area.page(3))


def test_mergeable_memory_is_marked(area: CarveOut) -> None:
    system.require_config("KSM")
    mapping = area.map(0, 2).madvise(syscalls.MADV_MERGEABLE)
    assert "mg" in maps.vma_at(mapping.address, detailed=True).vm_flags


def test_names_of_anonymous_memory_are_read_back(area: CarveOut) -> None:
    system.require_vma_names()
    mapping = area.map(0, 2)
    syscalls.name_anonymous(mapping.address, mapping.length, "a name")
    assert maps.vma_at(mapping.address).name == "a name"


def test_the_query_agrees_with_the_text(area: CarveOut) -> None:
    system.require_kernel(6, 11, "PROCMAP_QUERY")
    mapping = area.map(7, 4)
    queried = maps.query(mapping.page(2))
    assert queried is not None
    assert (queried.start, queried.end, queried.page_size) == (mapping.address, mapping.end, PAGE_SIZE)
    assert queried.flags == maps.VMA_READABLE | maps.VMA_WRITABLE
    area.hole(0, 1)
    assert maps.query(area.address) is None


def test_a_kernel_without_the_query_says_enotty() -> None:
    if system.release() >= (6, 11, 0):
        pytest.skip("needs a kernel before 6.11")
    with pytest.raises(OSError, match="ioctl") as caught:
        maps.query(0)
    assert caught.value.errno == errno.ENOTTY


def test_paths_with_blanks_and_brackets_are_parsed() -> None:
    text = "00400000-00401000 r-xp 00001000 fe:0a 12       /a (b) [c] (deleted)\n7f00-7fff ---p 00000000 00:00 0 \n"
    first, second = maps.parse_maps(text)
    assert (first.path, first.offset, first.dev, first.inode) == ("/a (b) [c] (deleted)", 0x1000, "fe:0a", 12)
    assert (second.path, second.length) == ("", 0xFF)
    with pytest.raises(ValueError, match="not a line"):
        maps.parse_maps("nonsense")


# --- pages and frames --------------------------------------------------------------------------------------------


def test_frames_of_touched_pages_are_known_and_distinct(area: CarveOut) -> None:
    mapping = area.map(0, 6).fill()
    numbers = pagemap.pfns(mapping.address, 6)
    assert None not in numbers
    assert len(set(numbers)) == 6
    area.hole(10, 1)
    with pytest.raises(LookupError, match="no page is present"):
        pagemap.pfn(area.page(10))


def test_a_move_keeps_the_frames(area: CarveOut) -> None:
    source = area.map(0, 4).fill()
    before = pagemap.pfns(source.address, 4)
    assert pagemap.pfns(move(source, area.page(10)).address, 4) == before


def test_flags_of_anonymous_and_zero_pages(area: CarveOut) -> None:
    mapping = area.map(0, 2).touch([0]).touch_read([1])
    assert Flag.ANON in kpage.flags_at(mapping.page(0))
    assert Flag.ZERO_PAGE in kpage.flags_at(mapping.page(1))
    assert "ANON" in kpage.describe(pagemap.pfn(mapping.page(0)))


def test_map_counts_follow_a_fork(area: CarveOut) -> None:
    mapping = area.map(0, 1).fill()
    number = pagemap.pfn(mapping.address)
    assert kpage.mapcount(number) == 1
    with Child() as child:
        assert kpage.mapcount(number) == 2
        assert pagemap.pfn(mapping.address, child.pid) == number
        child.call(mapping.fill, 5)
        assert kpage.mapcount(number) == 1
        assert child.call(pagemap.pfn, mapping.address) != number
    mapping.check()


def test_the_scan_finds_what_is_present(area: CarveOut) -> None:
    system.require_kernel(6, 7, "PAGEMAP_SCAN")
    mapping = area.map(0, 6).touch([1, 2, 5])
    present = pagemap.PAGE_IS_PRESENT
    found = pagemap.scan(mapping.address, 6, present, all_of=present)
    assert [(region.start, region.end) for region in found] == [
        (mapping.page(1), mapping.page(3)),
        (mapping.page(5), mapping.end),
    ]


def test_guard_regions_show_in_pagemap(area: CarveOut) -> None:
    system.require_kernel(6, 15, "guard regions in pagemap")
    mapping = area.map(0, 3).fill()
    mapping.part(1).madvise(syscalls.MADV_GUARD_INSTALL)
    assert [entry.guard for entry in pagemap.entries(mapping.address, 3)] == [False, True, False]


# --- the kernel and waiting --------------------------------------------------------------------------------------


def test_the_release_is_the_running_kernels() -> None:
    assert platform.release().startswith("{}.{}".format(*system.release()))


def test_configurations_are_parsed() -> None:
    text = '# a comment\nCONFIG_KSM=y\n# CONFIG_NUMA is not set\nCONFIG_ZRAM=m\nCONFIG_LOCALVERSION="-x"\n'
    assert system.parse_config(text) == {"KSM": "y", "ZRAM": "m", "LOCALVERSION": "-x"}


def test_a_missing_option_is_named_in_the_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "kernel_config", lambda: {"NUMA": "y"})
    system.require_config("NUMA")
    with pytest.raises(pytest.skip.Exception, match="needs CONFIG_KSM=y: this kernel has it off"):
        system.require_config("NUMA", "KSM")


def test_where_the_configuration_is_not_known_the_test_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "kernel_config", lambda: None)
    system.require_config("KSM")
    assert system.has_config("KSM") is None


def test_asking_for_relocation_leaves_nothing_behind() -> None:
    system.supports_relocate.cache_clear()
    before = len(maps.vmas())
    assert system.supports_relocate() in (True, False)
    assert abs(len(maps.vmas()) - before) <= 1


def test_a_wait_ends_with_a_sentence() -> None:
    with pytest.raises(TimeoutError, match="gave up waiting for godot"):
        waiting.wait_until(lambda: False, "godot", seconds=0.01)
    assert 1.0 <= waiting.slowness() <= 6.0
