# SPDX-License-Identifier: GPL-2.0
"""The console grammar on logs that kernels printed, and on logs written after the kernel's sources.

A case is ``console_logs/NAME.log``. ``NAME.toml`` lists the reports in it. ``origin`` there says where the log is from.
"""

from __future__ import annotations

import re
import tomllib
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness.host.safe_text import decode, escape
from harness.judging import console, console_log, titles
from harness.judging.console_grammar import RULES
from harness.judging.console_rule import Kind, Rule

LOGS = Path(__file__).parent / "console_logs"


@dataclass(frozen=True)
class Expected:
    kind: str
    title: str
    fatal: bool
    #: first and last line of the block, counted from 0
    lines: tuple[int, int]
    #: those two lines without their prefixes
    first: str
    last: str


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    reports: tuple[Expected, ...]


def _load(log: Path) -> Case:
    facts = tomllib.loads(log.with_suffix(".toml").read_text())
    reports = tuple(Expected(**(report | {"lines": tuple(report["lines"])})) for report in facts["reports"])
    return Case(log.stem, decode(log.read_bytes()), reports)


CASES = tuple(_load(log) for log in sorted(LOGS.glob("*.log")))


def _bare(line: str) -> str:
    return re.sub(r"^.*?\[ *\d+\.\d{6}\](?:\[ *[TC]\d+\])? ", "", line)


def _seen(case: Case, rules: tuple[Rule, ...] = RULES) -> tuple[Expected, ...]:
    seen = []
    for report in console.parse(case.text, rules):
        lines = report.text.split("\n")
        seen.append(
            Expected(
                kind=report.kind.name,
                title=report.title,
                fatal=report.fatal,
                lines=(report.line, report.line + len(lines) - 1),
                first=_bare(lines[0]),
                last=_bare(lines[-1]),
            )
        )
    return tuple(seen)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_golden_log_holds_exactly_its_reports(case: Case) -> None:
    assert _seen(case) == case.reports


def test_there_are_logs_of_both_architectures_and_both_kernels() -> None:
    families = {tuple(case.name.split("-")[:2]) for case in CASES}
    assert families == {("x86", "6.12"), ("x86", "7.3"), ("arm64", "6.12"), ("arm64", "7.3")}


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_a_golden_log(kind: Kind) -> None:
    assert any(report.kind == kind.name for case in CASES for report in case.reports)


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda i: f"{i}-{RULES[i].hint.strip(' :[]')}")
def test_no_rule_can_be_removed_unnoticed(index: int) -> None:
    rules = RULES[:index] + RULES[index + 1 :]
    assert any(_seen(case, rules) != case.reports for case in CASES)


@pytest.mark.parametrize("shape", ["end", "joins"])
def test_what_ends_and_joins_blocks_matters(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    never = re.compile(r"(?!)")
    for rule in {id(rule.shape): rule.shape for rule in RULES}.values():
        if getattr(rule, shape) is None:
            continue
        with monkeypatch.context() as patch:
            # A frozen literal: changed from outside for this one look only.
            patch.setitem(rule.__dict__, shape, never)
            assert any(_seen(case) != case.reports for case in CASES), f"{rule} does not need its {shape}"
        assert getattr(rule, shape) is not never


@pytest.mark.parametrize("case", [case for case in CASES if case.reports], ids=lambda case: case.name)
def test_a_log_cut_off_anywhere_still_tells_of_its_first_report(case: Case) -> None:
    lines = case.text.split("\n")
    first = case.reports[0]
    for length in range(first.lines[0] + 1, len(lines)):
        reports = console.parse("\n".join(lines[:length]))
        for report in reports:
            assert report.line + report.text.count("\n") < length
        if length > first.lines[1]:
            assert reports, f"nothing found in the first {length} lines"
            # The title may still lack a fact, but never names another kind.
            assert reports[0].kind.name == first.kind


@pytest.mark.parametrize("case", [case for case in CASES if case.reports], ids=lambda case: case.name)
def test_text_after_a_report_does_not_belong_to_it(case: Case) -> None:
    last = case.reports[-1].lines[1]
    lines = case.text.split("\n")[: last + 1]
    noise = [f"systemd[1]: Started unit {i}." for i in range(700)]
    longer = "\n".join(lines + noise + lines + noise)
    assert [report.title for report in console.parse(longer)] == [report.title for report in case.reports] * 2
    assert all(noise[10] not in report.text for report in console.parse(longer) if report.kind is not Kind.OOM_KILL)


def test_stamps_and_callers_and_line_ends_change_nothing() -> None:
    (case,) = (case for case in CASES if case.name == "x86-7.3-warn")
    stamped = re.compile(r"^\[ *\d+\.\d{6}\] ", re.M)
    dressings = (
        stamped.sub("", case.text),
        stamped.sub("<4>[  100.000001][    C1] ", case.text),
        case.text.replace("\n", "\r\n"),
        stamped.sub(lambda m: f"\x1b[32m{m[0]}\x1b[0m", case.text),
    )
    for text in dressings:
        (report,) = console.parse(text)
        assert (report.title, report.text.count("\n")) == (case.reports[0].title, 38)
        assert "\r" not in report.text
        assert "\x1b" not in report.text


def test_titles_are_equal_for_equal_causes_and_free_of_numbers() -> None:
    first, second = (
        f"BUG: Bad thing {n:#x} at {0xFFFF888000000000 + n:016x} on CPU#{n % 8} by python3/{n} after {n}s\n"
        for n in (4711, 815)
    )
    assert console.parse(first)[0].title == console.parse(second)[0].title
    assert not re.search(r"\d", console.parse(first)[0].title.replace("python3", ""))


def test_an_empty_console_is_quiet() -> None:
    assert console.parse("") == []
    assert console.parse("\n\n") == []


# Bounds


FLOODS = {
    "harmless lines": "[   12.345678] virtio_net virtio0: nothing to see here\n",
    "one kind of report": "[   12.345678] BUG: Bad rss-counter state mm:00000000ff7c1a53 type:MM_ANONPAGES val:-1\n",
    "cuts without headlines": "[   12.345678] ------------[ cut here ]------------\n",
    "bars": "[   12.345678] " + "=" * 66 + "\n",
    "one endless line": "BUG WARNING: ",
    "empty lines": "\n",
    "stacks without headlines": "[   12.345678]  move_ptes+0x41c/0x8a0\n",
}


@pytest.mark.parametrize("unit", FLOODS.values(), ids=FLOODS.keys())
def test_a_flooded_console_is_parsed_in_one_pass_and_its_end_is_not_lost(unit: str) -> None:
    """Seconds where the work grows with the length; with its square this test would not end."""
    flood = unit * (16 * 2**20 // len(unit))
    reports = console.parse(flood + "\n[   99.000000] Kernel panic - not syncing: drowned\n")
    assert len(reports) <= console.MAX_REPORTS + 1
    assert reports[-1].fatal
    assert "Kernel panic - not syncing: drowned" in reports[-1].text
    assert all(len(report.text) <= console.MAX_CHARS + 32 for report in reports)


def test_a_block_is_bounded_in_lines_and_in_size() -> None:
    endless = "WARNING: mm/mremap.c:321 at move_ptes+0x41c/0x8a0, CPU#1: python3/412\n" + " fn+0x1/0x2\n" * 1_000
    (report,) = console.parse(endless)
    assert report.text.count("\n") < console.MAX_LINES
    wide = endless.replace("fn", "fn" * 5_000)
    (report,) = console.parse(wide)
    assert len(report.text) < console.MAX_CHARS + 32
    assert re.fullmatch(r"\[\d+ more lines\]", report.text.split("\n")[-1])
    assert max(map(len, report.text.split("\n"))) <= console_log.MAX_COLUMNS


# Allowing


def test_a_kill_for_memory_is_reported_but_is_no_splat() -> None:
    (case,) = (case for case in CASES if case.name == "x86-7.3-oom-kill")
    (report,) = console.parse(case.text)
    assert report.kind is Kind.OOM_KILL
    assert console.allowed(report)
    assert console.splats(case.text) == []


def test_every_other_kind_is_a_splat() -> None:
    for case in CASES:
        expected = [report.title for report in case.reports if report.kind != "OOM_KILL"]
        assert [report.title for report in console.splats(case.text)] == expected


def test_nothing_fatal_is_ever_allowed() -> None:
    (case,) = (case for case in CASES if case.name == "x86-7.3-oom-kill")
    died = case.text.rpartition("[")[0] + "[    9.000000] Kernel panic - not syncing: System is deadlocked on memory\n"
    (splat,) = console.splats(died)
    assert splat.fatal


def test_every_allowance_gives_its_reason() -> None:
    assert all(allowance.reason for allowance in console.ALLOWED)


# Cutting

CONSOLE = "\n".join(
    [
        "[    1.000000] Linux version 7.3.4",
        "[    2.000000] Run /init as init process",
        "[    3.000000] harness: begin aa-1",
        "[    3.100000] first",
        "[    3.200000] harness: end aa-1",
        "[    3.300000] late",
        "[    4.000000] harness: begin bb-2\r",
        "[    4.100000] second",
        "[    5.000000] harness: begin cc-3",
        "[    5.100000] third, harness: end cc-3 is only quoted here",
        "[    5.200000] harness: end cc-31",
        "",
    ]
)


def test_a_test_gets_the_lines_between_its_markers() -> None:
    assert console_log.cut(CONSOLE, "aa-1") == "[    3.100000] first\n"


def test_a_test_without_an_end_ends_at_the_next() -> None:
    assert console_log.cut(CONSOLE, "bb-2") == "[    4.100000] second\n"


def test_the_test_in_which_the_guest_died_gets_the_rest() -> None:
    died = CONSOLE.partition("[    5.200000]")[0]
    assert console_log.cut(died, "cc-3") == "[    5.100000] third, harness: end cc-3 is only quoted here\n"


def test_a_test_whose_begin_was_lost_starts_at_the_marker_before() -> None:
    lost = CONSOLE.replace("begin aa-1", "beg")
    assert console_log.cut(lost, "aa-1").split("\n")[-2] == "[    3.100000] first"
    lost = CONSOLE.replace("begin bb-2\r", "(lost)").replace("begin cc-3", "end bb-2")
    assert console_log.cut(lost, "bb-2").splitlines()[-1] == "[    4.100000] second"
    assert "late" in console_log.cut(lost, "bb-2")


def test_a_test_the_log_knows_nothing_of_has_no_lines() -> None:
    assert console_log.cut(CONSOLE, "zz") == ""
    assert console_log.cut("", "zz") == ""
    assert console_log.cut(CONSOLE, "cc") == ""


def test_the_aftermath_is_what_comes_before_the_next_test() -> None:
    assert console_log.aftermath(CONSOLE, "aa-1") == "[    3.300000] late\n"
    assert console_log.aftermath(CONSOLE, "bb-2") == ""
    assert console_log.aftermath(CONSOLE, "cc-31") == ""


def test_the_pieces_of_a_console_add_up() -> None:
    """The boot, the tests, the lines after them and the markers are the whole log: no report is lost between tests."""
    (case,) = (case for case in CASES if case.name == "arm64-7.3-reports-across-markers")
    ids = ["2-list", "3-dump"]
    marks = [line for line in case.text.splitlines(keepends=True) if "harness: " in line]
    assert len(marks) == 4
    boot = case.text.partition(marks[0])[0]
    pieces = [boot]
    for token in ids:
        pieces += [console_log.cut(case.text, token), console_log.aftermath(case.text, token)]
    assert sum(map(len, pieces)) + sum(map(len, marks)) == len(case.text)
    assert sum(len(console.parse(piece)) for piece in pieces) == len(case.reports)
    late = console.parse(console_log.aftermath(case.text, "2-list"))
    assert [report.title for report in late] == ["WARNING in ct_kernel_exit"]


def test_cutting_a_flooded_console_stays_quick() -> None:
    flood = "harness: " * (8 * 2**20 // 9) + "\n"
    assert console_log.cut(flood + CONSOLE, "aa-1") == "[    3.100000] first\n"


# Escaping


def test_escaped_text_holds_nothing_a_terminal_or_xml_obeys() -> None:
    every = "".join(map(chr, [*range(0x300), *range(0x2000, 0x2100), 0xFEFF, 0xFFFE, 0xFFFF, 0x1F600, 0xD800]))
    safe = escape(every)
    ET.fromstring(f"<a>{safe.replace('&', '&amp;').replace('<', '&lt;')}</a>")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", safe)
    assert "\\x1b" in safe
    assert "\u202e" not in safe
    assert "\U0001f600" in safe


def test_escaping_keeps_lines_and_bounds_them() -> None:
    assert escape("a\tb\r\nc\n") == "a\tb\nc\n"
    assert escape("x" * 30 + "\nshort", columns=10) == "x" * 10 + "[… 20 more]\nshort"


def test_escaping_twice_is_escaping_once() -> None:
    once = escape("\x1b[2J\x00\x9b \u202e")
    assert escape(once) == once


def test_bytes_that_are_no_text_become_visible() -> None:
    assert decode(b"ok \xff\xc3\x28 \xc3\xa4") == "ok \\xff\\xc3( ä"


def test_titles_are_safe_to_print() -> None:
    (report,) = console.parse("BUG: \x1b]0;owned\x07 \u202e" + "x" * 5_000 + "\n")
    assert report.title.isprintable()
    assert len(report.title) < 2 * titles.MAX_TITLE
