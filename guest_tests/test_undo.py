# SPDX-License-Identifier: GPL-2.0
"""Relocations that fail, early or half way, and what is left then: rows 92 to 97, 99 and 100.

A relocation that meets an obstacle must restore every page that it has rewritten. The kernel would not find a page that
it forgets, although the data is right. There are two kinds of obstacles. A kernel can see a pinned page before it
begins. An injected failure (``fail_mremap_relocate`` in debugfs) or a failed allocation comes when part of the range
has been moved.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import maps, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import (
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MREMAP_MUST_RELOCATE_ANON,
    MREMAP_RELOCATE_ANON,
)
from guest_tests.mm.vmstat import assert_freed, slab_objects
from guest_tests.support.checks import State, counted, expect_layout, fails, same_accounts
from guest_tests.support.failing import KINDS, RELOCATION, failing, failing_relocation, fails_at
from guest_tests.support.folios import huge_kb, huge_page, knob, pmd_size, stamp, thp
from guest_tests.support.found import assert_found
from guest_tests.support.holds import pinned
from guest_tests.support.moves import lenient_ways, move_or_refused, pin_in_the_way, refused_move, ways

pytestmark = pytest.mark.shared_guest

# --- a long range with an obstacle -------------------------------------------------------------------------------

#: small pages on either side of the huge page
_SIDE: Final = 64


@dataclass(frozen=True)
class Scene:
    """A range of three parts, and a place for it that has no page tables yet.

    ::

        |64 small pages|huge page|64 small pages|
    """

    area: CarveOut
    source: Mapping
    to: int

    @property
    def parts(self) -> tuple[Mapping, Mapping, Mapping]:
        """The small pages, the huge page, and the small pages behind it."""
        middle = self.source.pages - 2 * _SIDE
        source = self.source
        return source.part(0, _SIDE), source.part(_SIDE, middle), source.part(_SIDE + middle, _SIDE)


@pytest.fixture
def scene() -> Iterator[Scene]:
    """See :class:`Scene`."""
    pages = pmd_size() // PAGE_SIZE
    with carve_out(6 * pages) as area:
        area.hole(3 * pages, 3 * pages)
        source = area.map(pages - _SIDE, pages + 2 * _SIDE)
        with thp("madvise"):
            source.part(0, _SIDE).fill()
            source.part(_SIDE + pages, _SIDE).fill()
        with thp():
            huge_page(source, area.page(pages))
        yield Scene(area, stamp(source), area.page(4 * pages - _SIDE))


@lenient_ways
def test_falling_back(relocate: bool, scene: Scene, flags: int) -> None:
    """Row 92 (undo-mid): a range of small pages and a huge page moves while the huge page is pinned; plainly and with
    flag 8.

    Unpatched: a plain move; every page is found.
    Patched: flag 8 moves it plainly; every page is found: those before the pin, the pinned one, and those behind it.
    """
    with pin_in_the_way(relocate, scene.parts[1].page(9), flags):
        result = move_or_refused(relocate, scene.area, scene.source, scene.to, flags)
    assert_found(scene.source if result is None else result)


def test_refusing(relocate: bool, scene: Scene) -> None:
    """Row 93 (undo-must): the range of row 92 is to move with flag 16 while its huge page is pinned.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, nothing changes, and every page is found.
    """
    with pin_in_the_way(relocate, scene.parts[1].page(9), MREMAP_MUST_RELOCATE_ANON):
        refused_move(relocate, scene.area, scene.source, scene.to)
    assert_found(scene.source)


#: which folio fails: the first, the last before the huge one, the huge one, the first behind it, the last
_NUMBERS: Final = (1, _SIDE, _SIDE + 1, _SIDE + 2, 2 * _SIDE + 1)


@pytest.mark.parametrize("number", _NUMBERS)
def test_falling_back_half_way(relocate: bool, scene: Scene, number: int) -> None:
    """Row 92 (undo-mid): the range of row 92 moves with flag 8, and the relocation of a chosen folio is made to fail.

    Unpatched: EINVAL, and nothing changes.
    Patched: the folios before it are restored, the range moves plainly, and every page is found.
    """
    if not relocate:
        refused_move(relocate, scene.area, scene.source, scene.to, MREMAP_RELOCATE_ANON)
        assert_found(scene.source)
        return
    with failing_relocation() as arm, counted(relocate, relocated=0, undone=int(number > 1), refused_injected=1):
        arm(number)
        result = move(scene.source, scene.to, MREMAP_RELOCATE_ANON).check()
    assert_found(result)


@pytest.mark.parametrize("number", [1, 9])
def test_falling_back_where_page_tables_could_move(relocate: bool, number: int) -> None:
    """Row 92 (undo-mid): whole page tables of small pages move with flag 8, and the relocation of a chosen page is made
    to fail.

    A plain move hands over whole page tables. The undone relocation has left page tables of its own at the new place,
    and the kernel warns when it moves one over them (move_normal_pmd()).

    ::

        page tables   0       1       2       3       4       5
                      |x x x x|x x x x|               |       |

    Unpatched: EINVAL, and nothing changes.
    Patched: the range moves plainly, every page is found, and there is no warning.
    """
    pages = pmd_size() // PAGE_SIZE
    with thp("madvise"), carve_out(6 * pages) as area:
        area.hole(2 * pages, 4 * pages)
        source = area.map(0, 2 * pages)
        source.contents = [None] * source.pages
        for index in range(0, source.pages, source.pages // 32):
            source.write(index, (index + 1).to_bytes(8, "little"))
        if not relocate:
            refused_move(relocate, area, source, area.page(4 * pages), MREMAP_RELOCATE_ANON)
            assert_found(source)
            return
        with failing_relocation() as arm, counted(relocate, relocated=0, undone=int(number > 1), refused_injected=1):
            arm(number)
            result = move(source, area.page(4 * pages), MREMAP_RELOCATE_ANON).check()
        assert_found(result)


def test_undoing_allocates_no_page_table(relocate: bool) -> None:
    """Row 96 (fault-inject-pgtable): three pages move with flag 16 to a place half a page table off, and the last one
    is made to fail.

    If the undo had to allocate memory, the allocation could fail, and pages would be lost. The undo must not look for a
    page table where there was none. One page table at the destination stands for parts of two at the source, one of
    which does not exist.

    ::

        page tables      0       1       2               4       5       6       7
        there before     |p   p   |       |pp      |
        on the way                                            |p   |p       |pp  |     the last page fails

    Unpatched: EINVAL.
    Patched: EFAULT; the size of the page tables is as before, and every page is found.
    """
    table = pmd_size() // PAGE_SIZE
    grown = []
    with thp("madvise"), carve_out(8 * table) as area:
        area.hole(4 * table, 4 * table)
        for _ in range(3):  # the interpreter may need a page table of its own meanwhile, but not each time
            source = area.map(0, 3 * table)
            source.contents = [None] * source.pages
            for index in (0, table // 2, 2 * table, 2 * table + 1):
                source.write(index, (index + 1).to_bytes(8, "little"))
            must = partial(move, source, area.page(4 * table + table // 2), MREMAP_MUST_RELOCATE_ANON)
            if not relocate:
                fails(errno.EINVAL, must, "a move that this kernel cannot make")
                return
            with failing_relocation() as arm, counted(relocate, undone=1, refused_injected=1):
                arm(4)
                before = vmstat.status()["VmPTE"]
                fails(errno.EFAULT, must, "a move whose last page fails")
                grown.append(vmstat.status()["VmPTE"] - before)
            assert_found(source)
    assert min(grown) == 0, f"undoing a move of three pages left page tables behind, in kB: {grown}"


@pytest.mark.parametrize("number", _NUMBERS)
def test_refusing_half_way(relocate: bool, scene: Scene, number: int) -> None:
    """Row 93 (undo-must): the range of row 92 is to move with flag 16, and the relocation of a chosen folio is made to
    fail.

    The destination of the huge page is aligned, so that it moves as one, and has to come back as one.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, nothing changes, and every page is found; a PMD still maps the huge page; the same move succeeds
    afterwards.
    """
    if not relocate:
        refused_move(relocate, scene.area, scene.source, scene.to)
        assert_found(scene.source)
        return
    with failing_relocation() as arm, counted(relocate, relocated=0, undone=int(number > 1), refused_injected=1):
        refused_move(relocate, scene.area, scene.source, scene.to, arm=lambda: arm(number))
    whole = scene.parts[1]
    assert huge_kb(whole) == whole.length >> 10, f"of a huge page that came back, {huge_kb(whole)} kB are mapped as one"
    assert_found(scene.source)
    assert_found(move(scene.source, scene.to, MREMAP_MUST_RELOCATE_ANON))  # nothing stands in its way now


@pytest.mark.parametrize("flags", [MREMAP_RELOCATE_ANON, MREMAP_MUST_RELOCATE_ANON], ids=["relocate", "must"])
@pytest.mark.parametrize("index", [0, 11], ids=["first", "last"])
@pytest.mark.parametrize("how", ["pinned", "injected"])
def test_at_either_end(relocate: bool, area: CarveOut, flags: int, index: int, how: str) -> None:
    """Row 94 (undo-at-either-end): the first or the last page of a range is pinned, or its relocation is made to fail;
    flags 8 and 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: flag 8 moves the range plainly, flag 16 is refused with EFAULT; every page is found.
    """
    source, to = area.map(0, 12).fill(), area.page(20)
    area.hole(20, 12)
    result: Mapping | None = None
    with ExitStack() as stack:
        arm: Callable[[int], None] = (
            stack.enter_context(failing_relocation()) if how == "injected" and relocate else _nothing
        )
        if how == "pinned":
            stack.enter_context(pinned(source.page(index)))
        if flags == MREMAP_MUST_RELOCATE_ANON or not relocate:
            refused_move(relocate, area, source, to, flags, arm=lambda: arm(index + 1))
        else:
            arm(index + 1)
            with counted(relocate, relocated=0):
                result = move(source, to, flags).check()
    assert_found(source if result is None else result)


def _nothing(number: int) -> None:
    pass


def test_room_is_made_before_a_late_failure(relocate: bool, area: CarveOut) -> None:
    """Row 64 (fixed-must-fail): a move with flag 16 onto a place that is in use is made to fail in its middle.

    Unpatched: EINVAL; source and destination are as before.
    Patched: EFAULT; the destination is unmapped by then, which cannot be undone; the source is whole.
    """
    source = area.map(0, 8).fill()
    area.map(20, 8).fill(seed=1)
    if not relocate:
        refused_move(relocate, area, source, area.page(20))
        assert_found(source)
        return
    before = pagemap.pfns(source.address, 8)
    with failing_relocation() as arm:
        arm(5)
        fails(errno.EFAULT, lambda: move(source, area.page(20), MREMAP_MUST_RELOCATE_ANON), "an injected failure")
    expect_layout(area, [(0, 8)], "the destination was unmapped to make room, the source stayed")
    assert pagemap.pfns(source.address, 8) == before, "a refused move changed frames"
    assert_found(source)


# --- memory runs out ---------------------------------------------------------------------------------------------


#: more allocations than a move makes
_MOST_CHANCES: Final = 200


def _out_of_memory(area: CarveOut, source: Mapping, to: int, flags: int) -> int:
    """Move ``source`` again and again, failing at each allocation in turn until there are none left to fail.

    A failed move must leave everything as it was. A move that succeeds without the memory is moved back.

    :returns: how many moves failed.
    """
    flags |= MREMAP_MAYMOVE | MREMAP_FIXED
    failed = 0
    for number in range(1, _MOST_CHANCES):
        before = State.of(area)
        injected, code = fails_at(
            number, lambda: syscalls.call("mremap", source.address, source.length, source.length, flags, to)
        )
        if code:
            assert injected, f"nothing was made to fail, but the move failed: {errno.errorcode.get(code, code)}"
            # EFAULT if the failure was injected into relocation itself, which fail-nth counts too.
            assert code in (errno.ENOMEM, errno.EFAULT), f"out of memory is {errno.errorcode.get(code, code)}"
            before.expect(area, f"a move that failed at its allocation {number}")
            failed += 1
            continue
        there = Mapping(to, source.pages, source.contents).check()
        if not injected:
            assert_found(there)
            return failed
        move(there, source.address, flags).check()
    raise AssertionError(f"the move has more than {_MOST_CHANCES} chances to fail")


@ways
@pytest.mark.parametrize("kind", KINDS)
def test_out_of_memory(relocate: bool, flags: int, kind: str) -> None:
    """Rows 95 (fault-inject-anon-vma) and 96 (fault-inject-pgtable): each memory allocation of a move fails in turn.

    The destination has no page tables, and the range needs three.

    ::

        page table    0               1               2               3
                              |ssss...|               |           here|... |

    Unpatched: a plain move fails with ENOMEM and changes nothing, or succeeds.
    Patched: a move with either flag fails with ENOMEM or EFAULT and changes nothing, or succeeds; every page is found
    in the end.
    """
    table = PAGE_SIZE // 8
    if table * PAGE_SIZE > 32 << 20:
        pytest.skip(f"needs page tables that map 32 MB at most, these map {table * PAGE_SIZE >> 20} MB")
    with thp("madvise"), carve_out(6 * table) as area:
        area.hole(2 * table, 4 * table)
        source = area.map(table - 8, 16).fill()
        to = area.page(4 * table - 8)
        if flags and not relocate:
            refused_move(relocate, area, source, to, flags)
            assert_found(source)
            return
        with failing(kind):
            failed = _out_of_memory(area, source, to, flags)
        assert failed, "no allocation failed: is fault injection in order?"


# --- again and again ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["pinned", "injected"])
def test_failing_again_and_again(relocate: bool, area: CarveOut, how: str) -> None:
    """Row 97 (fail-accounting): a thousand moves with flag 16 are refused, because a page is pinned or because
    relocation is made to fail.

    The slab allocator frees in batches, so that less than one anon_vma more for every ten moves is allowed.

    Unpatched: EINVAL; the accounting and the number of anon_vmas are as before.
    Patched: EFAULT; the accounting and the number of anon_vmas are as before, and every page is found.
    """
    moves = 1000
    source, to = area.map(0, 12).fill(), area.page(20)
    area.hole(20, 12)
    flags = MREMAP_MUST_RELOCATE_ANON | MREMAP_MAYMOVE | MREMAP_FIXED
    with ExitStack() as stack:
        if how == "pinned":
            stack.enter_context(pinned(source.page(6)))
        elif relocate:
            arm = stack.enter_context(failing_relocation())
            arm(7)
            # From the first failure on every relocation fails at its first folio.
            (RELOCATION / "times").write_text("-1")
        refused_move(relocate, area, source, to)
        state, anon_vmas = State.of(area), slab_objects("anon_vma")
        code = errno.EFAULT if relocate else errno.EINVAL

        def thousand() -> None:
            for _ in range(moves):
                try:
                    syscalls.call("mremap", source.address, source.length, source.length, flags, to)
                except OSError as error:
                    if error.errno == code:
                        continue
                    raise
                raise AssertionError("a relocation that has to fail succeeded")

        same_accounts(thousand, f"{moves} refused moves")
        state.expect(area, f"{moves} refused moves")
    assert_freed("anon_vma", anon_vmas, moves // 10, f"{moves} refused moves", seconds=2)
    assert_found(source)


@ways
def test_too_many_mappings(relocate: bool, area: CarveOut, flags: int) -> None:
    """Row 99 (map-count): the middle of a mapping is to move while the process has as many mappings as it may have.

    Unpatched: a plain move fails with ENOMEM and changes nothing.
    Patched: the same with either flag.
    """
    source = area.map(0, 8).fill()
    part = source.part(2, 4)
    before = State.of(area)
    code = errno.EINVAL if flags and not relocate else errno.ENOMEM
    # The limit holds for the whole system, so it is restored at once. [vsyscall] does not count as a mapping.
    count = sum(vma.path != "[vsyscall]" for vma in maps.vmas())
    with knob("/proc/sys/vm/max_map_count", str(count)):
        fails(code, lambda: move(part, area.page(20), flags), f"a move with {count} of {count} mappings in use")
    before.expect(area, "a move that would need too many mappings")
    assert_found(source)


# --- lock order --------------------------------------------------------------------------------------------------


def test_lock_order(relocate: bool, scene: Scene) -> None:
    """Row 100 (lockdep): on a kernel with PROVE_LOCKING, moves of all kinds of folios, of shared memory, of half a huge
    page, and an undo.

    The lock checker turns itself off with its first complaint, which also appears on the console.

    Unpatched: the lock checker is on before and after plain moves.
    Patched: it is on before and after moves with flag 8.
    """
    system.require_config("PROVE_LOCKING")
    system.require_file("/proc/lockdep_stats", "PROVE_LOCKING")
    assert _lock_checking(), "the lock checker was off before the test began: something complained earlier"
    first, middle, last = scene.parts
    flags = MREMAP_RELOCATE_ANON if relocate else 0
    there = move(move(scene.source, scene.to, flags), scene.source.address, flags)  # all kinds of folios
    with Child():
        there = move(move(there, scene.to, flags), scene.source.address, flags)  # shared
    half = middle.part(0, middle.pages // 2)
    move(move(half, scene.to, flags), half.address, flags)  # a split
    if relocate and RELOCATION.exists():
        with failing_relocation() as arm:
            arm(_SIDE // 2)
            first = move(move(first, scene.to, flags), first.address, flags)  # an undo
    assert_found(first, middle, last)
    assert _lock_checking(), "the lock checker has turned itself off: see its complaint on the console"


def _lock_checking() -> bool:
    lines = Path("/proc/lockdep_stats").read_text().splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return values["debug_locks"] == "1"
