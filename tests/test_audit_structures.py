# SPDX-License-Identifier: GPL-2.0
"""The audit of everything but single pages: stray entries, counters, pointers, lists and trees."""

from __future__ import annotations

import re
import struct

import pytest

from harness.audit.discrepancies import DiscrepancyKind
from harness.audit.kernel import Vma
from harness.audit.memory import DumpError
from tests.audit_case import Case, errors_of
from tests.audit_case import case as case

# --- entries outside VMAs ---------------------------------------------------------------------------------------------


def left_behind(case: Case) -> int:
    """Map a moved page at its old address again, where no VMA is any more; returns that address.

    VMA   |AABB  CCCC|      |BB|
    pages |AA  B  CCC|      | B|      a move that forgets one entry does this
    """
    came_to = case.scene.moved[0]
    came_from = came_to - 8 * case.kernel.page_size
    assert not any(each.start <= came_from < each.end for each in case.kernel.vmas(case.mm(case.scene.pid)))
    case.put_entry(came_from, case.entry(came_to))
    case.put_entry(came_to, 0)
    return came_from


def test_a_page_that_a_move_left_behind_is_reported(case: Case) -> None:
    pfn = case.pfn(case.scene.moved[0])
    at = left_behind(case)
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.STRAY_ENTRY) == {(at, pfn)}
    assert len(audit.errors) == 1, "the kernel counts this mapping, and it is there"
    assert audit.errors[0].process == f"python3[{case.scene.pid}]"
    assert f"maps pfn {pfn:#x} at {at:#x}, where it has no VMA" in audit.errors[0].sentence


def test_a_page_that_is_mapped_at_its_old_and_new_address_has_a_wrong_mapcount(case: Case) -> None:
    entry, page = case.entry(case.scene.moved[0]), case.page(case.scene.moved[0])
    at = left_behind(case)
    case.put_entry(case.scene.moved[0], entry)
    audit = case.audit()
    assert {address for address, _ in errors_of(audit, DiscrepancyKind.STRAY_ENTRY)} == {at}
    assert {address for address, _ in errors_of(audit, DiscrepancyKind.COUNT_MISMATCH)} == {page}


def test_a_swap_entry_outside_of_vmas_is_reported(case: Case) -> None:
    at = left_behind(case)
    case.put_entry(at, 1 << 59 | 1 << 40 if case.layout.arch == "x86_64" else 1 << 12 | 1 << 6)
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.STRAY_ENTRY) == {(at, None)}


def test_the_gaps_before_the_first_vma_and_after_the_last_are_audited(case: Case) -> None:
    first, *_, last = case.kernel.vmas(case.mm(case.scene.pid))
    huge = first.start - (2 << 20)  # where no table of small pages is
    case.put_entry(huge, case.entry(case.scene.huge))
    case.put_entry(last.end, case.entry(case.scene.stayed[0]))
    assert {at for at, _ in errors_of(case.audit(), DiscrepancyKind.STRAY_ENTRY)} == {huge, last.end}


def test_a_table_in_a_gap_that_cannot_be_read_is_reported(case: Case) -> None:
    pgd = case.memory.translate(case.memory.u64(case.member(case.mm(case.scene.pid), "mm_struct.pgd")))
    vmas = case.kernel.vmas(case.mm(case.scene.pid))
    top = case.kernel.tables.span(case.kernel.tables.levels - 1)
    used = {at // top for each in vmas for at in (each.start, each.end - 1)}
    free = next(index for index in range(256) if index not in used)
    buffer, offset = case.memory.unit(pgd >> 12)
    struct.pack_into("<Q", buffer, offset + 8 * free, 0x7FFF_FFFF_F000 | (0x67 if case.layout.arch == "x86_64" else 3))
    audit = case.audit()
    sentences = [each.sentence for each in audit.errors if each.kind is DiscrepancyKind.BAD_POINTER]
    assert any(re.search("for the gap [0-9a-f]+-[0-9a-f]+ between VMAs cannot be read", each) for each in sentences)


@pytest.mark.parametrize("count", [1, 0x100, 0x502])
def test_an_entry_that_munmap_will_clear_is_in_motion(case: Case, count: int) -> None:
    """It removes the VMAs from the VMA tree first. When it clears entries, it may hold mmap_lock for reading only."""
    at = left_behind(case)
    case.lock_mm(case.scene.pid, count)
    audit = case.audit()
    assert audit.errors == ()
    assert [(each.kind, each.address) for each in audit.discrepancies] == [(DiscrepancyKind.STRAY_ENTRY, at)]


def test_a_vma_that_munmap_will_free_is_in_motion(case: Case) -> None:
    """The VMA tree no longer holds the VMA, but its anon_vmas still do, and mmap_lock is held for reading."""
    vma = case.vma(case.scene.moved[0])
    case.detach(vma)
    wrong = case.audit().errors
    assert any(f"leads to a VMA at {vma.at:#x} that belongs to no process" in each.sentence for each in wrong)
    assert {DiscrepancyKind.STALE_RMAP_ITEM, DiscrepancyKind.COUNT_MISMATCH, DiscrepancyKind.STRAY_ENTRY} <= {
        each.kind for each in wrong
    }
    case.lock_mm(case.scene.pid, 256)
    audit = case.audit()
    assert audit.errors == ()
    assert {each.kind for each in audit.discrepancies} == {DiscrepancyKind.STRAY_ENTRY}


# --- counters, pointers, loops ----------------------------------------------------------------------------------------


def test_a_wrong_mapcount_is_reported(case: Case) -> None:
    at = case.scene.stayed[2]
    page = case.page(at)
    case.put(case.member(page, "folio._mapcount"), 2, "<i")
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.COUNT_MISMATCH) == {(page, case.pfn(at))}
    assert (audit.errors[0].expected, audit.errors[0].actual) == ("2", "3"), "the process and its child"


@pytest.mark.parametrize("counter", ["num_children", "num_active_vmas"])
def test_a_wrong_count_of_an_anon_vma_is_reported(case: Case, counter: str) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    place = case.member(anon_vma.at, f"anon_vma.{counter}")
    case.put(place, case.memory.u64(place) + 1)
    assert errors_of(case.audit(), DiscrepancyKind.COUNT_MISMATCH) == {(anon_vma.at, None)}


def test_an_anon_vma_that_will_be_freed_too_early_is_reported(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    case.put(case.member(anon_vma.at, "anon_vma.refcount"), 0, "<i")
    audit = case.audit()
    assert (anon_vma.at, None) in errors_of(audit, DiscrepancyKind.COUNT_MISMATCH)
    assert any("freed too early" in each.sentence for each in audit.errors)


def test_an_entry_that_maps_no_page_is_reported(case: Case) -> None:
    at = case.scene.stayed[0]
    case.put_entry(at, case.entry(at) | 0xFFF << 36)
    assert at in {address for address, _ in errors_of(case.audit(), DiscrepancyKind.BAD_POINTER)}


def test_a_list_with_a_loop_is_reported(case: Case) -> None:
    node = case.node()
    last = case.member(node.items[-1].at, "ksm_rmap_item.hlist")
    case.put(last, case.member(node.items[0].at, "ksm_rmap_item.hlist"))
    audit = case.audit()
    assert any("does not end" in each.sentence for each in audit.errors)


def test_a_tree_with_a_loop_is_reported(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    leaf = next(node for node, link in anon_vma.links.items() if not link.left and not link.right)
    case.put(leaf + case.layout["rb_node.rb_left"], anon_vma.top)
    audit = case.audit()
    assert any(f"reaches the node at {anon_vma.top:#x} twice" in each.sentence for each in audit.errors)


def test_page_tables_with_a_loop_are_reported(case: Case) -> None:
    """Every entry of the top table points to the top table itself. Following them all would never end."""
    pgd = case.memory.translate(case.memory.u64(case.member(case.mm(case.scene.pid), "mm_struct.pgd")))
    buffer, offset = case.memory.unit(pgd >> 12)
    pointer = pgd | (0x67 if case.layout.arch == "x86_64" else 3)
    buffer[offset : offset + 4096] = struct.pack("<Q", pointer) * 512
    first = case.kernel.vmas(case.mm(case.scene.pid))[0]
    case.put(case.member(first.at, "vm_area_struct.vm_end"), 1 << 46)
    audit = case.audit()
    sentences = [each.sentence for each in audit.errors]
    assert any("page tables" in each and "is used as a page table for two address ranges" in each for each in sentences)


def test_a_task_list_with_a_loop_is_refused_as_a_damaged_dump(case: Case) -> None:
    tasks = case.layout["task_struct.tasks"]
    first = case.kernel.symbol("init_task")
    second = case.memory.u64(first + tasks)
    case.put(case.memory.u64(second), second)
    with pytest.raises(DumpError, match="does not end"):
        case.audit()


def test_a_vma_tree_that_cannot_be_read_is_reported(case: Case) -> None:
    mm = case.mm(case.scene.pid)
    case.put(mm + case.layout["mm_struct.mm_mt"] + case.layout["maple_tree.ma_root"], 0xFFFF_FFFF_DEAD_001E)
    audit = case.audit()
    assert [each.kind for each in audit.errors] == [DiscrepancyKind.BAD_POINTER], (
        "an unreadable VMA tree must not cause other errors"
    )
    assert "the VMA tree of" in audit.errors[0].sentence
    assert DiscrepancyKind.STRAY_ENTRY not in {each.kind for each in audit.discrepancies}


# --- trees and lists that contradict each other -----------------------------------------------------------------------


def two_links(case: Case) -> tuple[Vma, int, int]:
    """A VMA that is linked to two anon_vmas, its link to its own anon_vma, and its other link."""
    own, other = case.layout["anon_vma_chain.same_vma"], case.layout["anon_vma_chain.anon_vma"]
    for vma in case.kernel.vmas(case.mm(case.scene.child)):
        head = case.member(vma.at, "vm_area_struct.anon_vma_chain")
        first = case.memory.u64(head)
        second = case.memory.u64(first)
        if first != head and second != head and case.memory.u64(second) == head:
            links = sorted((first - own, second - own), key=lambda at: case.memory.u64(at + other) != vma.anon_vma)
            if case.memory.u64(links[0] + other) == vma.anon_vma:
                return vma, *links
    raise AssertionError("no VMA belongs to two anon_vmas")


def test_a_link_that_its_vma_does_not_list_is_reported(case: Case) -> None:
    """Such a link stays in the tree when the VMA is freed."""
    vma, kept, lost = two_links(case)
    head, offset = case.member(vma.at, "vm_area_struct.anon_vma_chain"), case.layout["anon_vma_chain.same_vma"]
    case.put(head, kept + offset)
    case.put(kept + offset, head)
    audit = case.audit()
    other = case.memory.u64(lost + case.layout["anon_vma_chain.anon_vma"])
    assert errors_of(audit, DiscrepancyKind.BROKEN_CHAIN) == {(other, None)}
    wrong = f"holds the anon_vma_chain at {lost:#x} of VMA {vma}, but the list of this VMA does not"
    assert any(wrong in each.sentence for each in audit.errors)


def test_a_vma_that_is_linked_to_an_anon_vma_twice_is_reported(case: Case) -> None:
    vma, first, second = two_links(case)
    place = case.layout["anon_vma_chain.anon_vma"]
    own = case.memory.u64(first + place)
    case.put(second + place, own)
    sentences = [each.sentence for each in case.audit().errors]
    assert any(f"{vma} of" in each and "twice" in each for each in sentences)
    wrong = f"its interval tree holds the anon_vma_chain at {second:#x}, which points to anon_vma {own:#x}"
    assert any(wrong in each for each in sentences), "the link is still in the tree of its other anon_vma"


@pytest.mark.parametrize("whole", [True, False])
def test_a_tree_node_with_a_wrong_parent_is_reported(case: Case, whole: bool) -> None:
    """After the nodes below it, a search continues at the parent of a node."""
    anon_vma = case.anon_vma(case.scene.moved[0])
    assert len(anon_vma.links) > 1
    node = next(each for each in anon_vma.links if each != anon_vma.top)
    place = case.member(node, "rb_node.__rb_parent_color")
    case.put(place, case.memory.u64(place) & 3)
    audit = case.audit(pids=[] if whole else [case.scene.pid])
    assert errors_of(audit, DiscrepancyKind.BROKEN_CHAIN) == {(anon_vma.at, None)}
    assert f"is a child of {anon_vma.links[node].parent:#x}" in audit.errors[0].sentence


def test_the_trees_are_checked_if_only_some_processes_are_audited(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    case.put(anon_vma.links[anon_vma.top].at + case.layout["anon_vma_chain.rb_subtree_last"], 1 << 40)
    assert any("searches may stop too early" in each.sentence for each in case.audit(pids=[case.scene.pid]).errors)


def test_a_list_of_links_with_a_loop_is_reported(case: Case) -> None:
    """The only link points to no anon_vma, and is its own successor."""
    vma = case.vma(case.scene.moved[0])
    link = case.memory.u64(case.member(vma.at, "vm_area_struct.anon_vma_chain"))
    at = link - case.layout["anon_vma_chain.same_vma"]
    case.put(case.member(at, "anon_vma_chain.anon_vma"), 0)
    case.put(link, link)
    audit = case.audit()
    assert any("does not end" in each.sentence and str(vma) in each.sentence for each in audit.errors)
