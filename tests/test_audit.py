# SPDX-License-Identifier: GPL-2.0
"""The audit of small dumps of real guests, intact and damaged. Each damage to the reverse map must be reported.

The dumps are damaged in memory after they are opened, because there is no broken kernel for most cases.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from harness.audit import layout, memory, walk
from harness.audit.findings import MOST_FINDINGS, Audit, Kind, Severity
from harness.audit.kernel import VM_MIXEDMAP, VM_SHARED, Kernel, Vma
from harness.audit.ledger import Ledger
from harness.audit.live import Auditor, seen_always
from harness.audit.memory import DumpError, ElfImage
from harness.audit.pagetable import Kind as EntryKind
from harness.audit.rmap import AnonVma, Item, ReverseMap, StableNode
from harness.deadline import Deadline
from harness.errors import HarnessError
from tests.audit_scene import DUMPS, Scene

NAMES = ("x86_64-7.3.4", "arm64-6.12.117")


class Case:
    """An opened dump, with the hands to change it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.path = directory / name
        packed = (DUMPS / f"{name}.elf.zst").read_bytes()
        self.path.write_bytes(zstandard.ZstdDecompressor().decompress(packed))
        self.layout = layout.Layout.from_json((DUMPS / f"{name}.layout.json").read_text())
        self.scene = Scene(**json.loads((DUMPS / f"{name}.scene.json").read_text()))
        self.image = ElfImage(self.path)
        self.kernel = Kernel(self.image, self.layout)
        self.memory = self.kernel.memory
        self.rmap = ReverseMap(self.kernel)

    def audit(self, **options: object) -> Audit:
        return walk.audit(self.image, self.layout, **options)  # type: ignore[arg-type]

    def put(self, address: int, value: int, form: str = "<Q") -> None:
        """Change kernel memory."""
        buffer, offset = self.memory.where(address)
        struct.pack_into(form, buffer, offset, value)

    def member(self, at: int, name: str) -> int:
        return at + self.layout[name]

    def lock(self, semaphore: int, count: int = 1) -> None:
        """Give an rw_semaphore a writer (1), or readers (256 for each)."""
        self.put(self.member(semaphore, "rw_semaphore.count"), count)

    def lock_mm(self, pid: int, count: int = 1) -> None:
        self.lock(self.member(self.mm(pid), "mm_struct.mmap_lock"), count)

    def set_ksm_to_work(self) -> None:
        """Have the mutex of ksmd held: by taking a word for it that is not 0."""
        word = self.layout.symbols["init_task"] + self.layout["task_struct.tasks"] - self.layout["mutex.owner"]
        self.layout = replace(self.layout, symbols={**self.layout.symbols, "ksm_thread_mutex": word})

    def end(self, pid: int) -> None:
        """Take a process out of the list of tasks."""
        mm = self.mm(pid)
        tasks, task = self.layout["task_struct.tasks"], self.kernel.symbol("init_task")
        while self.memory.u64(task + self.layout["task_struct.mm"]) != mm:
            place, task = task + tasks, self.memory.u64(task + tasks) - tasks
        self.put(place, self.memory.u64(task + tasks))

    def detach(self, vma: Vma) -> None:
        """Take a VMA out of the tree of its process."""
        layout = self.layout
        nodes = [self.memory.u64(vma.mm + layout["mm_struct.mm_mt"] + layout["maple_tree.ma_root"])]
        while nodes:
            node = nodes.pop()
            kind = node >> 3 & 15
            name = "maple_arange_64" if kind == 3 else "maple_range_64"
            for index in range(layout.slots[kind == 3]):
                place = (node & ~255) + layout[f"{name}.slot"] + 8 * index
                slot = self.memory.u64(place)
                if slot == vma.at:
                    self.put(place, 0)
                    return
                if kind != 1 and slot >> 63:
                    nodes.append(slot)
        raise AssertionError(f"{vma} is not in the tree of VMAs")

    # --- finding things in the scene

    def mm(self, pid: int) -> int:
        (mm,) = (each.mm for each in self.kernel.processes() if each.pid == pid)
        return mm

    def vma(self, address: int, pid: int | None = None) -> Vma:
        vmas = self.kernel.vmas(self.mm(pid or self.scene.pid))
        (vma,) = (each for each in vmas if each.start <= address < each.end)
        return vma

    def entry(self, address: int) -> int:
        """The page-table entry for a user address."""
        return int(struct.unpack("<Q", self.memory.physical(self.entry_place(address), 8))[0])

    def put_entry(self, address: int, value: int, pid: int | None = None) -> None:
        """Change a page-table entry."""
        place = self.entry_place(address, pid)
        buffer, offset = self.memory.unit(place >> 12)
        struct.pack_into("<Q", buffer, offset + (place & 4095), value)

    def entry_place(self, address: int, pid: int | None = None) -> int:
        """The physical address of the page-table entry for a user address."""
        tables, mm = self.kernel.tables, self.mm(pid or self.scene.pid)
        pgd = self.memory.u64(self.member(mm, "mm_struct.pgd"))
        table = self.memory.translate(pgd)
        for level in reversed(range(tables.levels)):
            place = table + 8 * tables.index(address, level)
            (value,) = struct.unpack("<Q", self.memory.physical(place, 8))
            entry = tables.decode(value, level)
            if entry.kind is not EntryKind.TABLE:
                break
            table = entry.pfn << tables.page_shift
        return place

    def pfn(self, address: int) -> int:
        return self.kernel.tables.decode(self.entry(address), 0).pfn

    def page(self, address: int) -> int:
        return self.kernel.page(self.pfn(address))

    def anon_vma(self, address: int) -> AnonVma:
        """The one that the page at an address names."""
        found = self.rmap.anon_vma(self.memory.u64(self.member(self.page(address), "folio.mapping")) & ~3)
        assert found is not None
        return found

    def node(self) -> StableNode:
        at = self.memory.u64(self.member(self.page(self.scene.ksm[0]), "folio.mapping")) & ~3
        found = self.rmap.stable_node(at)
        assert found is not None
        return found

    def item(self, address: int) -> Item:
        (item,) = (each for each in self.node().items if each.address == address)
        return item


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    opened = Case(request.param, tmp_path)
    yield opened
    opened.image.close()


def named(audit: Audit, kind: Kind) -> set[tuple[int, int | None]]:
    """Address and frame of each finding of a kind that is the kernel's fault."""
    return {(each.address, each.pfn) for each in audit.errors if each.kind is kind}


# --- whole dumps -----------------------------------------------------------------------------------------------------


def test_a_healthy_guest_has_no_finding(case: Case) -> None:
    audit = case.audit()
    assert audit.findings == ()
    assert audit.counts.anonymous > 5000
    assert audit.counts.processes >= 4
    assert "leads back to each of them" in audit.summary


def test_the_scene_is_seen_as_the_guest_saw_it(case: Case) -> None:
    scene = case.scene
    wanted = [*scene.ksm, *scene.moved, *scene.stayed]
    kept = {
        page.address: page
        for page in case.audit(keep=lambda pid, address: pid == scene.pid and address in wanted).pages
    }
    assert sorted(kept) == sorted(wanted)
    assert all(page.reached for page in kept.values())
    assert {str(at): kept[at].pfn for at in map(int, scene.pfns)} == scene.pfns
    assert [kept[at].ksm for at in wanted] == [True] * 2 + [False] * 6
    assert kept[scene.ksm[0]].pfn == kept[scene.ksm[1]].pfn


def test_a_moved_page_keeps_the_index_of_where_it_came_from(case: Case) -> None:
    scene, shift = case.scene, case.kernel.page_shift
    pages = case.audit(keep=lambda pid, address: pid == scene.pid and address in scene.moved).pages
    assert [page.index for page in pages] == [(at >> shift) - 8 for at in scene.moved]  # from page 12 to page 20


def test_a_huge_page_is_one_entry(case: Case) -> None:
    scene = case.scene
    (page,) = case.audit(keep=lambda pid, address: (pid, address) == (scene.pid, scene.huge)).pages
    assert (page.pages, page.reached) == (512, True)


def test_some_processes_alone_can_be_audited(case: Case) -> None:
    everything, some = case.audit(), case.audit(pids=[case.scene.pid])
    assert some.findings == ()
    assert some.counts.processes == 2, "the process of the scene and its child"
    assert some.counts.anonymous < everything.counts.anonymous


def test_neighbours_say_why_they_did_not_merge(case: Case) -> None:
    regions = {each.start: each for each in case.audit().regions if each.pid == case.scene.pid}
    reasons = regions[case.scene.apart].apart
    own = case.scene.apart >> case.kernel.page_shift
    assert reasons == (
        f"page offset is {own + 8:#x} where {own:#x} would follow",
        "faulted with different anon_vmas",
    )


# --- spoilt dumps: plain anonymous pages -----------------------------------------------------------------------------


def test_a_stale_index_is_named(case: Case) -> None:
    """What a kernel does that relocates a page and forgets its index."""
    at = case.scene.moved[1]
    place = case.member(case.page(at), "folio.index")
    case.put(place, case.memory.u64(place) + 8)
    audit = case.audit()
    # the child maps the same page by fork
    assert named(audit, Kind.WRONG_INDEX) == {(at, case.pfn(at))}
    assert {each.process for each in audit.errors} == {f"python3[{pid}]" for pid in (case.scene.pid, case.scene.child)}
    assert {each.kind for each in audit.errors} == {Kind.WRONG_INDEX}
    assert f"index {case.memory.u64(place):#x}" in audit.errors[0].sentence
    assert int(audit.errors[0].expected, 16) == case.memory.u64(place) - 8


def test_a_foreign_anon_vma_is_named(case: Case) -> None:
    at, other = case.scene.moved[0], case.anon_vma(case.scene.huge)
    assert other.at != case.anon_vma(at).at
    case.put(case.member(case.page(at), "folio.mapping"), other.at | 1)
    audit = case.audit()
    assert named(audit, Kind.FOREIGN_ANON_VMA) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2
    assert f"{other.at:#x}" in audit.errors[0].sentence


def test_an_anon_vma_that_is_no_memory_is_named(case: Case) -> None:
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_FFFF_DEAD_0001)
    assert (at, case.pfn(at)) in named(case.audit(), Kind.FOREIGN_ANON_VMA)


def test_a_mapping_whose_offset_is_wrong_is_named(case: Case) -> None:
    """What a kernel does that gives the moved VMA its natural offset, and leaves its pages as they are."""
    vma = case.vma(case.scene.moved[0])
    case.put(case.member(vma.at, "vm_area_struct.vm_pgoff"), vma.pgoff + 8)
    if case.layout.has("vm_area_struct.__vm_anon_pgoff_lo"):
        place = case.member(vma.at, "vm_area_struct.__vm_anon_pgoff_lo")
        case.put(place, vma.pgoff + 8 & 0xFFFF_FFFF, "<I")
    found = case.audit()
    assert named(found, Kind.WRONG_INDEX) == {(at, case.pfn(at)) for at in case.scene.moved}
    assert Kind.BROKEN_CHAIN in {each.kind for each in found.errors}, "the tree is no longer in order either"


def test_a_vma_that_left_its_tree_is_named(case: Case) -> None:
    at = case.scene.moved[0]
    anon_vma = case.anon_vma(at)
    case.put(case.member(case.member(anon_vma.at, "anon_vma.rb_root"), "rb_root_cached.rb_root"), 0)
    found = case.audit()
    # the mapping from which it was moved belongs to the same anon_vma
    assert {(at, case.pfn(at)) for at in case.scene.moved} <= named(found, Kind.UNREACHABLE)
    assert case.vma(at).at in {each.address for each in found.errors if each.kind is Kind.BROKEN_CHAIN}


def test_a_search_that_turns_back_too_early_is_named(case: Case) -> None:
    """The tree holds the VMA, but the number by which searches are pruned says that there is nothing to find."""
    at = case.scene.moved[0]
    anon_vma = case.anon_vma(at)
    case.put(anon_vma.links[anon_vma.top].at + case.layout["anon_vma_chain.rb_subtree_last"], 1)
    found = case.audit()
    assert (at, case.pfn(at)) in named(found, Kind.UNREACHABLE)
    assert any("turn back too early" in each.sentence for each in found.errors)


def test_what_is_locked_is_not_called_wrong(case: Case) -> None:
    at = case.scene.moved[1]
    page = case.page(at)
    case.put(case.member(page, "folio.index"), 7)
    flags = case.member(page, "page.flags")
    case.put(flags, case.memory.u64(flags) | 1 << case.layout.flags["PG_locked"])
    audit = case.audit()
    assert audit.errors == ()
    assert {each.severity for each in audit.findings} == {Severity.IN_MOTION}


# --- spoilt dumps: KSM -----------------------------------------------------------------------------------------------


def test_an_rmap_item_with_another_address_is_named(case: Case) -> None:
    at = case.scene.ksm[1]
    item = case.item(at)
    place = case.member(item.at, "ksm_rmap_item.address")
    case.put(place, case.memory.u64(place) + 16 * case.kernel.page_size)
    audit = case.audit()
    assert named(audit, Kind.UNREACHABLE) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2, "in the process and in its child, which is found by the same item"


def test_an_rmap_item_cut_from_its_list_is_named(case: Case) -> None:
    """Cut as hlist_del() would, but for the item's own idea of where it belongs."""
    node = case.node()
    lost, kept = node.items[0], node.items[1]
    case.put(case.member(node.at, "ksm_stable_node.hlist"), case.member(kept.at, "ksm_rmap_item.hlist"))
    case.put(case.member(kept.at, "ksm_rmap_item.hlist") + 8, case.member(node.at, "ksm_stable_node.hlist"))
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length - 1, "<i")
    audit = case.audit()
    assert named(audit, Kind.UNREACHABLE) == {(lost.address, node.pfn)}
    assert named(audit, Kind.BROKEN_CHAIN) == {(lost.at, node.pfn)}


def test_a_walk_by_address_is_named_where_the_kernel_stores_an_index(case: Case) -> None:
    """What rmap_walk_ksm() finds in a kernel that takes the address for the index: all but what was moved."""
    if not case.layout.has("ksm_rmap_item.linear_page_index"):
        pytest.skip("this kernel searches the full range: it stores no index that could be wrong")
    place = case.layout["ksm_rmap_item.linear_page_index"]
    for item in case.node().items:
        case.put(item.at + place, item.address >> case.kernel.page_shift)
    audit = case.audit()
    stayed, moved = case.scene.ksm
    assert named(audit, Kind.WRONG_INDEX) == {(moved, case.pfn(moved))}
    assert stayed not in {each.address for each in audit.findings}


def test_a_kernel_that_stores_no_index_finds_by_the_address(case: Case) -> None:
    """Decided by the structure: the same dump, read as if items had no index, is searched in full."""
    if not case.layout.has("ksm_rmap_item.linear_page_index"):
        pytest.skip("this kernel stores no index to ignore")
    for item in case.node().items:
        case.put(item.at + case.layout["ksm_rmap_item.linear_page_index"], 1)
    offsets = {name: at for name, at in case.layout.offsets.items() if not name.endswith("linear_page_index")}
    older = layout.Layout(**{**vars(case.layout), "offsets": offsets})
    assert walk.audit(case.image, older).findings == ()
    assert len(case.audit().errors) == 4


def test_an_rmap_item_of_a_foreign_anon_vma_is_named(case: Case) -> None:
    at = case.scene.ksm[0]
    item = case.item(at)
    case.put(case.member(item.at, "ksm_rmap_item.anon_vma"), case.anon_vma(case.scene.huge).at)
    audit = case.audit()
    assert (at, case.pfn(at)) in named(audit, Kind.FOREIGN_ANON_VMA)


def test_a_stable_node_of_another_page_is_named(case: Case) -> None:
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.kpfn"), case.pfn(case.scene.stayed[0]))
    audit = case.audit()
    assert named(audit, Kind.STALE_RMAP_ITEM) == {(at, node.pfn) for at in case.scene.ksm}


def test_a_stable_node_whose_page_was_freed_is_a_note(case: Case) -> None:
    """Reclaim frees a KSM page behind its node's back. That is how KSM works."""
    page = case.page(case.scene.ksm[0])
    node = case.node()
    for at in case.scene.ksm:
        for pid in (case.scene.pid, case.scene.child):
            case.put_entry(at, 0, pid)
    case.put(case.member(page, "folio.mapping"), 0)
    audit = case.audit()
    assert audit.errors == ()
    assert {each.severity for each in audit.findings} == {Severity.NOTE}
    assert node.at in {each.address for each in audit.findings}


def test_an_item_that_ksmd_has_yet_to_drop_is_a_note(case: Case) -> None:
    """Its page was written to: the entry maps another page now. That is how KSM works."""
    at = case.scene.ksm[1]
    case.put_entry(at, 0)
    audit = case.audit()
    notes = [each for each in audit.findings if each.severity is Severity.NOTE]
    assert [each.kind for each in notes] == [Kind.STALE_RMAP_ITEM]
    assert f"{at:#x}" in notes[0].sentence
    # the entry was taken away behind the kernel's back, and that shows
    assert {each.kind for each in audit.errors} == {Kind.COUNT_MISMATCH}


# --- spoilt dumps: entries outside of VMAs ---------------------------------------------------------------------------


def left_behind(case: Case) -> int:
    """Put a page back to where it was moved from, where no VMA is any more; returns that address.

    VMA   |AABB  CCCC|      |BB|
    pages |AA  B  CCC|      | B|      what a move does that forgets one entry
    """
    came_to = case.scene.moved[0]
    came_from = came_to - 8 * case.kernel.page_size
    assert not any(each.start <= came_from < each.end for each in case.kernel.vmas(case.mm(case.scene.pid)))
    case.put_entry(came_from, case.entry(came_to))
    case.put_entry(came_to, 0)
    return came_from


def test_a_page_that_a_move_left_behind_is_named(case: Case) -> None:
    pfn = case.pfn(case.scene.moved[0])
    at = left_behind(case)
    audit = case.audit()
    assert named(audit, Kind.STRAY_ENTRY) == {(at, pfn)}
    assert len(audit.errors) == 1, "the kernel counts this mapping, and it is there"
    assert audit.errors[0].process == f"python3[{case.scene.pid}]"
    assert f"maps pfn {pfn:#x} at {at:#x}, where it has no VMA" in audit.errors[0].sentence


def test_a_page_that_a_move_copied_is_counted_too_seldom(case: Case) -> None:
    entry, page = case.entry(case.scene.moved[0]), case.page(case.scene.moved[0])
    at = left_behind(case)
    case.put_entry(case.scene.moved[0], entry)
    audit = case.audit()
    assert {address for address, _ in named(audit, Kind.STRAY_ENTRY)} == {at}
    assert {address for address, _ in named(audit, Kind.COUNT_MISMATCH)} == {page}


def test_a_swap_entry_outside_of_vmas_is_named(case: Case) -> None:
    at = left_behind(case)
    case.put_entry(at, 1 << 59 | 1 << 40 if case.layout.arch == "x86_64" else 1 << 12 | 1 << 6)
    audit = case.audit()
    assert named(audit, Kind.STRAY_ENTRY) == {(at, None)}


def test_the_gaps_before_the_first_vma_and_behind_the_last_are_looked_at(case: Case) -> None:
    first, *_, last = case.kernel.vmas(case.mm(case.scene.pid))
    huge = first.start - (2 << 20)  # where no table of small pages is
    case.put_entry(huge, case.entry(case.scene.huge))
    case.put_entry(last.end, case.entry(case.scene.stayed[0]))
    assert {at for at, _ in named(case.audit(), Kind.STRAY_ENTRY)} == {huge, last.end}


def test_a_table_in_a_gap_that_is_no_memory_is_named(case: Case) -> None:
    pgd = case.memory.translate(case.memory.u64(case.member(case.mm(case.scene.pid), "mm_struct.pgd")))
    vmas = case.kernel.vmas(case.mm(case.scene.pid))
    top = case.kernel.tables.span(case.kernel.tables.levels - 1)
    used = {at // top for each in vmas for at in (each.start, each.end - 1)}
    free = next(index for index in range(256) if index not in used)
    buffer, offset = case.memory.unit(pgd >> 12)
    struct.pack_into("<Q", buffer, offset + 8 * free, 0x7FFF_FFFF_F000 | (0x67 if case.layout.arch == "x86_64" else 3))
    audit = case.audit()
    assert any("where no VMA is" in each.sentence for each in audit.errors if each.kind is Kind.BAD_POINTER)


@pytest.mark.parametrize("count", [1, 0x100, 0x502])
def test_what_munmap_has_yet_to_take_away_is_not_called_wrong(case: Case, count: int) -> None:
    """It takes the VMAs out of their tree first; by the time it frees their pages, readers may share its lock."""
    at = left_behind(case)
    case.lock_mm(case.scene.pid, count)
    audit = case.audit()
    assert audit.errors == ()
    assert [(each.kind, each.address) for each in audit.findings] == [(Kind.STRAY_ENTRY, at)]


def test_a_mapping_that_munmap_has_yet_to_forget_is_not_called_wrong(case: Case) -> None:
    """Out of the tree of VMAs, and with readers by its side; anon_vmas still lead there."""
    vma = case.vma(case.scene.moved[0])
    case.detach(vma)
    wrong = case.audit().errors
    assert any(f"leads to a VMA at {vma.at:#x} that no process has" in each.sentence for each in wrong)
    assert {Kind.STALE_RMAP_ITEM, Kind.COUNT_MISMATCH, Kind.STRAY_ENTRY} <= {each.kind for each in wrong}
    case.lock_mm(case.scene.pid, 256)
    audit = case.audit()
    assert audit.errors == ()
    assert {each.kind for each in audit.findings} == {Kind.STRAY_ENTRY}


# --- spoilt dumps: counts, pointers, loops ---------------------------------------------------------------------------


def test_a_wrong_mapcount_is_named(case: Case) -> None:
    at = case.scene.stayed[2]
    page = case.page(at)
    case.put(case.member(page, "folio._mapcount"), 2, "<i")
    audit = case.audit()
    assert named(audit, Kind.COUNT_MISMATCH) == {(page, case.pfn(at))}
    assert (audit.errors[0].expected, audit.errors[0].actual) == ("2", "3"), "the process and its child"


@pytest.mark.parametrize("counter", ["num_children", "num_active_vmas"])
def test_a_wrong_count_of_an_anon_vma_is_named(case: Case, counter: str) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    place = case.member(anon_vma.at, f"anon_vma.{counter}")
    case.put(place, case.memory.u64(place) + 1)
    assert named(case.audit(), Kind.COUNT_MISMATCH) == {(anon_vma.at, None)}


def test_an_anon_vma_that_will_be_freed_too_early_is_named(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    case.put(case.member(anon_vma.at, "anon_vma.refcount"), 0, "<i")
    audit = case.audit()
    assert (anon_vma.at, None) in named(audit, Kind.COUNT_MISMATCH)
    assert any("freed too early" in each.sentence for each in audit.errors)


def test_an_entry_that_maps_no_page_is_named(case: Case) -> None:
    at = case.scene.stayed[0]
    case.put_entry(at, case.entry(at) | 0xFFF << 36)
    assert at in {address for address, _ in named(case.audit(), Kind.BAD_POINTER)}


def test_a_list_without_end_ends(case: Case) -> None:
    node = case.node()
    last = case.member(node.items[-1].at, "ksm_rmap_item.hlist")
    case.put(last, case.member(node.items[0].at, "ksm_rmap_item.hlist"))
    audit = case.audit()
    assert any("does not end" in each.sentence for each in audit.errors)


def test_a_tree_without_end_ends(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    leaf = next(node for node, link in anon_vma.links.items() if not link.left and not link.right)
    case.put(leaf + case.layout["rb_node.rb_left"], anon_vma.top)
    audit = case.audit()
    assert any("comes twice" in each.sentence for each in audit.errors)


def test_page_tables_without_end_end(case: Case) -> None:
    """A top table that is its own lower tables, all over: five hundred to the fourth entries."""
    pgd = case.memory.translate(case.memory.u64(case.member(case.mm(case.scene.pid), "mm_struct.pgd")))
    buffer, offset = case.memory.unit(pgd >> 12)
    pointer = pgd | (0x67 if case.layout.arch == "x86_64" else 3)
    buffer[offset : offset + 4096] = struct.pack("<Q", pointer) * 512
    first = case.kernel.vmas(case.mm(case.scene.pid))[0]
    case.put(case.member(first.at, "vm_area_struct.vm_end"), 1 << 46)
    audit = case.audit()
    assert any("page tables" in each.sentence and "in two places" in each.sentence for each in audit.errors)


def test_a_list_of_tasks_without_end_is_a_damaged_dump(case: Case) -> None:
    tasks = case.layout["task_struct.tasks"]
    first = case.kernel.symbol("init_task")
    second = case.memory.u64(first + tasks)
    case.put(case.memory.u64(second), second)
    with pytest.raises(DumpError, match="does not end"):
        case.audit()


def test_a_vma_tree_that_leads_nowhere_is_named(case: Case) -> None:
    mm = case.mm(case.scene.pid)
    case.put(mm + case.layout["mm_struct.mm_mt"] + case.layout["maple_tree.ma_root"], 0xFFFF_FFFF_DEAD_001E)
    audit = case.audit()
    assert [each.kind for each in audit.errors] == [Kind.BAD_POINTER], "what cannot be read says nothing of the rest"
    assert "tree of VMAs" in audit.errors[0].sentence
    assert Kind.STRAY_ENTRY not in {each.kind for each in audit.findings}


@pytest.mark.parametrize("seed", range(12))
def test_a_dump_of_which_a_page_is_noise_gives_findings_or_one_clear_error(case: Case, seed: int) -> None:
    rng = random.Random(seed)
    units = range(len(case.image.buffer) // memory.UNIT - 2)
    for _ in range(3):
        at = (len(case.image.buffer) - (rng.choice(units) + 1) * memory.UNIT) & ~7
        case.image.buffer[at : at + memory.UNIT] = rng.randbytes(memory.UNIT)
    clear = ""
    try:
        assert case.audit().counts.processes
    except HarnessError as error:
        clear = str(error).splitlines()[0]
    assert not clear or "damaged" in clear or "cannot be found" in clear


# --- dumps that are none ---------------------------------------------------------------------------------------------


def test_a_dump_that_is_cut_short_is_refused(case: Case) -> None:
    whole = case.path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 200, 64, 20):
        case.path.write_bytes(whole[:size])
        with pytest.raises(DumpError, match=r"cut short|cannot be read|no ELF|no dump"), memory.opened(case.path):
            pass


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(60), b"KDUMP   " + bytes(80)]
)
def test_a_file_that_is_no_dump_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    with pytest.raises(HarnessError, match=str(path)), memory.opened(path):
        pass


def test_a_missing_file_is_an_error_in_words(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="No such file"), memory.opened(tmp_path / "none"):
        pass


def test_a_kernel_before_6_10_is_refused_by_its_missing_member() -> None:
    class Type:
        size = 8

        def has_member(self, member: str) -> bool:
            return member != "_large_mapcount"

    class Drgn:
        def type(self, name: str) -> Type:
            return Type()

        def offsetof(self, kind: Type, member: str) -> int:
            return 0

    with pytest.raises(layout.DebugInfoError, match=r"no member _large_mapcount: it is older than Linux 6\.10"):
        layout._collect(Drgn(), Drgn(), None, "00")


def test_the_vmlinux_of_another_build_is_refused(case: Case) -> None:
    other = layout.Layout(**{**vars(case.layout), "build_id": "00" * 20})
    with pytest.raises(DumpError, match="not of this vmlinux"):
        walk.audit(case.image, other)


def test_a_vmlinux_of_another_architecture_is_refused(case: Case) -> None:
    (name,) = (each for each in NAMES if not each.startswith(case.layout.arch))
    other = layout.Layout.from_json((DUMPS / f"{name}.layout.json").read_text())
    with pytest.raises(DumpError, match="another machine"):
        walk.audit(case.image, other)


def test_a_dump_without_the_kernels_own_description_is_refused(case: Case) -> None:
    case.image.vmcoreinfo = b""
    with pytest.raises(DumpError, match="no VMCOREINFO"):
        case.audit()


def test_a_description_that_is_noise_is_refused(case: Case) -> None:
    case.image.vmcoreinfo = b"OSRELEASE=1\nPAGESIZE=12\n"
    with pytest.raises(DumpError, match="damaged"):
        case.audit()


def test_a_file_that_is_no_vmlinux_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x7fELF\x02\x01" + bytes(100))
    with pytest.raises(layout.DebugInfoError, match="no build ID"):
        layout.read(path)
    path.write_bytes(b"not a kernel")
    with pytest.raises(layout.DebugInfoError, match="no vmlinux"):
        layout.read(path)


def test_a_layout_of_another_format_is_refused() -> None:
    text = (DUMPS / f"{NAMES[0]}.layout.json").read_text()
    assert layout.Layout.from_json(text).arch == "x86_64"
    with pytest.raises(layout.DebugInfoError):
        layout.Layout.from_json(text.replace(f'"format": {layout.FORMAT}', '"format": 0'))
    with pytest.raises(layout.DebugInfoError):
        layout.Layout.from_json("[]")


def test_a_flood_of_notes_hides_no_error(case: Case) -> None:
    ledger = Ledger(case.kernel)
    for number in range(3 * MOST_FINDINGS):
        ledger.add(Kind.STALE_RMAP_ITEM, None, None, number, None, "", "", "a note", Severity.NOTE)
    for number in range(MOST_FINDINGS):
        ledger.add(Kind.UNREACHABLE, None, None, number, None, "", "", "an error")
    errors = [each for each in ledger.findings if each.severity is Severity.ERROR]
    assert len(ledger.findings) == MOST_FINDINGS
    assert len(errors) + ledger.unlisted == MOST_FINDINGS


def test_counters_of_a_process_that_changes_its_mappings_may_be_ahead(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    place = case.member(anon_vma.at, "anon_vma.num_active_vmas")
    case.put(place, case.memory.u64(place) + 1)
    assert len(case.audit().errors) == 1
    case.lock_mm(case.scene.child)
    audit = case.audit()
    assert audit.errors == ()
    assert [each.severity for each in audit.findings] == [Severity.IN_MOTION]


def test_what_is_wrong_at_each_look_is_an_error(case: Case) -> None:
    healthy = case.audit()
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    broken = case.audit()
    flags = case.member(case.page(case.scene.stayed[2]), "page.flags")
    case.put(flags, case.memory.u64(flags) | 1 << case.layout.flags["PG_locked"])
    locked = case.audit()
    assert len(seen_always([broken, broken]).errors) == 1
    assert len(seen_always([broken, locked]).errors) == 1, "it was there, and a lock that is held now changes nothing"
    assert len(seen_always([locked, broken, broken]).errors) == 1
    for looks in ([broken, healthy], [healthy, broken], [broken, healthy, broken], [locked, locked, locked]):
        assert seen_always(looks).errors == ()
    assert {each.severity for each in seen_always([healthy, broken]).findings} == {Severity.IN_MOTION}


@pytest.mark.parametrize(("states", "looks"), [("h", 1), ("lbb", 3), ("lh", 2), ("bh", 2), ("bbb", 3), ("hb", 1)])
def test_what_is_wrong_or_locked_is_looked_at_again(
    case: Case, monkeypatch: pytest.MonkeyPatch, states: str, looks: int
) -> None:
    known = {"h": case.audit()}
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    known["b"] = case.audit()
    flags = case.member(case.page(case.scene.stayed[2]), "page.flags")
    case.put(flags, case.memory.u64(flags) | 1 << case.layout.flags["PG_locked"])
    known["l"] = case.audit()
    seen = [known[each] for each in states]
    auditor = Auditor(case.layout)
    monkeypatch.setattr(auditor, "_look", lambda *_: seen.pop(0))
    found = auditor.audit(None, "now", Deadline.after(60))  # type: ignore[arg-type]
    assert len(states) - len(seen) == looks
    assert bool(found.errors) == states.endswith("bb")


# --- what excuses, and what does not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 256])
def test_a_process_that_has_nothing_to_do_with_it_excuses_nothing(case: Case, count: int) -> None:
    """Somebody always changes its mappings."""
    anon_vma = case.anon_vma(case.scene.moved[0])
    place = case.member(anon_vma.at, "anon_vma.num_active_vmas")
    case.put(place, case.memory.u64(place) + 1)
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length + 1, "<i")
    wrong = case.audit().errors
    assert len(wrong) == 3
    case.lock_mm(1, count)
    assert case.audit().errors == wrong


def test_a_stable_node_may_lag_behind_a_process_of_its_own(case: Case) -> None:
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length + 1, "<i")
    case.lock_mm(case.scene.pid)
    assert [each.severity for each in case.audit().findings] == [Severity.IN_MOTION]


@pytest.mark.parametrize("locked", [False, True])
def test_a_first_fault_that_has_yet_to_link_its_vma_is_not_called_wrong(case: Case, locked: bool) -> None:
    """__anon_vma_prepare() notes the anon_vma first, and makes the link under the lock of the anon_vma alone."""
    vma = case.vma(case.scene.moved[0])
    anon_vma = case.rmap.anon_vma(vma.anon_vma)
    assert anon_vma is not None
    head = case.member(vma.at, "vm_area_struct.anon_vma_chain")
    case.put(head, head)
    if locked:
        case.lock(case.member(anon_vma.root, "anon_vma.rwsem"))
    sentences = {each.severity: each.sentence for each in case.audit().findings if "puts new pages" in each.sentence}
    assert sentences.keys() == {Severity.IN_MOTION if locked else Severity.ERROR}
    assert bool(case.audit().errors) is not locked


def ksm_page_without_a_node(case: Case) -> None:
    case.put(case.member(case.page(case.scene.ksm[0]), "folio.mapping"), 3)


def ksm_item_that_was_not_counted_down(case: Case) -> None:
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length + 1, "<i")


def ksm_item_cut_from_its_list(case: Case) -> None:
    case.put(case.member(case.node().items[0].at, "ksm_rmap_item.hlist"), 0)


def ksm_page_counted_before_it_is_mapped(case: Case) -> None:
    case.put(case.member(case.page(case.scene.ksm[0]), "folio._mapcount"), 4, "<i")


def ksm_anon_vma_that_was_put_back(case: Case) -> None:
    case.put(case.member(case.node().items[0].anon_vma, "anon_vma.refcount"), 1, "<i")


@pytest.mark.parametrize(
    "spoil",
    [
        ksm_page_without_a_node,
        ksm_item_that_was_not_counted_down,
        ksm_item_cut_from_its_list,
        ksm_page_counted_before_it_is_mapped,
        ksm_anon_vma_that_was_put_back,
    ],
)
def test_what_ksmd_is_about_to_finish_is_not_called_wrong(case: Case, spoil: Callable[[Case], None]) -> None:
    spoil(case)
    wrong = case.audit()
    assert wrong.errors
    case.set_ksm_to_work()
    audit = case.audit()
    assert audit.errors == ()
    assert [each.sentence for each in audit.findings] == [each.sentence for each in wrong.findings]


def test_ksmd_at_work_excuses_no_other_page(case: Case) -> None:
    at = case.scene.moved[1]
    case.put(case.member(case.page(at), "folio.index"), 7)
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    case.set_ksm_to_work()
    assert {each.kind for each in case.audit().errors} == {Kind.WRONG_INDEX, Kind.COUNT_MISMATCH}


def test_a_kernel_whose_mutexes_do_not_say_who_holds_them_is_audited_all_the_same(case: Case) -> None:
    """As with CONFIG_PREEMPT_RT."""
    ksm_item_that_was_not_counted_down(case)
    case.set_ksm_to_work()
    offsets = {name: at for name, at in case.layout.offsets.items() if name != "mutex.owner"}
    assert len(walk.audit(case.image, replace(case.layout, offsets=offsets)).errors) == 1


@pytest.mark.parametrize("count", [1, 256])
def test_a_page_is_counted_a_moment_before_or_after_it_is_mapped(case: Case, count: int) -> None:
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    assert len(case.audit().errors) == 1
    case.lock_mm(case.scene.child, count)
    assert [each.severity for each in case.audit().findings] == [Severity.IN_MOTION]


def test_a_fault_that_locks_a_vma_alone_may_be_mapping_a_page(case: Case) -> None:
    at = case.scene.stayed[2]
    case.put(case.member(case.page(at), "folio._mapcount"), 2, "<i")
    vma = case.vma(at, case.scene.child).at
    if case.layout.has("vm_area_struct.vm_refcnt"):
        case.put(case.member(vma, "vm_area_struct.vm_refcnt"), 2, "<I")
    else:
        # The semaphore is not in the dump: any word above 255 does for one that has readers.
        case.put(
            case.member(vma, "vm_area_struct.vm_lock"),
            case.kernel.symbol("init_task") + case.layout["task_struct.tasks"],
        )
    assert [each.severity for each in case.audit().findings] == [Severity.IN_MOTION]


def test_processes_that_no_task_has_any_more_are_found_by_ksm(case: Case) -> None:
    """As a process ends, when nobody else shares its anon_vmas: KSM's items still lead to its pages."""
    before = case.kernel.processes()
    for process in before:
        if process.pid != 1:  # which has no anon_vma in common with them
            case.end(process.pid)
    audit = case.audit()
    assert audit.errors == ()
    assert audit.counts.processes == len(before)


def test_a_process_that_is_long_gone_is_not_looked_for(case: Case) -> None:
    """KSM holds what is left of it, which has no VMAs, until ksmd comes by."""
    mm = case.mm(case.scene.child)
    case.end(case.scene.child)
    case.put(mm + case.layout["mm_struct.mm_mt"] + case.layout["maple_tree.ma_root"], 0)
    assert case.audit().counts.processes == len(case.kernel.processes())


def test_a_thread_of_the_kernel_that_calls_the_firmware_is_no_process(case: Case) -> None:
    before = case.kernel.processes()
    tasks, task = case.layout["task_struct.tasks"], case.kernel.symbol("init_task")
    while True:
        task = case.memory.u64(task + tasks) - tasks
        if not case.memory.u64(task + case.layout["task_struct.mm"]):
            break
    case.put(task + case.layout["task_struct.mm"], case.kernel.symbol("efi_mm"))
    assert case.kernel.processes() == before
    assert case.audit().findings == ()


# --- trees and lists that do not fit each other ----------------------------------------------------------------------


def two_links(case: Case) -> tuple[Vma, int, int]:
    """A VMA that belongs to two anon_vmas, and its links: to its own anon_vma, and to the other one."""
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


def test_a_link_that_its_vma_does_not_know_is_named(case: Case) -> None:
    """It stays in the tree when the VMA is freed."""
    vma, kept, lost = two_links(case)
    head, offset = case.member(vma.at, "vm_area_struct.anon_vma_chain"), case.layout["anon_vma_chain.same_vma"]
    case.put(head, kept + offset)
    case.put(kept + offset, head)
    audit = case.audit()
    other = case.memory.u64(lost + case.layout["anon_vma_chain.anon_vma"])
    assert named(audit, Kind.BROKEN_CHAIN) == {(other, None)}
    assert any(
        f"a link at {lost:#x} of {vma} that the list of this VMA lacks" in each.sentence for each in audit.errors
    )


def test_a_vma_that_belongs_to_an_anon_vma_twice_is_named(case: Case) -> None:
    vma, first, second = two_links(case)
    place = case.layout["anon_vma_chain.anon_vma"]
    case.put(second + place, case.memory.u64(first + place))
    assert any(f"{vma} of" in each.sentence and "twice" in each.sentence for each in case.audit().errors)


@pytest.mark.parametrize("whole", [True, False])
def test_a_node_that_climbs_astray_is_named(case: Case, whole: bool) -> None:
    """A search that has been below a node goes on from the parent that the node names."""
    anon_vma = case.anon_vma(case.scene.moved[0])
    assert len(anon_vma.links) > 1
    node = next(each for each in anon_vma.links if each != anon_vma.top)
    place = case.member(node, "rb_node.__rb_parent_color")
    case.put(place, case.memory.u64(place) & 3)
    audit = case.audit(pids=[] if whole else [case.scene.pid])
    assert named(audit, Kind.BROKEN_CHAIN) == {(anon_vma.at, None)}
    assert f"is below {anon_vma.links[node].parent:#x}" in audit.errors[0].sentence


def test_the_trees_are_checked_for_some_processes_alone(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    case.put(anon_vma.links[anon_vma.top].at + case.layout["anon_vma_chain.rb_subtree_last"], 1 << 40)
    assert any("turn back too early" in each.sentence for each in case.audit(pids=[case.scene.pid]).errors)


# --- what decides whether a page is looked at ------------------------------------------------------------------------


@pytest.mark.parametrize("mapping", [0, 0xFFFF_8880_0123_4560, 2])
def test_a_page_of_anonymous_memory_that_does_not_say_so_is_named(case: Case, mapping: int) -> None:
    """What the page says is what is audited: it does not decide whether it is."""
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), mapping)
    audit = case.audit(keep=lambda pid, address: (pid, address) == (case.scene.pid, at))
    assert named(audit, Kind.UNREACHABLE) == {(at, case.pfn(at))}
    assert len(audit.errors) == 2, "in the process and in its child"
    assert f"mapping is {mapping:#x}" in audit.errors[0].sentence
    assert [page.reached for page in audit.pages] == [False]


def test_a_huge_page_that_lost_its_mapping_is_not_taken_for_the_huge_zero_page(case: Case) -> None:
    at = case.scene.huge
    case.put(case.member(case.page(at), "folio.mapping"), 0)
    assert (at, case.pfn(at)) in named(case.audit(), Kind.UNREACHABLE)


def test_the_huge_zero_page_has_no_reverse_map_and_there_is_one(case: Case) -> None:
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
    assert {pfn for _, pfn in named(case.audit(), Kind.UNREACHABLE)} == set(others)


def test_pages_that_a_driver_maps_are_not_anonymous(case: Case) -> None:
    at = case.scene.moved[0]
    case.put(case.member(case.page(at), "folio.mapping"), 0)
    for pid in (case.scene.pid, case.scene.child):
        place = case.member(case.vma(at, pid).at, "vm_area_struct.vm_flags")
        case.put(place, case.memory.u64(place) | VM_MIXEDMAP)
    assert case.audit().errors == ()


def written_page_of_a_file(case: Case, writable: bool) -> tuple[int, Vma]:
    """A page of a private file mapping that was written to, and can be or not; and its VMA."""
    for vma in case.kernel.vmas(case.mm(case.scene.pid)):
        if not vma.ops or vma.flags & (VM_SHARED | VM_MIXEDMAP):
            continue
        for at in range(vma.start, vma.end, case.kernel.page_size):
            entry = case.kernel.tables.decode(case.entry(at), 0)
            if entry.kind is EntryKind.PAGE and entry.writable is writable:
                return at, vma
    raise AssertionError("the scene has no such page")


@pytest.mark.parametrize("mapping", [0, 0xFFFF_8880_0123_4560])
def test_a_page_that_was_written_to_in_a_private_file_mapping_must_say_that_it_is_anonymous(
    case: Case, mapping: int
) -> None:
    at, _ = written_page_of_a_file(case, writable=True)
    case.put(case.member(case.page(at), "folio.mapping"), mapping)
    audit = case.audit()
    assert named(audit, Kind.UNREACHABLE) == {(at, case.pfn(at))}
    assert "private, and writable there" in audit.errors[0].sentence


def test_a_page_of_a_file_that_cannot_be_written_to_is_no_anonymous_one(case: Case) -> None:
    at, _ = written_page_of_a_file(case, writable=False)
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_8880_0123_4560)
    assert case.audit().errors == ()


@pytest.mark.parametrize("flag", [VM_SHARED, VM_MIXEDMAP])
def test_a_writable_page_of_a_shared_file_or_a_driver_is_no_anonymous_one(case: Case, flag: int) -> None:
    at, vma = written_page_of_a_file(case, writable=True)
    case.put(case.member(case.page(at), "folio.mapping"), 0xFFFF_8880_0123_4560)
    case.put(case.member(vma.at, "vm_area_struct.vm_flags"), vma.flags | flag)
    assert case.audit().errors == ()


def test_a_page_of_ksm_on_a_kernel_without_it_is_named(case: Case) -> None:
    offsets = {name: at for name, at in case.layout.offsets.items() if not name.startswith("ksm_")}
    without = layout.Layout(**{**vars(case.layout), "offsets": offsets})
    audit = walk.audit(case.image, without)
    assert named(audit, Kind.UNREACHABLE) == {(at, case.pfn(at)) for at in case.scene.ksm}


def test_a_chain_of_nothing_that_does_not_end_ends(case: Case) -> None:
    """A link that leads to no anon_vma, and to itself."""
    vma = case.vma(case.scene.moved[0])
    link = case.memory.u64(case.member(vma.at, "vm_area_struct.anon_vma_chain"))
    at = link - case.layout["anon_vma_chain.same_vma"]
    case.put(case.member(at, "anon_vma_chain.anon_vma"), 0)
    case.put(link, link)
    audit = case.audit()
    assert any("does not end" in each.sentence and str(vma) in each.sentence for each in audit.errors)


@pytest.mark.parametrize("generation", [0, 1])
def test_a_parent_that_no_task_has_any_more_is_found_by_its_children(case: Case, generation: int) -> None:
    """As between exit_mm() and the end of exit_mmap(): its pages are still mapped there."""
    before = {each.pid: each for each in case.kernel.processes()}
    parent = case.scene.pid if not generation else before[case.scene.pid].parent
    case.end(parent)
    assert before.keys() - {each.pid for each in case.kernel.processes()} == {parent}
    audit = case.audit()
    assert audit.errors == ()
    assert audit.counts.processes == len(before)


def test_a_process_that_is_not_there_is_an_error(case: Case) -> None:
    with pytest.raises(DumpError, match="no process 99999 "):
        case.audit(pids=[case.scene.pid, 99999])
