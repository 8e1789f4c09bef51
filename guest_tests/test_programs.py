# SPDX-License-Identifier: GPL-2.0
"""The programs in ``programs/``: the smallest one for each bug that the explorer shows.

``harness explore --replay guest_tests/programs/FILE`` runs one of them by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.mm import memcg, swap, system
from guest_tests.mm.pagemap import PRESENT
from guest_tests.support.folios import advised_folios
from harness.programs import language
from harness.programs.language import Kind, Operation

_DIRECTORY: Final = Path(__file__).parent / "programs"
#: operations that do nothing where there is no swap
_SWAPPING: Final = frozenset({Kind.PAGEOUT, Kind.RECLAIM})
#: how much swap a program takes at most, in kB
_SWAP: Final = 4096
#: what these programs fail with
_LOST: Final = "does not move to another node"
_UNLOCKED: Final = "smaps does not show lo"
_LEFT: Final = "smaps does not show uw"
_UNPROTECTED: Final = "is not write-protected by the userfaultfd, and should be"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("dontunmap-part-unlocks", marks=pytest.mark.finding("dontunmap-part-unlocks", match=_UNLOCKED)),
        pytest.param("ksm-shared-by-fork", marks=pytest.mark.finding("ksm-shared-by-fork", match=_LOST)),
        pytest.param("ksm-swapcache-move", marks=pytest.mark.finding("ksm-swapcache-move", match=_LOST)),
        pytest.param("ksm-swapcache-unmergeable", marks=pytest.mark.finding("ksm-swapcache-unmergeable", match=_LOST)),
        pytest.param("ksm-uffd-unprotected", marks=pytest.mark.finding("ksm-uffd-unprotected", match=_UNPROTECTED)),
        pytest.param("merged-with-untouched", marks=pytest.mark.finding("merged-with-untouched", match=_LOST)),
        pytest.param("uffd-merged-neighbour", marks=pytest.mark.finding("uffd-merged-neighbour", match=_LEFT)),
    ],
)
@pytest.mark.usefixtures("own_group", "ksm")
def test_a_program_that_showed_a_bug(name: str) -> None:
    """No row: a program that the explorer found, or that was written in its language, for each bug that it can show.

    Every kernel: the bytes, the walks, the layout and the accounts are right. Programs fail on the kernels that have
    their finding.
    """
    system.require_nodes(2)
    memcg.require_memcg()
    if name == "merged-with-untouched" and system.release()[:2] == (6, 16):
        pytest.skip("needs a kernel on which what MREMAP_DONTUNMAP leaves can merge: 6.16 has dontunmap-committed")
    program = language.from_json((_DIRECTORY / f"{name}.json").read_text())
    if lacking := sorted({each.kind for each in program}.difference(kinds())):
        pytest.skip(f"needs a kernel that has {', '.join(lacking)}")
    if any(each.kind in _SWAPPING for each in program):
        swap.require_swap(_SWAP)
    with advised_folios():
        outcome = Executor().run([tuple(each) for each in language.to_wire(program)], thorough=True, layout=True)
    assert outcome.failure is None, f"{outcome.failure.text} ({outcome.errors})"


def test_the_processes_of_a_program_have_their_memory_while_it_is_audited() -> None:
    """No row: a program maps memory, writes to it and forks, and an audit comes after its checks.

    Every kernel: the audit is given both processes, which still have the memory. Afterwards it is gone.
    """
    operations = (Operation(Kind.MAP, near=2, arg=2), Operation(Kind.WRITE), Operation(Kind.FORK, arg=1))
    executor, seen = Executor(), list[tuple[int, int]]()

    def audit(pids: list[int]) -> None:
        seen.extend((pid, sum(bool(entry & PRESENT) for entry in executor.arena.entries(pid)[:-1])) for pid in pids)

    outcome = executor.run([tuple(each) for each in language.to_wire(operations)], audit=audit)
    assert outcome.failure is None
    assert [pages for _, pages in seen] == [2, 2], f"processes and their present pages: {seen}"
    assert seen[0][0] == os.getpid()
    assert not any(entry & PRESENT for entry in executor.arena.entries()[:-1])
