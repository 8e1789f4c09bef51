# SPDX-License-Identifier: GPL-2.0
"""The audit of single pages: every way in which rmap walks can miss a page must be reported."""

from __future__ import annotations

import pytest

from harness.audit import layout, walk
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.kernel import VM_MIXEDMAP, VM_SHARED, Vma
from harness.audit.pagetable import EntryKind
from tests.audit_case import Case, errors_of
from tests.audit_case import case as case

# --- anonymous pages --------------------------------------------------------------------------------------------------


def test_a_stale_index_is_reported(case: Case) -> None:
    """A kernel that relocates a page without updating its index does this."""
    at = case.scene.moved[1]
    place = case.member(case.page(at), "folio.index")
    case.put(place, case.memory.u64(place) + 8)
    audit = case.audit()
    # the child maps the same page by fork
    assert errors_of(audit, DiscrepancyKind.WRONG_INDEX) == {(at, case.pfn(at))}
    assert {each.process for each in audit.errors} == {f"python3[{pid}]" for pid in (case.scene.pid, case.scene.child)}
    assert {each.kind for each in audit.errors} == {DiscrepancyKind.WRONG_INDEX}
    assert f"index {case.memory.u64(place):#x}" in audit.errors[0].sentence
    assert int(audit.errors[0].expected, 16) == case.memory.u64(place) - 8


def test_a_foreign_anon_vma_is_reported(case: Case) -> None:
    at, other = case.scene.moved[0], case.anon_vma(case.scene.huge)
    assert other.at != case.anon_vma(at).at
    case.put(case.member(case.page(at), "folio.mapping"), other.at | 1)
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.FOREIGN_ANON_VMA) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2
    assert f"{other.at:#x}" in audit.errors[0].sentence


def test_an_anon_vma_that_cannot_be_read_is_reported(case: Case) -> None:
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_FFFF_DEAD_0001)
    assert (at, case.pfn(at)) in errors_of(case.audit(), DiscrepancyKind.FOREIGN_ANON_VMA)


def test_a_mapping_whose_offset_is_wrong_is_reported(case: Case) -> None:
    """A kernel that changes the page offset of a moved VMA without relocating its pages does this."""
    vma = case.vma(case.scene.moved[0])
    case.put(case.member(vma.at, "vm_area_struct.vm_pgoff"), vma.pgoff + 8)
    if case.layout.has("vm_area_struct.__vm_anon_pgoff_lo"):
        place = case.member(vma.at, "vm_area_struct.__vm_anon_pgoff_lo")
        case.put(place, vma.pgoff + 8 & 0xFFFF_FFFF, "<I")
    found = case.audit()
    assert errors_of(found, DiscrepancyKind.WRONG_INDEX) == {(at, case.pfn(at)) for at in case.scene.moved}
    assert DiscrepancyKind.BROKEN_CHAIN in {each.kind for each in found.errors}, "the tree is no longer in order either"


def test_a_vma_that_left_its_tree_is_reported(case: Case) -> None:
    at = case.scene.moved[0]
    anon_vma = case.anon_vma(at)
    case.put(case.member(case.member(anon_vma.at, "anon_vma.rb_root"), "rb_root_cached.rb_root"), 0)
    found = case.audit()
    # the mapping from which it was moved belongs to the same anon_vma
    assert {(at, case.pfn(at)) for at in case.scene.moved} <= errors_of(found, DiscrepancyKind.UNREACHABLE)
    assert case.vma(at).at in {each.address for each in found.errors if each.kind is DiscrepancyKind.BROKEN_CHAIN}


def test_a_search_that_stops_too_early_is_reported(case: Case) -> None:
    """The tree holds the VMA, but rb_subtree_last makes searches skip it."""
    at = case.scene.moved[0]
    anon_vma = case.anon_vma(at)
    case.put(anon_vma.links[anon_vma.top].at + case.layout["anon_vma_chain.rb_subtree_last"], 1)
    found = case.audit()
    assert (at, case.pfn(at)) in errors_of(found, DiscrepancyKind.UNREACHABLE)
    assert any("searches may stop too early" in each.sentence for each in found.errors)


def test_a_wrong_index_of_a_locked_page_is_in_motion(case: Case) -> None:
    at = case.scene.moved[1]
    page = case.page(at)
    case.put(case.member(page, "folio.index"), 7)
    flags = case.member(page, "page.flags")
    case.put(flags, case.memory.u64(flags) | 1 << case.layout.flags["PG_locked"])
    audit = case.audit()
    assert audit.errors == ()
    assert {each.severity for each in audit.discrepancies} == {Severity.IN_MOTION}


# --- KSM pages --------------------------------------------------------------------------------------------------------


def test_an_rmap_item_with_another_address_is_reported(case: Case) -> None:
    at = case.scene.ksm[1]
    item = case.item(at)
    place = case.member(item.at, "ksm_rmap_item.address")
    case.put(place, case.memory.u64(place) + 16 * case.kernel.page_size)
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.UNREACHABLE) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2, "in the process and in its child, which is found by the same item"


def test_an_rmap_item_cut_from_its_list_is_reported(case: Case) -> None:
    """Removed as by hlist_del(), but the item still points to its stable node."""
    node = case.node()
    lost, kept = node.items[0], node.items[1]
    case.put(case.member(node.at, "ksm_stable_node.hlist"), case.member(kept.at, "ksm_rmap_item.hlist"))
    case.put(case.member(kept.at, "ksm_rmap_item.hlist") + 8, case.member(node.at, "ksm_stable_node.hlist"))
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length - 1, "<i")
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.UNREACHABLE) == {(lost.address, node.pfn)}
    assert errors_of(audit, DiscrepancyKind.BROKEN_CHAIN) == {(lost.at, node.pfn)}


def test_a_walk_by_address_is_reported_if_the_kernel_stores_an_index(case: Case) -> None:
    """A kernel that uses the address as the index finds every page except moved ones."""
    if not case.layout.has("ksm_rmap_item.linear_page_index"):
        pytest.skip("this kernel searches the full range: it stores no index that could be wrong")
    place = case.layout["ksm_rmap_item.linear_page_index"]
    for item in case.node().items:
        case.put(item.at + place, item.address >> case.kernel.page_shift)
    audit = case.audit()
    stayed, moved = case.scene.ksm
    assert errors_of(audit, DiscrepancyKind.WRONG_INDEX) == {(moved, case.pfn(moved))}
    assert stayed not in {each.address for each in audit.discrepancies}


def test_a_kernel_that_stores_no_index_searches_all_indexes(case: Case) -> None:
    """The layout decides this: the same dump, read as if items had no index, has no discrepancies."""
    if not case.layout.has("ksm_rmap_item.linear_page_index"):
        pytest.skip("this kernel stores no index to ignore")
    for item in case.node().items:
        case.put(item.at + case.layout["ksm_rmap_item.linear_page_index"], 1)
    offsets = {name: at for name, at in case.layout.offsets.items() if not name.endswith("linear_page_index")}
    older = layout.Layout(**{**vars(case.layout), "offsets": offsets})
    assert walk.audit(case.image, older).discrepancies == ()
    assert len(case.audit().errors) == 4


def test_an_rmap_item_of_a_foreign_anon_vma_is_reported(case: Case) -> None:
    at = case.scene.ksm[0]
    item = case.item(at)
    case.put(case.member(item.at, "ksm_rmap_item.anon_vma"), case.anon_vma(case.scene.huge).at)
    audit = case.audit()
    assert (at, case.pfn(at)) in errors_of(audit, DiscrepancyKind.FOREIGN_ANON_VMA)


def test_a_stable_node_of_another_page_is_reported(case: Case) -> None:
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.kpfn"), case.pfn(case.scene.stayed[0]))
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.STALE_RMAP_ITEM) == {(at, node.pfn) for at in case.scene.ksm}


def test_a_stable_node_whose_page_was_freed_is_a_note(case: Case) -> None:
    """Reclaim frees a KSM page without telling KSM. This is by design."""
    page = case.page(case.scene.ksm[0])
    node = case.node()
    for at in case.scene.ksm:
        for pid in (case.scene.pid, case.scene.child):
            case.put_entry(at, 0, pid)
    case.put(case.member(page, "folio.mapping"), 0)
    audit = case.audit()
    assert audit.errors == ()
    assert {each.severity for each in audit.discrepancies} == {Severity.NOTE}
    assert node.at in {each.address for each in audit.discrepancies}


def test_an_item_that_ksmd_will_remove_is_a_note(case: Case) -> None:
    """The process has written to the page, so the entry maps another page now. This is by design."""
    at = case.scene.ksm[1]
    case.put_entry(at, 0)
    audit = case.audit()
    notes = [each for each in audit.discrepancies if each.severity is Severity.NOTE]
    assert [each.kind for each in notes] == [DiscrepancyKind.STALE_RMAP_ITEM]
    assert f"{at:#x}" in notes[0].sentence
    # the test cleared the entry without changing the mapcount
    assert {each.kind for each in audit.errors} == {DiscrepancyKind.COUNT_MISMATCH}


# --- which pages are anonymous ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", [0, 0xFFFF_8880_0123_4560, 2])
def test_a_page_of_anonymous_memory_that_is_not_marked_so_is_reported(case: Case, mapping: int) -> None:
    """The mark of a page may be wrong, so it does not decide alone whether the page is audited."""
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), mapping)
    audit = case.audit(keep=lambda pid, address: (pid, address) == (case.scene.pid, at))
    assert errors_of(audit, DiscrepancyKind.UNREACHABLE) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2, "in the process and in its child"
    assert f"mapping is {mapping:#x}" in audit.errors[0].sentence
    assert [page.reached for page in audit.pages] == [False]


def test_a_huge_page_without_mapping_is_not_taken_for_the_huge_zero_page(case: Case) -> None:
    at = case.scene.huge
    case.put(case.member(case.page(at), "folio.mapping"), 0)
    assert (at, case.pfn(at)) in errors_of(case.audit(), DiscrepancyKind.UNREACHABLE)


def test_only_one_huge_page_is_taken_for_the_huge_zero_page(case: Case) -> None:
    huge = {page.pfn: page for page in case.audit(keep=lambda pid, address: True).pages if page.pages > 1}
    assert len(huge) > 1

    def clear(pfn: int) -> None:
        case.put(case.member(case.kernel.page(pfn), "folio.mapping"), 0)
        case.put(case.member(case.kernel.page(pfn), "folio._large_mapcount"), -1, "<i")

    first, *others = huge
    clear(first)
    assert case.audit().errors == ()
    for pfn in others:
        clear(pfn)
    assert {pfn for _, pfn in errors_of(case.audit(), DiscrepancyKind.UNREACHABLE)} == set(others)


def test_pages_that_a_driver_maps_are_not_anonymous(case: Case) -> None:
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), 0)
    for pid in (case.scene.pid, case.scene.child):
        place = case.member(case.vma(at, pid).at, "vm_area_struct.vm_flags")
        case.put(place, case.memory.u64(place) | VM_MIXEDMAP)
    assert case.audit().errors == ()


def written_page_of_a_file(case: Case, writable: bool) -> tuple[int, Vma]:
    """A page in a private file mapping whose entry is writable or not, and its VMA."""
    for vma in case.kernel.vmas(case.mm(case.scene.pid)):
        if not vma.ops or vma.flags & (VM_SHARED | VM_MIXEDMAP):
            continue
        for at in range(vma.start, vma.end, case.kernel.page_size):
            entry = case.kernel.tables.decode(case.entry(at), 0)
            if entry.kind is EntryKind.PAGE and entry.writable is writable:
                return at, vma
    raise AssertionError("the scene has no such page")


@pytest.mark.parametrize("mapping", [0, 0xFFFF_8880_0123_4560])
def test_a_writable_page_of_a_private_file_mapping_must_be_marked_as_anonymous(case: Case, mapping: int) -> None:
    at, _ = written_page_of_a_file(case, writable=True)
    case.put(case.member(case.page(at), "folio.mapping"), mapping)
    audit = case.audit()
    assert errors_of(audit, DiscrepancyKind.UNREACHABLE) == {(at, case.pfn(at))}
    assert "a private file mapping, and the entry is writable" in audit.errors[0].sentence


def test_a_read_only_page_of_a_file_is_not_anonymous(case: Case) -> None:
    at, _ = written_page_of_a_file(case, writable=False)
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_8880_0123_4560)
    assert case.audit().errors == ()


@pytest.mark.parametrize("flag", [VM_SHARED, VM_MIXEDMAP])
def test_a_writable_page_of_a_shared_file_or_a_driver_is_not_anonymous(case: Case, flag: int) -> None:
    at, vma = written_page_of_a_file(case, writable=True)
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_8880_0123_4560)
    case.put(case.member(vma.at, "vm_area_struct.vm_flags"), vma.flags | flag)
    assert case.audit().errors == ()


def test_a_ksm_page_on_a_kernel_without_ksm_is_reported(case: Case) -> None:
    offsets = {name: at for name, at in case.layout.offsets.items() if not name.startswith("ksm_")}
    without = layout.Layout(**{**vars(case.layout), "offsets": offsets})
    audit = walk.audit(case.image, without)
    assert errors_of(audit, DiscrepancyKind.UNREACHABLE) == {(at, case.pfn(at)) for at in case.scene.ksm}
