# SPDX-License-Identifier: GPL-2.0
"""The explorer on the host: its language, the model of memory, generation, plans and shrinking."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.explore import files
from harness.explore.plan import plan
from harness.programs import effects, language, memory, operands
from harness.programs.generate import LENGTH, Generator
from harness.programs.language import BadProgram, Kind, Operation, Part, Program, To
from harness.programs.memory import (
    LAZY,
    MAPPED,
    PLACE_PAGES,
    PROTECTED,
    READ,
    REGISTERED,
    SWAPPED,
    WRITE,
    Machine,
    Step,
)
from harness.programs.shrink import shrink

MAP = Operation(Kind.MAP, to=To.PLACE, near=2, into=0, arg=4)
WRITE_A = Operation(Kind.WRITE)
MOVE_A = Operation(Kind.MOVE, to=To.PLACE, near=5)


def _after(*program: Operation) -> Machine:
    """The model after operations that all succeed."""
    machine = Machine()
    for wire in language.to_wire(program):
        step = operands.resolve(machine, tuple(wire))
        if step is not None:
            tags = effects.new_tags(machine, step) if step.kind in (3, 4) else b""
            effects.apply(machine, step, tags)
    return machine


def _makes_sense(machine: Machine, operation: Operation) -> bool:
    (wire,) = language.to_wire((operation,))
    return operands.resolve(machine, tuple(wire)) is not None


def _step(machine: Machine, operation: Operation) -> Step:
    """The step of an operation that makes sense."""
    (wire,) = language.to_wire((operation,))
    step = operands.resolve(machine, tuple(wire))
    assert step is not None
    return step


def _at(place: int) -> int:
    return (place + 1) * PLACE_PAGES


# --- language ----------------------------------------------------------------------------------------------------


def test_a_program_survives_its_file_and_the_wire() -> None:
    program = Generator(7, list(Kind)).next().program
    assert language.from_json(language.to_json(program)) == program
    assert tuple(language.decoded(each) for each in language.from_wire(language.to_wire(program))) == program


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a program"),
        ('{"mremap-program": 99, "operations": []}', "format version 99"),
        ('{"mremap-program": 1, "operations": [{"kind": "explode"}]}', "kind is 'explode'"),
        ('{"mremap-program": 1, "operations": [{"kind": "map", "slot": 99}]}', "slot is not a number from 0 to 7"),
        ('{"mremap-program": 1, "operations": [{"kind": "map", "slot": true}]}', "slot is not a number"),
        ('{"mremap-program": 1, "operations": [{"slot": 1}]}', "operation 1"),
        (json.dumps({"mremap-program": 1, "operations": [{"kind": "map"}] * 65}), "at most 64"),
        ("[" * 100_000, "at most 65536"),
        ("[" * 60_000, "not JSON"),
    ],
)
def test_a_foreign_or_corrupt_file_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "program.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        files.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [1], [[0] * 7], [[0] * 7 + [99]], [[0] * 7 + [True]], [[0] * 8] * 65])
def test_numbers_out_of_range_are_no_program(data: object) -> None:
    with pytest.raises(BadProgram):
        language.from_wire(data)


# --- model -------------------------------------------------------------------------------------------------------


def test_a_moved_page_takes_its_contents_along_and_leaves_nothing() -> None:
    machine = _after(MAP, WRITE_A, MOVE_A)
    (pages,) = (each for each in machine.processes if each)
    assert memory.runs(pages) == [(_at(5), _at(5) + 4)]
    assert machine.contents(pages, _at(5), _at(5) + 4) == bytes([2, 3, 4, 5])


def test_touched_memory_remembers_its_home_and_untouched_memory_does_not() -> None:
    home = replace(MOVE_A, to=To.HOME)
    touched, untouched = _after(MAP, WRITE_A, MOVE_A, home), _after(MAP, MOVE_A, home)
    places = [[memory.runs(each) for each in machine.processes if each] for machine in (touched, untouched)]
    assert places == [[[(_at(2), _at(2) + 4)]], [[(_at(5), _at(5) + 4)]]]


def test_dontunmap_leaves_empty_memory_behind() -> None:
    machine = _after(MAP, WRITE_A, replace(MOVE_A, kind=Kind.MOVE_DONTUNMAP, into=1))
    pages = machine.processes[0]
    assert pages is not None
    assert memory.runs(pages) == [(_at(2), _at(2) + 4), (_at(5), _at(5) + 4)]
    assert machine.contents(pages, _at(2), _at(2) + 4) == bytes(4)


def test_a_move_over_others_replaces_them() -> None:
    other = replace(MAP, near=5, into=1)
    machine = _after(
        MAP, WRITE_A, other, replace(WRITE_A, slot=1), replace(MOVE_A, part=Part.FIRST, to=To.ONTO, near=1)
    )
    pages = machine.processes[0]
    assert pages is not None
    assert machine.contents(pages, _at(5), _at(5) + 4) == bytes([2, 7, 8, 9])


def test_a_child_has_a_copy_without_what_is_not_forked() -> None:
    machine = _after(
        MAP,
        WRITE_A,
        Operation(Kind.DONTFORK, part=Part.FIRST),
        Operation(Kind.WIPEONFORK, part=Part.LAST),
        Operation(Kind.FORK, arg=1),
        WRITE_A,
    )
    parent, child, _ = machine.processes
    assert parent is not None
    assert child is not None
    assert machine.contents(parent, _at(2), _at(2) + 4) == bytes([6, 7, 8, 9])
    assert memory.runs(child) == [(_at(2) + 1, _at(2) + 4)]
    assert machine.contents(child, _at(2) + 1, _at(2) + 4) == bytes([3, 4, 0])


def test_shared_memory_has_one_content_in_all_processes() -> None:
    machine = _after(replace(MAP, kind=Kind.MAP_SHARED), Operation(Kind.FORK, arg=1), replace(WRITE_A, process=1))
    parent = machine.processes[0]
    assert parent is not None
    assert machine.contents(parent, _at(2), _at(2) + 4) == bytes([2, 3, 4, 5])


@pytest.mark.parametrize(
    "operation",
    [
        MOVE_A,  # nothing is mapped
        Operation(Kind.WRITE, slot=3),
        Operation(Kind.WRITE, process=1),
        Operation(Kind.EXIT, process=1),
        Operation(Kind.MOVE, to=To.AFTER, near=3),
        Operation(Kind.SCAN),
    ],
    ids=str,
)
def test_an_operation_that_makes_no_sense_is_skipped(operation: Operation) -> None:
    (wire,) = language.to_wire((operation,))
    assert operands.resolve(Machine(), tuple(wire)) is None


def test_several_mappings_are_not_moved_with_the_flag_that_may_stop_half_way() -> None:
    must = Operation(Kind.MOVE_MUST_RELOCATE, near=5)
    (wire,) = language.to_wire((must,))
    assert operands.resolve(_after(MAP, WRITE_A), tuple(wire)) is not None
    for first in (Kind.WIPEONFORK, Kind.HUGEPAGE, Kind.NOHUGEPAGE, Kind.LOCK):
        assert operands.resolve(_after(MAP, WRITE_A, Operation(first, part=Part.FIRST)), tuple(wire)) is None


def test_a_child_does_not_move_with_the_flag_that_may_stop_half_way() -> None:
    machine = _after(MAP, Operation(Kind.LOCK, part=Part.FIRST), Operation(Kind.FORK, arg=1))
    assert not _makes_sense(machine, Operation(Kind.MOVE_MUST_RELOCATE, process=1, near=5))
    assert _makes_sense(machine, Operation(Kind.MOVE_RELOCATE, process=1, near=5))


#: registers memory and write-protects its first half
REGISTER = Operation(Kind.UFFD_REGISTER)
PROTECT = Operation(Kind.UFFD_PROTECT, part=Part.FIRST_HALF)


def _marked(machine: Machine, process: int = 0) -> tuple[list[int], list[int]]:
    """The pages of a process that are registered with a userfaultfd, and those that it write-protects."""
    pages = machine.processes[process]
    assert pages is not None
    registered = [page for page, kept in enumerate(pages.kept) if kept & REGISTERED]
    return registered, [page for page, more in enumerate(pages.more) if more & PROTECTED]


@pytest.mark.parametrize(
    ("then", "registered", "protected"),
    [
        ([], [0, 1, 2, 3], [0, 1]),
        ([Operation(Kind.UFFD_UNPROTECT, part=Part.FIRST)], [0, 1, 2, 3], [1]),
        ([Operation(Kind.UFFD_UNREGISTER, part=Part.FIRST)], [1, 2, 3], [1]),
        ([Operation(Kind.DONTNEED, part=Part.FIRST)], [0, 1, 2, 3], [1]),
        ([Operation(Kind.PAGEOUT), Operation(Kind.READ), Operation(Kind.PROTECT_READ)], [0, 1, 2, 3], [0, 1]),
        ([Operation(Kind.GROW, arg=2)], [0, 1, 2, 3, 4, 5], [0, 1]),
        ([Operation(Kind.SHRINK)], [0, 1], [0, 1]),
        ([MOVE_A], [], []),
        ([replace(MOVE_A, kind=Kind.MOVE_GROW)], [], []),
        ([replace(MOVE_A, part=Part.FIRST)], [1, 2, 3], [1]),
        ([replace(MOVE_A, kind=Kind.MOVE_DONTUNMAP)], [0, 1, 2, 3], []),
        ([Operation(Kind.FORK, arg=1)], [0, 1, 2, 3], [0, 1]),
        ([Operation(Kind.MERGEABLE), Operation(Kind.SCAN)], [0, 1, 2, 3], [0, 1]),
    ],
    ids=lambda each: ", ".join(map(str, each)) if each and isinstance(each[0], Operation) else "",
)
def test_a_userfaultfd_keeps_its_marks_until_memory_leaves_it(
    then: list[Operation], registered: list[int], protected: list[int]
) -> None:
    found = _marked(_after(MAP, WRITE_A, REGISTER, PROTECT, *then))
    assert found == tuple([_at(2) + page for page in pages] for pages in (registered, protected))


#: empty memory that is registered, to which pages are moved
EMPTY = Operation(Kind.MAP, near=6, into=1, arg=4)
REGISTER_EMPTY = replace(REGISTER, slot=1)
MOVE_PAGE = Operation(Kind.UFFD_MOVE, part=Part.LAST, to=To.ONTO, near=1)


def test_a_userfaultfd_moves_one_page_and_leaves_its_marks_behind() -> None:
    machine = _after(MAP, WRITE_A, REGISTER, PROTECT, EMPTY, REGISTER_EMPTY, replace(MOVE_PAGE, part=Part.FIRST_HALF))
    assert _marked(machine) == ([_at(place) + page for place in (2, 6) for page in range(4)], [_at(2) + 1])
    pages = machine.processes[0]
    assert pages is not None
    assert machine.contents(pages, _at(2), _at(2) + 2) == bytes([0, 3])
    assert machine.contents(pages, _at(6), _at(6) + 2) == bytes([2, 0])
    assert pages.slots[:2] == [(_at(2), 4), (_at(6), 4)]


@pytest.mark.parametrize(
    ("before", "possible"),
    [
        ([EMPTY, REGISTER_EMPTY], True),
        ([EMPTY], False),
        ([replace(EMPTY, kind=Kind.MAP_FILE)], False),
        ([REGISTER], False),
        ([EMPTY, REGISTER_EMPTY, Operation(Kind.FREE)], False),
        ([EMPTY, REGISTER_EMPTY, Operation(Kind.GUARD, slot=1)], False),
    ],
)
def test_a_page_is_moved_to_registered_memory_only(before: list[Operation], possible: bool) -> None:
    assert _makes_sense(_after(MAP, WRITE_A, *before), MOVE_PAGE) is possible
    assert not _makes_sense(_after(MAP, WRITE_A, *before, Operation(Kind.FORK, arg=1)), replace(MOVE_PAGE, process=1))


def test_the_generator_avoids_moves_that_a_userfaultfd_refuses() -> None:
    for then, refused in (
        ([], False),
        ([Operation(Kind.DONTNEED)], True),
        ([Operation(Kind.FORK, arg=1)], True),
        ([Operation(Kind.PROTECT_READ)], True),
        ([Operation(Kind.LOCK)], True),
        ([Operation(Kind.WRITE, slot=1)], True),
    ):
        machine = _after(MAP, WRITE_A, EMPTY, REGISTER_EMPTY, *then)
        assert operands.likely_refused(machine, _step(machine, MOVE_PAGE)) is refused, then


def test_one_page_is_written_past_its_protection() -> None:
    machine = _after(MAP, WRITE_A, Operation(Kind.PROTECT_NONE), Operation(Kind.FREE, part=Part.FIRST_HALF))
    poke = Operation(Kind.POKE, part=Part.FIRST_HALF)
    assert _makes_sense(machine, poke)
    assert not _makes_sense(machine, replace(poke, kind=Kind.WRITE))
    step = _step(machine, poke)
    tags = effects.new_tags(machine, step)
    effects.apply(machine, step, tags)
    pages = machine.processes[0]
    assert pages is not None
    assert (len(tags), machine.contents(pages, _at(2), _at(2) + 4)) == (1, bytes([6, 3, 4, 5]))
    assert [bool(attr & LAZY) for attr in pages.attr[_at(2) : _at(2) + 4]] == [False, True, False, False]
    for kind in (Kind.GUARD, Kind.UFFD_REGISTER):
        assert not _makes_sense(_after(MAP, Operation(kind), Operation(Kind.UFFD_PROTECT)), poke)
    assert not _makes_sense(_after(replace(MAP, kind=Kind.MAP_SHARED)), poke)


def test_only_a_page_of_its_own_is_taken_out_of_use() -> None:
    offline = Operation(Kind.SOFT_OFFLINE, part=Part.LAST)
    assert _makes_sense(_after(MAP, WRITE_A), offline)
    for then in (Operation(Kind.PROTECT_NONE), Operation(Kind.DONTNEED), Operation(Kind.FREE)):
        assert not _makes_sense(_after(MAP, WRITE_A, then), offline), then
    machine = _after(MAP, WRITE_A, Operation(Kind.PAGEOUT), offline)
    pages = machine.processes[0]
    assert pages is not None
    assert [bool(more & SWAPPED) for more in pages.more[_at(2) : _at(2) + 4]] == [True, True, True, False]
    effects.apply(machine, _step(machine, Operation(Kind.SWAPOFF)))
    assert not any(more & SWAPPED for more in pages.more)


def test_a_move_is_undone_if_it_has_the_folio_that_fails() -> None:
    third = Operation(Kind.MOVE_UNDONE, near=5, arg=3)
    for then, undone in (
        ([WRITE_A], True),
        ([replace(WRITE_A, part=Part.FIRST_HALF)], False),
        ([WRITE_A, Operation(Kind.DONTNEED, part=Part.LAST)], True),
        ([], False),
    ):
        machine = _after(MAP, *then)
        assert operands.undone(machine, _step(machine, third)) is undone, then
    machine = _after(replace(MAP, kind=Kind.MAP_FILE), WRITE_A)
    assert not operands.undone(machine, _step(machine, third)), "private files are not relocated"
    assert plan((MAP, WRITE_A, third)) is None, "a plan takes every operation to succeed"
    assert not _makes_sense(_after(MAP, WRITE_A, Operation(Kind.FORK, arg=1)), replace(third, process=1))


def test_where_memory_is_at_home_is_unknown_when_its_relocation_may_have_failed() -> None:
    fallback = Operation(Kind.MOVE_FALLBACK, near=5)
    machine = _after(MAP, WRITE_A, fallback, replace(MOVE_A, near=7))
    pages = machine.processes[0]
    assert pages is not None
    assert [*pages.home[_at(7) : _at(7) + 4]] == [memory.UNKNOWN] * 4
    assert not _makes_sense(machine, Operation(Kind.MOVE, to=To.HOME))
    assert not _makes_sense(machine, Operation(Kind.MOVE_MUST_RELOCATE, near=3)), "it may be two mappings"
    assert _makes_sense(machine, Operation(Kind.MOVE_RELOCATE, near=3))
    untouched = _after(MAP, fallback).processes[0]
    assert untouched is not None
    assert untouched.home[_at(5)] == _at(5)


def test_a_refused_move_may_have_unmapped_its_place() -> None:
    machine = _after(MAP, WRITE_A, replace(MAP, near=5, into=1), replace(WRITE_A, slot=1))
    pages = machine.processes[0]
    assert pages is not None
    before = pages.attr[_at(2) : _at(2) + 4], pages.tags[_at(2) : _at(2) + 4]
    effects.refuse(machine, _step(machine, Operation(Kind.MOVE_UNDONE, near=5)))
    assert not any(pages.attr[_at(5) : _at(5) + 4])
    assert (pages.attr[_at(2) : _at(2) + 4], pages.tags[_at(2) : _at(2) + 4]) == before
    effects.refuse(machine, _step(machine, Operation(Kind.MOVE_SHRINK, near=5)))
    assert [bool(attr) for attr in pages.attr[_at(2) : _at(2) + 4]] == [True, True, False, False]


def test_a_child_has_no_userfaultfd() -> None:
    machine = _after(MAP, REGISTER, PROTECT, Operation(Kind.FORK, arg=1))
    assert _marked(machine, 1) == ([], [])
    assert not _makes_sense(machine, replace(REGISTER, process=1))
    assert _makes_sense(machine, replace(WRITE_A, process=1))


@pytest.mark.parametrize("kind", [Kind.WRITE, Kind.WRITE_SAME, Kind.POPULATE, Kind.LOCK])
def test_what_a_userfaultfd_protects_is_not_written(kind: Kind) -> None:
    machine = _after(MAP, REGISTER, PROTECT)
    assert not _makes_sense(machine, Operation(kind, part=Part.FIRST))
    assert _makes_sense(machine, Operation(kind, part=Part.LAST))


def test_only_anonymous_memory_of_a_process_is_registered_and_only_registered_memory_protected() -> None:
    assert _makes_sense(_after(MAP), REGISTER)
    for kind in (Kind.MAP_SHARED, Kind.MAP_FILE):
        assert not _makes_sense(_after(replace(MAP, kind=kind)), REGISTER)
    machine = _after(MAP, replace(REGISTER, part=Part.FIRST))
    assert not _makes_sense(machine, PROTECT)
    assert _makes_sense(machine, replace(PROTECT, part=Part.FIRST))


def test_only_what_is_registered_is_ever_protected() -> None:
    generator, protected = Generator(1, list(Kind)), 0
    for _ in range(1500):
        for pages in _after(*generator.next().program).processes:
            if pages is not None:
                marked = [kept for more, kept in zip(pages.more, pages.kept, strict=True) if more & PROTECTED]
                assert all(kept & REGISTERED for kept in marked)
                protected += len(marked)
    assert protected > 0


def test_registered_memory_is_not_moved_together_with_other_memory() -> None:
    machine = _after(MAP, replace(REGISTER, part=Part.LAST))
    assert not _makes_sense(machine, MOVE_A)
    assert _makes_sense(machine, replace(MOVE_A, part=Part.LAST))


def test_registered_memory_keeps_its_page_offset_whatever_the_flag() -> None:
    relocate = replace(MOVE_A, kind=Kind.MOVE_RELOCATE)
    for extra, home in (((), _at(5)), ((REGISTER,), _at(2))):
        pages = _after(MAP, WRITE_A, *extra, relocate).processes[0]
        assert pages is not None
        assert pages.home[_at(5)] == home


def test_what_may_not_be_written_is_not_written() -> None:
    machine = _after(MAP, Operation(Kind.PROTECT_READ))
    pages = machine.processes[0]
    assert pages is not None
    assert pages.attr[_at(2)] & (MAPPED | READ | WRITE) == MAPPED | READ
    (wire,) = language.to_wire((WRITE_A,))
    assert operands.resolve(machine, tuple(wire)) is None


# --- generation --------------------------------------------------------------------------------------------------


def test_a_seed_makes_the_same_programs_again() -> None:
    first, second = (Generator(3, list(Kind)) for _ in range(2))
    assert [first.next().program for _ in range(50)] == [second.next().program for _ in range(50)]
    assert Generator(4, list(Kind)).next().program != Generator(3, list(Kind)).next().program


def test_programs_have_only_operations_that_the_kernel_has() -> None:
    kinds = set(Kind) - {Kind.MOVE_RELOCATE, Kind.SCAN, Kind.GUARD}
    generator = Generator(1, kinds)
    assert {each.kind for _ in range(300) for each in generator.next().program} <= kinds


def test_a_kernel_that_cannot_undo_gets_the_programs_that_it_got_before_there_was_an_undo() -> None:
    """So that the seeds of earlier reports still make the same programs there."""
    kinds = [kind for kind in Kind if kind not in (Kind.MOVE_UNDONE, Kind.MOVE_FALLBACK)]
    assert "undo" not in [theme.name for theme, _ in Generator(1, kinds)._themes]
    assert "undo" in [theme.name for theme, _ in Generator(1, list(Kind))._themes]


def test_operations_find_memory_to_work_on() -> None:
    generator = Generator(1, list(Kind))
    made = [generator.next().program for _ in range(100)]
    assert sum(map(len, made)) > 95 * LENGTH
    for program in made:
        machine = Machine()
        for wire in language.to_wire(program):
            step = operands.resolve(machine, tuple(wire))
            assert step is not None
            effects.apply(machine, step, effects.new_tags(machine, step) if step.kind in (3, 4) else b"")


def test_steering_meets_more_situations_than_chance() -> None:
    def situations(steered: bool) -> int:
        generator = Generator(1, list(Kind))
        met = set()
        for _ in range(400):
            met |= set(generator.next().situations)
            if not steered:
                generator.seen.clear()
        return len(met)

    assert situations(steered=True) > 1.05 * situations(steered=False)


def test_memory_of_a_file_keeps_its_home() -> None:
    pages = _after(replace(MAP, kind=Kind.MAP_FILE), MOVE_A).processes[0]
    assert pages is not None
    assert list(pages.home[_at(5) : _at(5) + 4]) == list(range(_at(2), _at(2) + 4))


@pytest.mark.parametrize(("kind", "back"), [(Kind.BIND, Kind.UNBIND), (Kind.NAME, Kind.UNNAME)])
def test_a_policy_or_a_name_makes_two_mappings_of_one(kind: Kind, back: Kind) -> None:
    """They move along, and new pages of a mapping that grows have them."""
    for extra, uniform in ((), False), ((Operation(back, part=Part.FIRST),), True):
        pages = _after(MAP, Operation(kind, part=Part.FIRST), *extra, MOVE_A).processes[0]
        assert pages is not None
        assert pages.uniform(_at(5), _at(5) + 4) == uniform
    pages = _after(MAP, Operation(kind), Operation(Kind.GROW, arg=2)).processes[0]
    assert pages is not None
    assert pages.uniform(_at(2), _at(2) + 6)


# --- plans -------------------------------------------------------------------------------------------------------


def test_a_plan_has_the_steps_and_the_bytes() -> None:
    made = plan((MAP, WRITE_A, MOVE_A))
    assert made is not None
    assert [step[0] for step in made.steps] == [0, 3, 9]
    assert made.bytes == [(_at(5), _at(5) + 4, "02030405")]
    assert (made.first, made.end) == (_at(5), _at(5) + 4)


@pytest.mark.parametrize("kind", [Kind.FORK, Kind.FREE, Kind.UFFD_REGISTER])
def test_a_program_whose_end_is_open_has_no_plan(kind: Kind) -> None:
    assert plan((MAP, WRITE_A, Operation(kind))) is None


# --- shrinking ---------------------------------------------------------------------------------------------------


def test_a_program_shrinks_to_what_fails() -> None:
    tried = 0

    def first_failing(candidates: Sequence[Program]) -> int | None:
        nonlocal tried
        for number, each in enumerate(candidates):
            tried += 1
            kinds = [one.kind for one in each]
            if Kind.MAP in kinds and Kind.MOVE_DONTUNMAP in kinds[kinds.index(Kind.MAP) :]:
                return number
        return None

    generator = Generator(5, list(Kind))
    program = next(made for made in (generator.next().program for _ in range(500)) if first_failing([made]) is not None)
    tried = 0
    small = shrink(program, first_failing)
    assert [each.kind for each in small] == [Kind.MAP, Kind.MOVE_DONTUNMAP]
    assert small[0] == Operation(Kind.MAP, near=small[0].near, arg=1)
    assert tried < 400


def test_slots_are_named_in_order() -> None:
    program = (replace(MAP, into=6), replace(WRITE_A, slot=6), replace(MOVE_A, slot=6, into=3))

    def first_failing(candidates: Sequence[Program]) -> int | None:
        wanted = [each.kind for each in program]
        return next((number for number, each in enumerate(candidates) if [one.kind for one in each] == wanted), None)

    small = shrink(program, first_failing)
    assert [(each.slot, each.into) for each in small] == [(0, 0), (0, 0), (0, 1)]


def test_a_place_that_is_the_home_is_called_so() -> None:
    program = (MAP, WRITE_A, MOVE_A, replace(MAP, near=1, into=1), replace(MOVE_A, to=To.PLACE, near=2))

    def first_failing(candidates: Sequence[Program]) -> int | None:
        # What is back where it was mapped fails.
        for number, each in enumerate(candidates):
            pages = _after(*each).processes[0]
            moves = sum(one.kind is Kind.MOVE for one in each)
            if moves == 2 and pages is not None and pages.slots[0] is not None and pages.slots[0][0] == _at(2):
                return number
        return None

    small = shrink(program, first_failing)
    assert small[-1].to is To.HOME


def test_a_program_that_is_not_a_failure_any_more_is_left_alone() -> None:
    assert shrink((MAP, WRITE_A), lambda _: None) == (MAP, WRITE_A)
