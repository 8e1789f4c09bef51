# SPDX-License-Identifier: GPL-2.0
"""The explorer's own checks: each one fails if what it checks is broken on purpose, and passes if it is not.

Programs of the explorer are written out here. ``A`` and ``B`` are slots.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from guest_tests.explorer.arena import PAGE, address
from guest_tests.explorer.executor import Executor, Outcome
from guest_tests.explorer.kinds import kinds
from guest_tests.explorer.rivals import Rival
from guest_tests.mm import numa, pagemap, system, vmstat
from guest_tests.mm.ksm import Ksm
from guest_tests.support import folios
from harness.programs import effects, language, memory
from harness.programs.language import KINDS, Kind, Operation, Part, Program, To
from harness.programs.memory import Step

_MAP = Operation(Kind.MAP, near=2, arg=4)
_WRITE = Operation(Kind.WRITE)
_MOVE = Operation(Kind.MOVE, near=5)
#: ksmd can then merge none of the pages that are equal to the first
_HOLD = Operation(Kind.HOLD, part=Part.FIRST)
_FILE = replace(_MAP, kind=Kind.MAP_FILE)
_WALK = Operation(Kind.WALK)
_REGISTER = Operation(Kind.UFFD_REGISTER)
_PROTECT = Operation(Kind.UFFD_PROTECT)
#: maps four pages, writes them and moves them
_PLAIN: Program = (_MAP, _WRITE, _MOVE)
#: where it moves them
_AT = 6 * memory.PLACE_PAGES


#: what needs one mapping, and moves several on new kernels; what a kernel may lack; what a moment may forbid; what the
#: program wants to be refused
_MAY_BE_REFUSED = frozenset({Kind.PROTECT_NONE, Kind.BIND, Kind.NAME, Kind.SOFT_OFFLINE, Kind.UFFD_MOVE})
#: what not every kernel allows
_NOT_EVERYWHERE = frozenset({Kind.POKE, Kind.UFFD_REGISTER, Kind.UFFD_MOVE, Kind.SWAPOFF})


def _require_userfaultfd() -> None:
    if Kind.UFFD_REGISTER not in kinds():
        pytest.skip("needs a userfaultfd that protects memory which was never touched (6.4, and on arm64 6.10)")


@pytest.fixture
def executor() -> Iterator[Executor]:
    made = Executor()
    yield made
    made.arena.reset()


def _run(executor: Executor, program: Program) -> Outcome:
    return executor.run([tuple(each) for each in language.to_wire(program)], thorough=True, layout=True)


def _also(executor: Executor, kind: Kind, then: Any) -> None:
    """Have something else done after each operation of a kind, behind the model's back."""
    number = KINDS.index(kind)
    action = executor.actions.table[number]

    def both(step: Step, tags: bytes) -> int:
        error = action(step, tags)
        then(step)
        return error

    executor.actions.table[number] = both


@pytest.mark.parametrize(
    "program",
    [
        _PLAIN,
        (
            _MAP,
            _WRITE,
            Operation(Kind.MOVE, part=Part.FIRST_HALF, near=5, into=1),
            Operation(Kind.MOVE, slot=1, to=To.HOME),
        ),
        (_MAP, _WRITE, Operation(Kind.FORK, arg=1), _MOVE, Operation(Kind.WRITE, process=1, part=Part.FIRST)),
        (
            _MAP,
            Operation(Kind.WRITE_SAME),
            Operation(Kind.MERGEABLE),
            Operation(Kind.SCAN),
            _MOVE,
            Operation(Kind.SCAN),
        ),
        (_MAP, Operation(Kind.WRITE_SAME), Operation(Kind.MERGEABLE), _HOLD, Operation(Kind.SCAN)),
        (
            _MAP,
            Operation(Kind.WRITE_SAME),
            Operation(Kind.MERGEABLE),
            Operation(Kind.PROTECT_NONE, part=Part.LAST),
            Operation(Kind.SCAN),
        ),
        (_MAP, _WRITE, Operation(Kind.PAGEOUT), _MOVE),
        (_MAP, _WRITE, Operation(Kind.PAGEOUT), _MOVE, Operation(Kind.SWAPOFF), _WALK),
        (
            _MAP,
            _WRITE,
            Operation(Kind.PROTECT_NONE, part=Part.FIRST),
            Operation(Kind.PROTECT_READ, part=Part.LAST),
            Operation(Kind.POKE, part=Part.FIRST),
            Operation(Kind.FORK, arg=1),
            Operation(Kind.POKE, part=Part.LAST),
            Operation(Kind.POKE, process=1, part=Part.LAST),
        ),
        (
            _MAP,
            Operation(Kind.WRITE_SAME),
            Operation(Kind.MERGEABLE),
            Operation(Kind.SCAN),
            _MOVE,
            Operation(Kind.SOFT_OFFLINE, part=Part.FIRST),
            Operation(Kind.FORK, arg=1),
            Operation(Kind.SOFT_OFFLINE, part=Part.LAST),
        ),
        (_MAP, _WRITE, Operation(Kind.LOCK), Operation(Kind.PROTECT_NONE, part=Part.LAST), _MOVE),
        (
            _FILE,
            Operation(Kind.WRITE, part=Part.FIRST),
            Operation(Kind.READ),
            _MOVE,
            Operation(Kind.GROW, arg=3),
            Operation(Kind.READ),
        ),
        (
            _FILE,
            Operation(Kind.READ),
            Operation(Kind.MAP, near=5, into=1),
            Operation(Kind.WRITE_SAME, slot=1),
            Operation(Kind.MERGEABLE),
            Operation(Kind.MERGEABLE, slot=1),
            Operation(Kind.SCAN),
        ),
        (_MAP, Operation(Kind.BIND, part=Part.FIRST_HALF), _WRITE, Operation(Kind.UNBIND, part=Part.FIRST), _MOVE),
        (_MAP, Operation(Kind.NAME, part=Part.LAST), _WRITE, Operation(Kind.FORK, arg=1), Operation(Kind.UNNAME)),
        (_FILE, Operation(Kind.NAME), _WRITE),
        (
            _MAP,
            _WRITE,
            _WALK,
            _MOVE,
            Operation(Kind.FORK, arg=1),
            replace(_WALK, process=1, part=Part.MIDDLE),
            _WALK,
        ),
        (_MAP, _WRITE, Operation(Kind.PROTECT_NONE, part=Part.LAST), _WALK, _MOVE, _WALK),
        (
            _MAP,
            Operation(Kind.WRITE, part=Part.FIRST_HALF),
            _REGISTER,
            _PROTECT,
            Operation(Kind.READ),
            Operation(Kind.PAGEOUT),
            _WALK,
            Operation(Kind.FORK, arg=1),
            Operation(Kind.UFFD_UNPROTECT, part=Part.FIRST),
            Operation(Kind.MOVE_DONTUNMAP, part=Part.SECOND_HALF, near=5, into=1),
            Operation(Kind.UFFD_UNREGISTER, part=Part.LAST),
        ),
        (
            _MAP,
            _WRITE,
            Operation(Kind.MOVE_DONTUNMAP, near=5, into=1),
            _REGISTER,
            Operation(Kind.PAGEOUT, slot=1, part=Part.LAST),
            Operation(Kind.UFFD_MOVE, slot=1, part=Part.FIRST, to=To.HOME),
            Operation(Kind.UFFD_MOVE, slot=1, part=Part.LAST, to=To.HOME),
            _WALK,
            Operation(Kind.UFFD_MOVE, slot=1, part=Part.MIDDLE, to=To.ONTO),
        ),
        (
            _MAP,
            Operation(Kind.WRITE_SAME),
            _REGISTER,
            _PROTECT,
            Operation(Kind.MERGEABLE),
            Operation(Kind.SCAN),
            _PROTECT,
            Operation(Kind.UNMERGEABLE, part=Part.FIRST),
        ),
    ],
    ids=[
        "moved",
        "home again",
        "forked",
        "merged",
        "held",
        "merged while nobody may read it",
        "swapped out",
        "read back by swapoff",
        "poked",
        "taken out of use",
        "locked",
        "a file",
        "merged beside a file",
        "bound",
        "named",
        "a file that is named",
        "walked",
        "walked while nobody may read it",
        "registered",
        "moved by a userfaultfd",
        "merged while registered",
    ],
)
def test_an_innocent_program_passes(executor: Executor, ksm: Ksm, program: Program) -> None:
    """No row: small programs of each kind run.

    Every kernel: no check of the explorer complains.
    """
    if lacking := sorted({each.kind for each in program} & _NOT_EVERYWHERE - set(kinds())):
        pytest.skip(f"needs a kernel that has {', '.join(lacking)}")
    outcome = _run(executor, program)
    assert outcome.failure is None, outcome
    if not _MAY_BE_REFUSED.intersection(each.kind for each in program):
        assert not any(outcome.errors), outcome


@pytest.mark.parametrize("kind", [Kind.MOVE_UNDONE, Kind.MOVE_FALLBACK])
@pytest.mark.parametrize("number", [1, 4, 5])
def test_a_move_is_undone_if_it_has_the_folio_that_fails(executor: Executor, kind: Kind, number: int) -> None:
    """No row: four pages relocate, and the relocation of one of them is made to fail.

    ::

        page    48                  96
                |abcd|     ->       | 1..4 |    the first, the last, and a fifth that there is not

    A kernel with relocation: the move is undone, or there is no fifth; EFAULT with flag 16; no check complains.
    """
    if kind not in kinds():
        pytest.skip("needs a kernel with relocation that can be made to fail")
    before = vmstat.vmstat()
    outcome = _run(executor, (_MAP, _WRITE, replace(_MOVE, kind=kind, arg=number), _WALK))
    assert outcome.failure is None, outcome
    fails = number < 5
    assert outcome.errors == [0, 0, errno.EFAULT if fails and kind is Kind.MOVE_UNDONE else 0, 0], outcome
    # Nothing was moved yet when the first one failed.
    assert vmstat.delta(before, "mremap_undone") == (number == 4)


@pytest.mark.parametrize("kind", [Kind.MOVE_UNDONE, Kind.MOVE_MUST_RELOCATE])
def test_two_mappings_that_look_alike_are_not_relocated_at_once(executor: Executor, kind: Kind) -> None:
    """No row: two pages are touched while their mappings differ, so that each has an anon_vma, and then made alike.

    ::

        page    48
                |a|b|    two mappings for ever

    Every kernel: a move that might end between them is skipped.
    """
    halves = (replace(_MAP, arg=2), Operation(Kind.HUGEPAGE, part=Part.FIRST_HALF), _WRITE, Operation(Kind.HUGEPAGE))
    outcome = _run(executor, (*halves, replace(_MOVE, kind=kind, arg=2)))
    assert outcome.failure is None, outcome
    assert outcome.errors == [0, 0, 0, 0, -1], outcome


def test_a_page_written_behind_the_models_back_is_seen(executor: Executor) -> None:
    """No row: one byte at the beginning of a page changes after a move.

    Every kernel: the check of the bytes names the page.
    """
    _also(executor, Kind.MOVE, lambda step: executor.arena.fill(step.dst + 1, step.dst + 2, b"\xff"))
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("bytes", _AT + 1), failure


def test_a_byte_in_the_middle_of_a_page_is_seen(executor: Executor) -> None:
    """No row: one byte in the middle of a page changes after a move.

    Every kernel: the thorough check of the bytes names the page.
    """

    def write(step: Step) -> None:
        executor.arena.bytes[step.dst * PAGE + PAGE // 2] = 1

    _also(executor, Kind.MOVE, write)
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("bytes", _AT), failure


def test_a_model_that_lies_is_found_out(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row: the model believes that pages hold other bytes than those that are written.

    Every kernel: the check of the bytes complains.
    """
    monkeypatch.setattr(effects, "new_tags", lambda _machine, step: bytes(step.pages))
    _also(executor, Kind.WRITE, lambda step: executor.arena.fill(step.start, step.start + 1, b"\x09"))
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert failure.oracle == "bytes", failure


def test_a_walk_that_skips_a_page_is_found_out(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row: one page of the program is left out of every forced walk.

    Every kernel: the check of the walks names the page.
    """
    system.require_nodes(2)
    migrate = executor.arena.migrate

    def skip(pid: int, addresses: list[int], nodes: list[int]) -> None:
        kept = [(each, node) for each, node in zip(addresses, nodes, strict=True) if each // PAGE % 16 != 2]
        migrate(pid, [each for each, _ in kept], [node for _, node in kept])

    monkeypatch.setattr(executor.arena, "migrate", skip)
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("walk", _AT + 2), failure


def test_a_walk_in_the_middle_that_skips_a_page_is_found_out(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row: as before, but the page is unmapped before the walk at the end.

    Every kernel: the walk in the middle names the page, and a plan with it does not come true.
    """
    system.require_nodes(2)
    migrate = executor.arena.migrate
    start = 3 * memory.PLACE_PAGES

    def skip(pid: int, addresses: list[int], nodes: list[int]) -> None:
        kept = [(each, node) for each, node in zip(addresses, nodes, strict=True) if each != address(start + 2)]
        migrate(pid, [each for each, _ in kept], [node for _, node in kept])

    program = (_MAP, _WRITE, _WALK, Operation(Kind.UNMAP))
    steps = [
        [KINDS.index(Kind.MAP), start, 0, start, 4, ""],
        [KINDS.index(Kind.WRITE), start, 4, start, 4, "02030405"],
        [KINDS.index(Kind.WALK), start, 4, start, 4, ""],
        [KINDS.index(Kind.UNMAP), start + 1, 3, start + 1, 3, ""],
    ]
    planned = [steps, [[start, start + 1, "02"]], start, start + 1]
    assert _run(executor, program).failure is None
    assert executor.run_plan(planned)
    monkeypatch.setattr(executor.arena, "migrate", skip)
    failure = _run(executor, program).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("walk", start + 2), failure
    assert not executor.run_plan(planned)


def test_a_walk_to_the_node_where_a_page_is_proves_nothing(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row: every page is asked to move to the node where it is already, which succeeds without a walk.

    Every kernel: no page counts as found, the control page included, so that no failure is told either.
    """
    system.require_nodes(2)
    migrate = executor.arena.migrate
    first, second = numa.nodes()
    other = {first: second, second: first}
    monkeypatch.setattr(
        executor.arena, "migrate", lambda pid, pages, nodes: migrate(pid, pages, [other[node] for node in nodes])
    )
    outcome = _run(executor, _PLAIN)
    assert outcome.failure is None, outcome
    assert executor.walker.moved == 0
    assert executor.walker.unable == 1


def test_the_walk_moves_every_page(executor: Executor) -> None:
    """No row: four pages are moved and walked.

    Every kernel: four pages are seen on another node.
    """
    system.require_nodes(2)
    assert _run(executor, _PLAIN).failure is None
    assert executor.walker.moved == 4


def test_memory_that_is_mapped_elsewhere_is_seen(executor: Executor) -> None:
    """No row: a page is unmapped after a move, which the model does not know.

    Every kernel: the check of the layout names the page.
    """
    unmap = executor.actions.table[KINDS.index(Kind.UNMAP)]
    _also(executor, Kind.MOVE, lambda step: unmap(Step(0, 0, step.dst + 3, 1, 0, 0, ()), b""))
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("layout", _AT + 3), failure


def test_an_advice_that_is_lost_is_seen(executor: Executor, ksm: Ksm) -> None:
    """No row: MADV_UNMERGEABLE is given behind the model's back.

    Every kernel: the check of the accounts misses the flag.
    """
    unmergeable = executor.actions.table[KINDS.index(Kind.UNMERGEABLE)]
    _also(executor, Kind.MOVE, lambda step: unmergeable(Step(0, 0, step.dst, step.new, 0, 0, ()), b""))
    failure = _run(executor, (_MAP, _WRITE, Operation(Kind.MERGEABLE), _MOVE)).failure
    assert failure is not None
    assert failure.oracle == "accounts", failure


@pytest.mark.parametrize("kind", [Kind.UFFD_UNPROTECT, Kind.UFFD_PROTECT])
def test_a_mark_of_a_userfaultfd_that_changes_is_seen(executor: Executor, kind: Kind) -> None:
    """No row: a userfaultfd write-protects one page too few or too many, behind the model's back.

    Kernels whose userfaultfd protects memory that was never touched (6.4): the check of the marks names the page.
    """
    _require_userfaultfd()
    number = 0 if kind is Kind.UFFD_UNPROTECT else 3
    act = executor.actions.table[KINDS.index(kind)]
    _also(executor, Kind.READ, lambda step: act(Step(0, 0, step.start + number, 1, 0, 0, ()), b""))
    program = (_MAP, _WRITE, _REGISTER, replace(_PROTECT, part=Part.FIRST_HALF), Operation(Kind.READ))
    failure = _run(executor, program).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("marks", 3 * memory.PLACE_PAGES + number), failure


def test_memory_that_leaves_its_userfaultfd_is_seen(executor: Executor) -> None:
    """No row: memory that is registered with a userfaultfd is given back behind the model's back.

    Kernels whose userfaultfd protects memory that was never touched (6.4): the check of the accounts misses the flag.
    """
    _require_userfaultfd()
    unregister = executor.actions.table[KINDS.index(Kind.UFFD_UNREGISTER)]
    _also(executor, Kind.READ, lambda step: unregister(step, b""))
    failure = _run(executor, (_MAP, _WRITE, _REGISTER, Operation(Kind.READ))).failure
    assert failure is not None
    assert (failure.oracle, failure.text) == ("accounts", "smaps does not show uw for the mapping of page 48")


def test_a_refused_call_that_changes_a_page_is_seen(executor: Executor) -> None:
    """No row: an operation discards a page and then says that it was refused.

    Every kernel: the check of refused operations names the page.
    """
    discard = executor.actions.table[KINDS.index(Kind.DONTNEED)]

    def refuse(step: Step, _: bytes) -> int:
        discard(Step(0, 0, step.start, 1, 0, 0, ()), b"")
        return errno.EFAULT

    executor.actions.table[KINDS.index(Kind.MOVE)] = refuse
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("refused", 3 * memory.PLACE_PAGES), failure


def test_an_errno_that_makes_no_sense_is_seen(executor: Executor) -> None:
    """No row: a move fails with EIO.

    Every kernel: the check of refused operations complains.
    """
    executor.actions.table[KINDS.index(Kind.MOVE)] = lambda _step, _tags: errno.EIO
    failure = _run(executor, _PLAIN).failure
    assert failure is not None
    assert failure.oracle == "refused", failure


def test_equal_pages_that_stay_apart_are_seen(executor: Executor, ksm: Ksm) -> None:
    """No row: ksmd is not started although the model believes in three scans.

    Every kernel: the check of merging names a page.
    """
    executor.actions.table[KINDS.index(Kind.SCAN)] = lambda _step, _tags: 0
    program = (_MAP, Operation(Kind.WRITE_SAME), Operation(Kind.MERGEABLE), Operation(Kind.SCAN))
    failure = _run(executor, program).failure
    assert failure is not None
    assert failure.oracle == "merge", failure


def test_a_plan_that_does_not_come_true_is_seen(executor: Executor) -> None:
    """No row: a program that was worked out ahead of time runs, and once with a wrong byte in what it should leave.

    Every kernel: the first comes out as planned, the second does not.
    """
    start = 3 * memory.PLACE_PAGES
    steps = [[KINDS.index(Kind.MAP), start, 0, start, 2, ""], [KINDS.index(Kind.WRITE), start, 2, start, 2, "0203"]]
    assert executor.run_plan([steps, [[start, start + 2, "0203"]], start, start + 2])
    assert not executor.run_plan([steps, [[start, start + 2, "0204"]], start, start + 2])


def test_memory_with_huge_page_advice_has_large_folios(executor: Executor) -> None:
    """No row: programs meet large folios, although their mappings are at most eight pages long.

    Kernels that have them (6.8): the folios of a moved mapping are still large, and everything is as it should be.
    """
    if not (folios.THP / f"hugepages-{4 * PAGE >> 10}kB").exists():
        pytest.skip("needs Linux 6.8 and CONFIG_TRANSPARENT_HUGEPAGE")
    large: list[bool] = []
    _also(executor, Kind.MOVE, lambda step: large.append(folios.is_large(address(step.dst))))
    with folios.advised_folios():
        outcome = _run(executor, (_MAP, Operation(Kind.HUGEPAGE), _WRITE, _MOVE))
    assert outcome.failure is None
    assert large == [True]


# --- races -------------------------------------------------------------------------------------------------------


def test_a_rival_walks_while_programs_run_and_rests_otherwise(executor: Executor, ksm: Ksm) -> None:
    """No row: another process migrates, reclaims and merges the memory of an innocent program, which runs many times.

    Every kernel: the program passes each time, the other process takes steps meanwhile, and none afterwards.
    """
    operations = (_MAP, Operation(Kind.WRITE_SAME), Operation(Kind.MERGEABLE), _MOVE)
    program = [tuple(each) for each in language.to_wire(operations)]
    with Rival(seed=1) as rival:
        assert rival.steps == 0
        for _ in range(30):
            failure = executor.run(program, thorough=True, layout=True, rival=rival).failure
            assert failure is None, failure
        taken = rival.steps
        assert taken > 0, "it never came to a step"
        time.sleep(0.1)
        assert rival.steps == taken, "it goes on while it should rest"


def test_a_page_that_is_left_in_a_migration_is_seen(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row: after a race pagemap shows the entry of a migration for a page.

    Every kernel: the check names the page, and does not read it, which would take for ever.
    """
    entries = executor.arena.entries()
    entries[_AT + 1] = pagemap.SWAP | 30  # a swap entry of the type that 7.3 has for migrations of writable pages
    monkeypatch.setattr(executor, "_entries", lambda machine: [entries, [], []])
    monkeypatch.setattr(executor, "_check", lambda *_, **__: pytest.fail("it reads the page"))
    with Rival(seed=1) as rival:
        failure = executor.run([tuple(each) for each in language.to_wire(_PLAIN)], rival=rival).failure
    assert failure is not None
    assert (failure.oracle, failure.page) == ("walk", _AT + 1), failure
