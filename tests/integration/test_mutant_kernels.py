# SPDX-License-Identifier: GPL-2.0
"""Mutants that damage the reverse map: the tests concerned fail, and the audit reports what is wrong.

``harness mutants`` says which tests notice which mutant. These tests say what the audit makes of six of them, which
takes a kernel with mutants and debug information for each variant. Another one is met by the explorer in a race.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.audit.discrepancies import DiscrepancyKind
from harness.build import builder
from harness.errors import HostError
from harness.programs.language import Kind, Operation, Part, Program, To, to_json
from tests.lab import run_own_tests

pytest.importorskip("drgn", reason="needs drgn: install the extra 'audit'")
pytestmark = pytest.mark.builds_kernel


@dataclass(frozen=True)
class Broken:
    """A mutant, and what finds it out."""

    #: the mutant
    name: str
    #: the variant that has it
    base: str
    #: guest tests that notice, below guest_tests/
    tests: tuple[str, ...]
    #: what the run says of it, and in the audit's words if kernel memory is wrong
    says: str


_PATHS = ("test_folios.py::test_migration", "test_folios.py::test_pageout", "test_folios.py::test_soft_offline")
_UNDO = ("test_undo.py::test_falling_back_half_way", "test_undo.py::test_refusing_half_way")
_MERGE = ("test_merge.py::test_between_faulted", "test_merge_relocated.py::test_relocated_away_and_moved_back")
_QUESTION = ("test_question.py::test_the_walk_finds_pages_merged_again_after_the_move",)

MUTANTS = (
    Broken("stale-index", "relocate-anon", _PATHS, f"error: {DiscrepancyKind.WRONG_INDEX}: pfn"),
    Broken("stale-anon-vma", "relocate-anon", _PATHS, f"error: {DiscrepancyKind.FOREIGN_ANON_VMA}: pfn"),
    Broken("undo-forgets-one", "relocate-anon", _UNDO, f"error: {DiscrepancyKind.FOREIGN_ANON_VMA}: pfn"),
    Broken("no-second-merge", "relocate-anon", _MERGE, "AssertionError"),
    Broken("ksm-index-by-address", "unpatched", _QUESTION, f"error: {DiscrepancyKind.WRONG_INDEX}: KSM page pfn"),
    # Code is wrong here and not data, so that the audit, which goes by the data, contradicts the probes.
    Broken("ksm-walk-by-address", "unpatched", _QUESTION, "the audit says that the walk finds all places, but not so"),
)


@pytest.fixture(scope="module", autouse=True)
def _compilers() -> None:
    try:
        builder.Toolchain.of(X86_64)
        builder.check_host()
    except HostError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("broken", MUTANTS, ids=lambda broken: broken.name)
def test_it_is_found_out(broken: Broken, tmp_path: Path) -> None:
    kernel = [f"--kernel={broken.base}:fast:dwarf:mutants", "--arch=x86_64", f"--mutant={broken.name}"]
    tests = [f"guest_tests/{each}" for each in broken.tests]
    outcome = run_own_tests(tmp_path / "junit.xml", *kernel, "--audit=end", *tests)
    assert {"MISS"}.isdisjoint(case.verdict for case in outcome.cases), outcome.output[-8000:]
    noticed = {case.name for case in outcome.cases if case.verdict == "FAIL"}
    assert noticed == {each.partition("::")[2] for each in broken.tests}, outcome.output[-8000:]
    assert broken.says in outcome.output, outcome.output[-8000:]


#: half of a mapping moves away, and back to where it merges, four times
_THERE_AND_BACK: Program = (
    Operation(Kind.MAP, near=2, arg=8),
    Operation(Kind.WRITE),
    *(
        Operation(Kind.MOVE, part=Part.SECOND_HALF, near=6, into=1),
        Operation(Kind.MOVE, slot=1, to=To.HOME, into=2),
    )
    * 4,
)


def test_a_walk_that_misses_a_page_in_a_race_is_found_out(tmp_path: Path) -> None:
    file = tmp_path / "there-and-back.json"
    file.write_text(to_json(_THERE_AND_BACK, fails="", release="7.3", source="a test"))
    explore = [sys.executable, "-m", "harness.commands.cli", "explore", "--kernel=unpatched:mutants", "--arch=x86_64"]
    mutant = "--mutant=move-to-earlier-place-without-rmap-lock"
    done = subprocess.run(
        [*explore, mutant, "--races", f"--replay={file}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr[-4000:]
    assert "is still an entry of a migration, and none is under way" in done.stdout
    done = subprocess.run([*explore, "--races", f"--replay={file}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
