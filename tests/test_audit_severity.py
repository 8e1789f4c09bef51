# SPDX-License-Identifier: GPL-2.0
"""What the audit calls an error, and what only in motion because a lock is held or a process is exiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from harness.audit import walk
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.ledger import MOST_DISCREPANCIES, Ledger, Values, Where
from harness.audit.live import Auditor, seen_always
from harness.deadline import Deadline
from tests.audit_case import Case
from tests.audit_case import case as case

# --- the ledger, and audits that are repeated -------------------------------------------------------------------------


def test_many_notes_do_not_displace_errors(case: Case) -> None:
    ledger = Ledger(case.kernel)
    for number in range(3 * MOST_DISCREPANCIES):
        ledger.add(DiscrepancyKind.STALE_RMAP_ITEM, Where(number), Values("", ""), "a note", Severity.NOTE)
    for number in range(MOST_DISCREPANCIES):
        ledger.add(DiscrepancyKind.UNREACHABLE, Where(number), Values("", ""), "an error")
    errors = [each for each in ledger.discrepancies if each.severity is Severity.ERROR]
    assert len(ledger.discrepancies) == MOST_DISCREPANCIES
    assert len(errors) == MOST_DISCREPANCIES // 2, "half of the ledger is reserved for errors"
    assert len(errors) + ledger.unlisted == MOST_DISCREPANCIES


def test_a_counter_is_in_motion_while_a_process_changes_its_vmas(case: Case) -> None:
    anon_vma = case.anon_vma(case.scene.moved[0])
    place = case.member(anon_vma.at, "anon_vma.num_active_vmas")
    case.put(place, case.memory.u64(place) + 1)
    assert len(case.audit().errors) == 1
    case.lock_mm(case.scene.child)
    audit = case.audit()
    assert audit.errors == ()
    assert [each.severity for each in audit.discrepancies] == [Severity.IN_MOTION]


def test_only_what_every_audit_finds_is_an_error(case: Case) -> None:
    healthy = case.audit()
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    broken = case.audit()
    flags = case.member(case.page(case.scene.stayed[2]), "page.flags")
    case.put(flags, case.memory.u64(flags) | 1 << case.layout.flags["PG_locked"])
    locked = case.audit()
    assert len(seen_always([broken, broken]).errors) == 1
    assert len(seen_always([broken, locked]).errors) == 1, "a lock that is held at one of the audits is no excuse"
    assert len(seen_always([locked, broken, broken]).errors) == 1
    for looks in ([broken, healthy], [healthy, broken], [broken, healthy, broken], [locked, locked, locked]):
        assert seen_always(looks).errors == ()
    assert {each.severity for each in seen_always([healthy, broken]).discrepancies} == {Severity.IN_MOTION}


@pytest.mark.parametrize(("states", "looks"), [("h", 1), ("lbb", 3), ("lh", 2), ("bh", 2), ("bbb", 3), ("hb", 1)])
def test_an_audit_with_an_error_or_a_lock_is_repeated(
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


# --- locks that are held ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 256])
def test_a_lock_of_an_unrelated_process_excuses_no_error(case: Case, count: int) -> None:
    """Some process is changing its mappings at any time."""
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


def test_a_stable_node_is_in_motion_while_a_process_of_its_items_changes_its_vmas(case: Case) -> None:
    node = case.node()
    case.put(case.member(node.at, "ksm_stable_node.rmap_hlist_len"), node.length + 1, "<i")
    case.lock_mm(case.scene.pid)
    assert [each.severity for each in case.audit().discrepancies] == [Severity.IN_MOTION]


@pytest.mark.parametrize("locked", [False, True])
def test_a_vma_without_its_link_is_in_motion_while_the_anon_vma_is_locked(case: Case, locked: bool) -> None:
    """__anon_vma_prepare() stores the anon_vma first, and then links it under the lock of the anon_vma alone."""
    vma = case.vma(case.scene.moved[0])
    anon_vma = case.rmap.anon_vma(vma.anon_vma)
    assert anon_vma is not None
    head = case.member(vma.at, "vm_area_struct.anon_vma_chain")
    case.put(head, head)
    if locked:
        case.lock(case.member(anon_vma.root, "anon_vma.rwsem"))
    sentences = {
        each.severity: each.sentence for each in case.audit().discrepancies if "adds new pages" in each.sentence
    }
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
def test_ksm_structures_are_in_motion_while_ksmd_works(case: Case, spoil: Callable[[Case], None]) -> None:
    spoil(case)
    wrong = case.audit()
    assert wrong.errors
    case.set_ksm_to_work()
    audit = case.audit()
    assert audit.errors == ()
    assert [each.sentence for each in audit.discrepancies] == [each.sentence for each in wrong.discrepancies]


def test_ksmd_at_work_excuses_no_error_of_other_pages(case: Case) -> None:
    at = case.scene.moved[1]
    case.put(case.member(case.page(at), "folio.index"), 7)
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    case.set_ksm_to_work()
    assert {each.kind for each in case.audit().errors} == {DiscrepancyKind.WRONG_INDEX, DiscrepancyKind.COUNT_MISMATCH}


def test_a_kernel_whose_mutexes_have_no_owner_is_audited_too(case: Case) -> None:
    """A kernel with CONFIG_PREEMPT_RT has such mutexes."""
    ksm_item_that_was_not_counted_down(case)
    case.set_ksm_to_work()
    offsets = {name: at for name, at in case.layout.offsets.items() if name != "mutex.owner"}
    assert len(walk.audit(case.image, replace(case.layout, offsets=offsets)).errors) == 1


@pytest.mark.parametrize("count", [1, 256])
def test_a_mapcount_is_in_motion_while_mmap_lock_is_held(case: Case, count: int) -> None:
    case.put(case.member(case.page(case.scene.stayed[2]), "folio._mapcount"), 2, "<i")
    assert len(case.audit().errors) == 1
    case.lock_mm(case.scene.child, count)
    assert [each.severity for each in case.audit().discrepancies] == [Severity.IN_MOTION]


def test_a_mapcount_is_in_motion_while_the_lock_of_its_vma_is_held(case: Case) -> None:
    at = case.scene.stayed[2]
    case.put(case.member(case.page(at), "folio._mapcount"), 2, "<i")
    vma = case.vma(at, case.scene.child).at
    if case.layout.has("vm_area_struct.vm_refcnt"):
        case.put(case.member(vma, "vm_area_struct.vm_refcnt"), 2, "<I")
    else:
        # The dump does not hold the semaphore. Any word above 255 looks like a semaphore with readers.
        case.put(
            case.member(vma, "vm_area_struct.vm_lock"),
            case.kernel.symbol("init_task") + case.layout["task_struct.tasks"],
        )
    assert [each.severity for each in case.audit().discrepancies] == [Severity.IN_MOTION]


# --- starting and exiting processes -----------------------------------------------------------------------------------


def test_exiting_processes_are_found_through_ksm(case: Case) -> None:
    """An exiting process may share its anon_vmas with nobody. KSM's items still lead to its pages."""
    before = case.kernel.processes()
    for process in before:
        if process.pid != 1:  # it shares no anon_vma with them
            case.end(process.pid)
    audit = case.audit()
    assert audit.errors == ()
    assert audit.counts.processes == len(before)


def test_an_exited_process_is_not_audited(case: Case) -> None:
    """KSM holds its mm_struct, which has no VMAs any more, until ksmd's next visit."""
    mm = case.mm(case.scene.child)
    case.end(case.scene.child)
    case.put(mm + case.layout["mm_struct.mm_mt"] + case.layout["maple_tree.ma_root"], 0)
    assert case.audit().counts.processes == len(case.kernel.processes())


def test_a_kernel_thread_that_calls_the_firmware_is_not_audited(case: Case) -> None:
    before = case.kernel.processes()
    tasks, task = case.layout["task_struct.tasks"], case.kernel.symbol("init_task")
    while True:
        task = case.memory.u64(task + tasks) - tasks
        if not case.memory.u64(task + case.layout["task_struct.mm"]):
            break
    case.put(task + case.layout["task_struct.mm"], case.kernel.symbol("efi_mm"))
    assert case.kernel.processes() == before
    assert case.audit().discrepancies == ()


@pytest.mark.parametrize("generation", [0, 1])
def test_an_exiting_parent_is_found_through_its_children(case: Case, generation: int) -> None:
    """Between exit_mm() and the end of exit_mmap() no task holds its address space, but its pages are still mapped."""
    before = {each.pid: each for each in case.kernel.processes()}
    parent = case.scene.pid if not generation else before[case.scene.pid].parent
    case.end(parent)
    assert before.keys() - {each.pid for each in case.kernel.processes()} == {parent}
    audit = case.audit()
    assert audit.errors == ()
    assert audit.counts.processes == len(before)
