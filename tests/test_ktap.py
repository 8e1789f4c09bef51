# SPDX-License-Identifier: GPL-2.0
"""KTAP: what each outcome becomes, and that the kernel's own parser understands it, whatever a guest printed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import paths
from harness.report import ktap
from harness.report.runs import Run
from tests.recorded import HEADER, MIXED, NEW, OLD, hostile, line, run

#: Where builds of Debian's source packages leave them. Read now, because tests have a cache of their own.
SOURCES = paths.cache_dir() / "sources"


def result(text: str, test: str) -> str:
    """The line with the result of a test."""
    (found,) = (
        each.strip() for each in text.splitlines() if re.match(rf" *(not )?ok \d+ {re.escape(test)}( |$)", each)
    )
    return re.sub(r"ok \d+", "ok N", found)


# --- what each outcome becomes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "expected"),
    [
        ("test_passes", "ok N test_passes"),
        ("test_lacks", "ok N test_lacks"),
        ("test_fails[1]", "not ok N test_fails[1]"),
        ("test_skips", "ok N test_skips # SKIP needs CONFIG_KSM"),
        ("test_shows", "ok N test_shows # XFAIL finding kpageflags-ksm: the walk does not find it"),
        ("test_fixed", "not ok N test_fixed"),
        ("test_misses", "not ok N test_misses # ERROR infrastructure: no QEMU"),
        ("test_breaks", "not ok N test_breaks # ERROR no such fixture"),
        ("guest_tests/test_a.py", "not ok N guest_tests/test_a.py"),
        (OLD.label, f"not ok N {OLD.label}"),
    ],
)
def test_each_outcome_has_its_result(test: str, expected: str) -> None:
    assert result(ktap.text(run(*MIXED)), test) == expected


def test_kernels_modules_and_tests_are_nested() -> None:
    text = ktap.text(run(line("test_one"), line("guest_tests/test_b.py::test_two")))
    assert text.splitlines() == [
        "KTAP version 1",
        "#  mremap-harness 1.0",
        f"#  {' '.join(HEADER.command)}",
        "1..1",
        "  KTAP version 1",
        f"  # Subtest: {OLD.label}",
        f"  #  kernel: {OLD.release}, x86_64, tcg, {OLD.provenance}",
        "  1..2",
        "    KTAP version 1",
        "    # Subtest: guest_tests/test_a.py",
        "    1..1",
        "    ok 1 test_one",
        "  ok 1 guest_tests/test_a.py",
        "    KTAP version 1",
        "    # Subtest: guest_tests/test_b.py",
        "    1..1",
        "    ok 1 test_two",
        "  ok 2 guest_tests/test_b.py",
        f"ok 1 {OLD.label}",
    ]


def test_a_test_that_did_not_end_in_time_says_so() -> None:
    late = line("test_late", "failed", "guest lost (test timeout): the test did not end in time")
    assert result(ktap.text(run(late)), "test_late").startswith("not ok N test_late # TIMEOUT guest lost")


def test_a_module_whose_tests_all_skipped_has_skipped() -> None:
    skipped = line("guest_tests/test_b.py::test_b", "skipped", "needs swap")
    text = ktap.text(run(line("test_a", "skipped", "needs CONFIG_KSM"), line("test_c"), skipped))
    assert result(text, "guest_tests/test_b.py") == "ok N guest_tests/test_b.py # SKIP no test of it ran"
    assert result(text, "guest_tests/test_a.py") == "ok N guest_tests/test_a.py"


def test_the_evidence_of_a_failure_stands_before_its_result() -> None:
    lines = [each.strip() for each in ktap.text(run(*MIXED)).splitlines()]
    end = next(number for number, each in enumerate(lines) if each.startswith("not ok") and "test_fails" in each)
    start = max(number for number, each in enumerate(lines[:end]) if not each.startswith("#"))
    evidence = "\n".join(lines[start + 1 : end])
    for each in ("lost a page", "kernel console:", "BUG: Bad page state", "run it again:"):
        assert each in evidence


def test_a_run_that_was_cut_short_has_failed() -> None:
    assert result(ktap.text(run(line("test_one"), status=None)), "the record is complete").startswith("not ok N")
    assert "the record is complete" not in ktap.text(run(line("test_one"), status=0))


def test_only_diagnostics_hold_what_a_guest_printed() -> None:
    text = ktap.text(run(*hostile()))
    plain = [each for each in text.splitlines() if not each.lstrip().startswith("#  ")]
    for each in plain:
        assert re.fullmatch(
            r" *(KTAP version 1|# Subtest: .*|1\.\.\d+|(not )?ok \d+ [^#]*( # (SKIP|XFAIL|ERROR|TIMEOUT) .*)?)", each
        )
    assert sum("# Subtest: " in each for each in plain) == 2
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", text)


# --- the kernel's own parser -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parsed:
    """What kunit.py makes of a file."""

    status: int
    #: its output without time stamps
    said: str
    #: result by the path of a test
    results: dict[str, str]

    @property
    def summary(self) -> str:
        """The numbers at the end."""
        return self.said.partition("Testing complete. ")[2].splitlines()[0]


def leaves(group: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    here = path if group["name"] == "KUnit Test Group" else f"{path}{group['name']}/"
    for case in group["test_cases"]:
        yield f"{here}{case['name']}", case["status"]
    for each in group["sub_groups"]:
        yield from leaves(each, here)


@pytest.fixture
def kunit(tmp_path: Path) -> Callable[[Run], Parsed]:
    """Runs the ``kunit.py parse`` of the newest source package that a build has left here."""
    found = sorted(SOURCES.glob("linux-source-*/tree/tools/testing/kunit/kunit.py"))
    if not found:
        pytest.skip(f"no source package has been unpacked in {SOURCES}: pytest --kernel=unpatched brings one")

    def parse(recorded: Run) -> Parsed:
        written, parsed = tmp_path / "results.ktap", tmp_path / "parsed.json"
        written.write_text(ktap.text(recorded))
        command = [sys.executable, "-B", str(found[-1]), "parse", f"--json={parsed}", str(written)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        data = json.loads(parsed.read_text())
        return Parsed(done.returncode, re.sub(r"\x1b\[[0-9;]*m", "", done.stdout), dict(leaves(data)))

    return parse


def test_the_kernels_parser_finds_every_test(kunit: Callable[[Run], Parsed]) -> None:
    parsed = kunit(run(*MIXED))
    path = f"{OLD.label}/guest_tests/test_a.py"
    assert parsed.results == {
        f"{path}/test_passes": "PASS",
        f"{path}/test_lacks": "PASS",
        f"{path}/test_fails[1]": "FAIL",
        f"{path}/test_skips": "SKIP",
        f"{path}/test_shows": "PASS",
        f"{path}/test_fixed": "FAIL",
        f"{OLD.label}/guest_tests/test_b.py/test_misses": "FAIL",
        f"{OLD.label}/guest_tests/test_b.py/test_breaks": "FAIL",
    }
    assert "test_skips (needs CONFIG_KSM)" in parsed.said
    assert "BUG: Bad page state" in parsed.said
    assert parsed.status == 1


def test_the_kernels_parser_is_content_with_a_good_run(kunit: Callable[[Run], Parsed]) -> None:
    parsed = kunit(run(line("test_one"), line("test_two", kernel=NEW), kernels=(OLD, NEW), status=0))
    assert parsed.status == 0
    assert parsed.summary == "Ran 2 tests: passed: 2"


def test_the_kernels_parser_notices_a_run_that_was_cut_short(kunit: Callable[[Run], Parsed]) -> None:
    assert kunit(run(line("test_one"), status=None)).status == 1


def test_the_kernels_parser_is_not_fooled_by_a_hostile_guest(kunit: Callable[[Run], Parsed]) -> None:
    parsed = kunit(run(*hostile(), line("test_last")))
    assert parsed.summary == "Ran 5 tests: passed: 2, failed: 2, skipped: 1"
    assert "ERROR" not in parsed.said.replace("# ERROR", "")


def test_the_kernels_parser_is_content_with_a_kernel_that_ran_no_test(kunit: Callable[[Run], Parsed]) -> None:
    parsed = kunit(run(line("test_one"), kernels=(OLD, NEW), status=0))
    assert (parsed.status, parsed.summary) == (0, "Ran 2 tests: passed: 1, skipped: 1")


@pytest.mark.parametrize("broken", ["_harmless", "_name"])
def test_without_its_care_the_parser_is_fooled(
    kunit: Callable[[Run], Parsed], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(ktap, broken, lambda text: text)
    assert kunit(run(*hostile(), line("test_last"))).summary != "Ran 5 tests: passed: 2, failed: 2, skipped: 1"
