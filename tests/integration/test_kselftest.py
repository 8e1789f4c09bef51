# SPDX-License-Identifier: GPL-2.0
"""Upstream's tests in a guest: a kernel source tree that is broken in each way must be told for what it is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.build.source import TreeSource
from harness.host.cache import Cache
from tests.lab import KERNEL, Case, Outcome, run_own_tests

#: what a program of each name does
PROGRAMS = {
    "merge": 'puts("TAP version 13\\n1..2\\nok 1 good\\n# merge.c:1: \\033[31mno\\nnot ok 2 bad"); return 1;',
    "mremap_dontunmap": 'puts("TAP version 13\\n1..2\\nok 1 good"); fflush(stdout); for (;;) pause();',
    "process_madv": 'puts("ok ok ok\\n1..x"); return 0;',
    "cow": 'puts("TAP version 13\\n1..1\\nok 1 # SKIP no such device"); return 4;',
    "mkdirty": 'puts("TAP version 13\\n1..1\\nok 1 good"); return 0;',
    "guard-regions": 'puts("TAP version 13\\n1..2\\nok 1 good"); fflush(stdout); sleep(2);\n'
    'int fd = open("/proc/sysrq-trigger", O_WRONLY); write(fd, "c", 1); return 0;',
    "mremap_test": "return 1;",
    "pagemap_ioctl": 'printf("TAP version 13\\n1..1\\n%s 1 heap\\n", (unsigned long)sbrk(0) >> 30 ? "ok" : "not ok"); '
    "return 0;",
    "madv_populate": "this is no C;",
}

SOURCE = """
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(void)
{{
    {body}
}}
"""

#: like the kernel's own, as far as it is used
TOP = "headers:\n\tmkdir -p $(O)/usr/include\n"
TESTS = """
TEST_GEN_FILES = {names}
CFLAGS = $(USERCFLAGS) $(KHDR_INCLUDES)
$(OUTPUT)/%: %.c
	$(CROSS_COMPILE)gcc $(CFLAGS) $(USERLDFLAGS) $< -o $@
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A source tree with programs of our own."""
    root = tmp_path_factory.mktemp("linux")
    directory = root / "tools/testing/selftests/mm"
    directory.mkdir(parents=True)
    (root / "Makefile").write_text(TOP)
    (directory / "Makefile").write_text(TESTS.format(names=" ".join(PROGRAMS)))
    for name, body in PROGRAMS.items():
        (directory / f"{name}.c").write_text(SOURCE.format(body=body))
    yield root
    shutil.rmtree(TreeSource(root).store(Cache()).root, ignore_errors=True)


@pytest.fixture(scope="module")
def outcome(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    names = [f"--kselftest={name}" for name in (*PROGRAMS, "rmap")]
    report = tmp_path_factory.mktemp("report") / "junit.xml"
    return run_own_tests(report, f"--kernel={KERNEL}", f"--kselftest-tree={tree}", *names)


@pytest.fixture
def cases(outcome: Outcome) -> dict[str, Case]:
    """The result of each program."""
    return {case.parameters.rpartition("x86_64-")[2]: case for case in outcome.cases}


def test_the_heap_is_not_where_tests_expect_nothing(cases: dict[str, Case]) -> None:
    # mremap_test maps a few dozen MiB above the lowest address. In a program that was linked to 4 MiB, the heap was
    # there in 5 of 100 runs.
    assert cases["pagemap_ioctl"].verdict == "PASS"


def test_a_sound_program_passes(cases: dict[str, Case]) -> None:
    assert cases["mkdirty"].verdict == "PASS"
    assert cases["mkdirty"].properties["kselftest"].startswith("1 passed; ")


def test_a_failed_subtest_fails_its_program_and_is_told_by_itself(cases: dict[str, Case], outcome: Outcome) -> None:
    assert cases["merge"].verdict == "FAIL"
    assert "1 subtest failed: bad" in outcome.output
    # JUnit has one failure of a test, and that is its first.
    assert cases["merge"].message == "Failed: not ok 2 bad\nmerge.c:1: \\x1b[31mno"


def test_a_program_that_hangs_is_ended_and_fails(cases: dict[str, Case]) -> None:
    hung = cases["mremap_dontunmap"]
    assert hung.verdict == "FAIL"
    assert "mremap_dontunmap did not end in" in hung.message
    assert hung.message.endswith("after 1 subtests")


def test_a_program_that_panics_the_kernel_fails_with_the_console(cases: dict[str, Case]) -> None:
    assert cases["guard-regions"].verdict == "FAIL"
    assert "guest lost (panic)" in cases["guard-regions"].message
    assert "sysrq triggered crash" in cases["guard-regions"].text


def test_rubbish_is_an_error_with_one_clear_line(cases: dict[str, Case]) -> None:
    assert cases["process_madv"].verdict == "ERROR"
    assert "subtest 1 was due, and it printed 'ok ok ok'" in cases["process_madv"].text


def test_a_program_that_does_not_compile_is_an_error_that_says_why(cases: dict[str, Case]) -> None:
    assert cases["madv_populate"].verdict == "ERROR"
    assert "madv_populate.c:8:5: error:" in cases["madv_populate"].text


def test_exit_status_4_is_a_skip(cases: dict[str, Case]) -> None:
    assert (cases["cow"].verdict, cases["cow"].message) == ("SKIP", "no such device")


def test_a_program_that_the_source_has_not_is_skipped(cases: dict[str, Case]) -> None:
    assert cases["rmap"].verdict == "SKIP"
    assert "builds no rmap for x86_64" in cases["rmap"].message


def test_a_guest_that_is_too_small_says_what_makes_it_larger(cases: dict[str, Case]) -> None:
    assert cases["mremap_test"].verdict == "SKIP"
    assert "give --guest-memory=6144" in cases["mremap_test"].message


def test_the_rerun_command_names_one_test(cases: dict[str, Case]) -> None:
    assert "--kselftest=merge " in cases["merge"].text
    assert "--kselftest=cow" not in cases["merge"].text


def test_a_directory_without_tests_is_a_usage_error(tmp_path: Path) -> None:
    outcome = run_own_tests(
        tmp_path / "junit.xml", f"--kernel={KERNEL}", "--kselftest=mm", f"--kselftest-tree={tmp_path}"
    )
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
