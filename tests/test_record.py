# SPDX-License-Identifier: GPL-2.0
"""The record of results: one line for each test, readable after a crash, and refused if it is something else."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from harness.errors import UsageError
from harness.judging import findings
from harness.judging.findings import Expect
from harness.judging.verdict import Judgement, Verdict
from harness.report import record, results
from harness.report.record import Item, KernelFacts
from harness.report.results import Facts

KERNEL = KernelFacts(label="debian:6.12-x86_64", spec="debian:6.12", release="6.12.1", arch="x86_64")
HEADER = record.header(["pytest", "--kernel=debian:6.12"], 1000.0, [KERNEL])
PASSED = Item(label=KERNEL.label, test="guest_tests/test_a.py::test_a", outcome="passed", verdict="PASS", failed=False)


#: a finding that Linux 6.12 has
FINDING = "kpageflags-ksm"


def reports(
    verdict: Verdict,
    text: str = "",
    recorded: Sequence[tuple[str, Any]] = (),
    sections: Sequence[tuple[str, str]] = (),
    finding: str = "",
) -> list[pytest.TestReport]:
    """The reports of a test whose call fails with ``text``, or passes if it is empty."""
    made = [
        pytest.TestReport(
            f"guest_tests/test_a.py::test_a[{KERNEL.label}]",
            ("guest_tests/test_a.py", 1, "test_a"),
            {},
            "failed" if when == "call" and text else "passed",
            text if when == "call" and text else None,
            when,
            user_properties=list(recorded),
        )
        for when in ("setup", "call", "teardown")
    ]
    made[1].sections.extend(sections)
    facts = Facts(label=KERNEL.label, test="guest_tests/test_a.py::test_a", guest="clone", finding=finding)
    results.encode(Judgement(verdict, made), facts)
    return made


def item(*args: Any, **more: Any) -> Item:
    made = record.item(reports(*args, **more), 1000.0, 1.5)
    assert made is not None
    return made


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "results.jsonl"
        path.write_text("".join(lines))
        return path

    return write


def test_what_is_written_is_read_back(written: Callable[..., Path]) -> None:
    failed = item(Verdict.FAIL, "lost a page", [("walk", {"found": [1, 2]})], [("kernel console", "BUG: bad")])
    path = written(record.header_line(HEADER), record.item_line(PASSED), record.item_line(failed), record.end_line(1))
    read = record.read(path)
    assert read.header == HEADER
    assert read.items == [PASSED, failed]
    assert (read.status, read.cut, list(read.notes)) == (1, False, [])


def test_a_failure_keeps_its_message_evidence_and_conditions() -> None:
    made = item(Verdict.FAIL, "lost a page\nin the second line", sections=[("kernel console", "BUG: bad")])
    assert (made.outcome, made.verdict, made.failed, made.guest) == ("failed", "FAIL", True, "clone")
    assert made.message == "lost a page"
    assert (made.start, made.duration) == (1000.0, 1.5)
    assert made.sections == (("failure in call", "lost a page\nin the second line"), ("kernel console", "BUG: bad"))


def test_the_worker_that_ran_a_test_is_no_reason_for_its_failure() -> None:
    """pytest-xdist gives each report its worker, and pytest puts a line about it in front of a failure's text."""

    class Worker:
        workerinfo: ClassVar = {"id": "gw0", "sysplatform": "linux", "version_info": (3, 11, 4), "executable": "python"}

    made = reports(Verdict.FAIL, "lost a page")
    made[1].node = Worker()  # type: ignore[attr-defined]
    assert made[1].longreprtext.startswith("[gw0] linux")
    line = record.item(made, 0.0, 0.0)
    assert line is not None
    assert line.message == "lost a page"


def test_evidence_is_escaped_and_keeps_its_end_within_the_limit() -> None:
    text = "beginning" + "x\n" * record.SECTION_LIMIT + "the \x1b[31mend"
    made = item(Verdict.FAIL, "failed", sections=[("kernel \x1b console", text)])
    title, shown = made.sections[1]
    assert title == r"kernel \x1b console"
    assert shown.endswith(r"the \x1b[31mend")
    assert shown.startswith("(cut)\n")
    assert "beginning" not in shown
    assert len(shown) < record.SECTION_LIMIT + 100


def test_many_sections_are_limited() -> None:
    made = item(Verdict.FAIL, "failed", sections=[(f"section {number}", "x") for number in range(1000)])
    assert len(made.sections) == record.SECTIONS_LIMIT


def test_properties_that_are_no_json_or_too_large_are_counted_and_left_out() -> None:
    recorded = [("good", {"of": ["a\x1b", 1]}), ("object", object()), ("nan", float("nan")), ("large", "x" * (1 << 20))]
    made = item(Verdict.PASS, recorded=recorded)
    assert made.properties == (("good", {"of": [r"a\x1b", 1]}),)
    assert made.left_out == 3


def expected(made: list[pytest.TestReport]) -> Item:
    """The line of these reports under --expect-findings, on a kernel that is known to have the finding."""

    class Marked:
        def get_closest_marker(self, name: str) -> Any:
            return pytest.mark.finding(FINDING, match="lost a page").mark if name == "finding" else None

    marked: Any = Marked()
    findings.expect(marked, made, "6.12.1", "x86_64", Expect.AS_RECORDED)
    line = record.item(made, 0.0, 0.0)
    assert line is not None
    return line


def test_an_expected_finding_is_named_and_is_no_failure() -> None:
    made = expected(reports(Verdict.FAIL, "lost a page", finding=FINDING))
    assert (made.outcome, made.failed, made.finding) == ("xfailed", False, FINDING)


def test_a_finding_that_no_longer_shows_is_a_failure_although_the_kernel_passed() -> None:
    made = expected(reports(Verdict.PASS, finding=FINDING))
    assert (made.outcome, made.verdict, made.failed, made.finding) == ("passed", "PASS", True, FINDING)
    assert made.message.startswith(f"finding {FINDING} does not show on 6.12.1")


def test_a_test_of_the_host_has_no_line() -> None:
    made = reports(Verdict.PASS)
    for report in made:
        report.user_properties.clear()
    assert record.item(made, 0.0, 0.0) is None


def test_a_line_that_was_cut_by_a_crash_is_left_out_and_said(written: Callable[..., Path]) -> None:
    line = record.item_line(PASSED)
    whole = record.header_line(HEADER) + line
    for length in range(1, len(line)):
        read = record.read(written(whole, line[:length]))
        assert (len(read.items), read.cut, read.status) == (1, True, None), f"cut after {length} characters"
    assert "incomplete" in read.notes[0]
    assert "cut short after 1 tests" in read.notes[1]


def test_a_run_that_did_not_end_says_so(written: Callable[..., Path]) -> None:
    read = record.read(written(record.header_line(HEADER), record.item_line(PASSED)))
    assert (read.status, read.cut) == (None, False)
    assert len(read.notes) == 1


def error_of(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        record.read(path)
    assert "\n" not in str(caught.value), "the error has to be one line"
    return str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "\n", "hello\n", '{"a": 1}\n', "[]\n", '"text"\n', record.header_line(HEADER)[:50]]
)
def test_a_foreign_file_is_refused(written: Callable[..., Path], text: str) -> None:
    assert "is no record of results" in error_of(written(text))


def test_a_file_that_is_no_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "it is no text" in error_of(tmp_path / "binary")
    assert "No such file" in error_of(tmp_path / "missing")


def test_a_future_version_is_refused_with_what_to_do(written: Callable[..., Path]) -> None:
    data = json.loads(record.header_line(HEADER)) | {"version": 99}
    message = error_of(written(json.dumps(data) + "\n"))
    assert "version 99" in message
    assert "use the harness that wrote it" in message


@pytest.mark.parametrize("line", ["{", "[]", "3", "{}", '{"test": 1}', '{"exit_status": "x"}'])
def test_a_damaged_line_in_the_middle_is_named(written: Callable[..., Path], line: str) -> None:
    path = written(record.header_line(HEADER), line + "\n", record.item_line(PASSED))
    assert "is damaged in line 2" in error_of(path)


def test_an_unknown_outcome_is_damage(written: Callable[..., Path]) -> None:
    path = written(record.header_line(HEADER), record.item_line(replace(PASSED, outcome="splendid")))
    assert "is damaged in line 2" in error_of(path)


def test_a_file_that_somebody_made_cannot_bring_control_characters(written: Callable[..., Path]) -> None:
    """What is written here is escaped. A file may come from elsewhere."""
    raw = replace(PASSED, test="a.py::b\x1b[31m", message="\x1b\ud800", sections=(("\x07", "\x1b]0;x\x07"),))
    (read,) = record.read(written(record.header_line(HEADER), record.item_line(raw))).items
    assert (read.test, read.message) == (r"a.py::b\x1b[31m", r"\x1b\ud800")
    assert read.sections == ((r"\x07", r"\x1b]0;x\x07"),)


@pytest.mark.parametrize(
    "wrong", [{"start": -1.0}, {"start": 1e300}, {"duration": "long"}, {"verdict": "FINE"}, {"sections": [1]}]
)
def test_values_that_no_run_writes_are_damage(written: Callable[..., Path], wrong: dict[str, Any]) -> None:
    data = json.loads(record.item_line(PASSED)) | wrong
    assert "is damaged in line 2" in error_of(written(record.header_line(HEADER), json.dumps(data) + "\n"))


def test_deep_nesting_is_damage(written: Callable[..., Path]) -> None:
    deep = record.item_line(PASSED).replace('"properties": []', f'"properties": {"[" * 100_000}{"]" * 100_000}')
    assert "is damaged in line 2" in error_of(written(record.header_line(HEADER), deep))


def test_what_is_no_json_is_damage(written: Callable[..., Path]) -> None:
    line = record.item_line(PASSED).replace('"properties": []', '"properties": [["x", NaN]]')
    assert "NaN is no JSON" in error_of(written(record.header_line(HEADER), line))


def test_how_a_kernel_was_built_is_read_back_and_stays_out_of_older_readers_way(written: Callable[..., Path]) -> None:
    built = replace(KERNEL, compiler="gcc 14", configuration="fast", patchset_hash="ab" * 32)
    head = replace(HEADER, kernels=(built, replace(KERNEL, label="other")))
    line = record.header_line(head)
    assert record.read(written(line)).header == head
    assert set(json.loads(line)["kernels"][0]) == {
        *("label", "spec", "release", "version", "arch", "provenance", "accelerator"),
    }
    assert json.loads(line)["builds"] == {
        KERNEL.label: {"compiler": "gcc 14", "configuration": "fast", "patchset_hash": "ab" * 32}
    }


def test_a_record_of_before_there_were_builds_and_changes_is_read(written: Callable[..., Path]) -> None:
    head = json.loads(record.header_line(HEADER))
    del head["builds"]
    read = record.read(written(json.dumps(head) + "\n", record.item_line(PASSED), '{"exit_status": 0}\n'))
    assert (read.header, read.items, read.status) == (HEADER, [PASSED], 0)
