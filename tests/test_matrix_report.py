# SPDX-License-Identifier: GPL-2.0
"""What a matrix shows: the table, the HTML page, the JSON file, and what changed. No test here boots."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.matrix import changes, outcome, page, table
from harness.matrix.outcome import Report, State
from harness.matrix.table import Paint
from tests import matrix_page
from tests.matrix_runs import CELL, line, report

ARM = replace(CELL, arch="arm64")
BUILT = replace(CELL, kernel="relocate-anon", preset="fast", options="--guest-cpus=2")
PLAIN = Paint(on=False)

MIXED = report(
    CELL,
    line("test_a"),
    line("test_b", "lacking"),
    line("test_c", "skipped"),
    line("test_d", "xfailed", finding="lost-page"),
    line("guest_tests/test_b.py::test_e", "failed", message="lost a page"),
    line("guest_tests/test_b.py::test_f", "MISS", message="infrastructure: no QEMU"),
    line("guest_tests/test_b.py::test_g", "passed", failed=True, message="finding x does not show on 6.12.1"),
)


def shown(*reports: Report, width: int = 200, paint: Paint = PLAIN) -> list[str]:
    return list(table.lines(reports, width, paint))


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_table_counts_by_module_and_kernel() -> None:
    rows = [each.split() for each in shown(MIXED, report(ARM, line("test_a"))) if each]
    assert rows[:5] == [
        ["kernel", "debian:6.12", "debian:6.12"],
        ["x86_64", "arm64"],
        ["test_a", "2", "1s", "1f", "1"],
        ["test_b", "2!", "1?", "-"],
        ["all", "2", "1s", "1f", "2!", "1?", "1"],
    ]


def test_every_surprise_is_named_with_its_reason_and_an_expected_finding_is_not() -> None:
    text = "\n".join(shown(MIXED))
    assert "debian:6.12 x86_64: 3 surprises" in text
    for name, why in (("test_e", "lost a page"), ("test_f", "no QEMU"), ("test_g", "does not show")):
        assert re.search(rf"test_b\.py::{name}\n +.*{why}", text), f"{name} is not told"
    assert "::test_d" not in text


def test_the_last_line_sums_up() -> None:
    assert shown(MIXED)[-1] == (
        "1 cell (1 ran), 2 passed, 1 skipped, 1 expected finding, 2 failed, 1 missed; 3 surprises"
    )


def test_a_table_that_is_too_wide_is_continued_below() -> None:
    reports = [report(replace(CELL, kernel=f"debian:6.{number}"), line("test_a")) for number in range(20)]
    lines = shown(*reports, width=80)
    heads = [each for each in lines if each.startswith("kernel")]
    assert len(heads) > 1
    assert sum(each.count("debian:6.") for each in heads) == 20
    assert all(len(each) <= 80 for each in lines[: lines.index(table.LEGEND)])


def test_many_surprises_of_one_cell_are_counted_beyond_the_first() -> None:
    text = "\n".join(shown(report(CELL, *(line(f"test_{number}", "failed") for number in range(100)))))
    assert text.count("::test_") == 20
    assert "and 80 more" in text


def test_trouble_and_repetitions_are_told() -> None:
    broken = report(CELL, line("test_a"), trouble="it was ended after 3 minutes", reruns=("its worker w died",))
    text = "\n".join(shown(broken))
    assert "it was ended after 3 minutes" in text
    assert "debian:6.12 x86_64: its worker w died" in text
    assert "1 surprise\n" in f"{text}\n"


def test_colours_are_only_for_those_who_want_them() -> None:
    assert "\033" not in "\n".join(shown(MIXED))
    assert "\033[31m" in "\n".join(shown(MIXED, paint=Paint(on=True)))


def test_a_cell_that_did_not_run_says_so() -> None:
    waiting = outcome.report(CELL, "key", State.NOT_RUN)
    assert table.cell_line(waiting) == "debian:6.12 x86_64: not run"
    assert shown(waiting)[-1] == "1 cell (1 not run), no tests; 0 surprises"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3600, "1:00:00"), (7385, "2:03:05")])
def test_times_are_readable(seconds: float, text: str) -> None:
    assert table.clock(seconds) == text


# --- the page --------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of a page, as far as the tests ask."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        assert not any(name.startswith("on") for name, _ in attrs), f"a script in {tag}: {attrs}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} is closed out of turn"

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp;"


def drawn(*reports: Report, base: list[Report] | None = None) -> Page:
    found = None if base is None else changes.compare(base, reports)
    parsed = Page(page.page(reports, 1_000_000.0, found, HOSTILE))
    assert not parsed.open, f"these are never closed: {parsed.open}"
    return parsed


def test_a_page_is_whole_by_itself() -> None:
    parsed = drawn(MIXED, report(ARM, line("test_a")), base=[MIXED])
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert all(link.startswith("#") for link in parsed.links)
    assert len(parsed.ids) == len(set(parsed.ids))


def test_each_column_is_headed_by_kernel_architecture_and_options() -> None:
    text = drawn(report(BUILT, line("test_a"))).text
    assert "relocate-anon:fastx86_64--guest-cpus=2" in text


def test_every_number_that_is_no_plain_pass_leads_to_its_tests() -> None:
    parsed = drawn(MIXED)
    assert {"#cell-0", "#cell-0-test_a", "#cell-0-test_b"} == set(parsed.links)
    assert {link[1:] for link in parsed.links} <= set(parsed.ids)


def test_a_failure_shows_its_console_and_evidence() -> None:
    failed = line("test_a", "failed", sections=(("kernel console", "BUG: Bad page"), ("run it again", "pytest -k a")))
    text = drawn(report(CELL, failed)).text
    for part in ("kernel console", "BUG: Bad page", "run it again", "pytest -k a"):
        assert part in text


def test_whatever_a_guest_says_is_text() -> None:
    failed = line(
        f"guest_tests/{HOSTILE}.py::{HOSTILE}",
        "failed",
        message=HOSTILE,
        sections=((HOSTILE, HOSTILE),),
        finding=HOSTILE,
    )
    quoted = line('guest_tests/"><img src=x>.py::test_a', "failed")
    hostile = replace(
        report(replace(CELL, kernel=HOSTILE, options=HOSTILE), failed, quoted, trouble=HOSTILE, reruns=(HOSTILE,)),
        **dict.fromkeys(("release", "provenance", "accelerator", "host", "output"), HOSTILE),
    )
    parsed = drawn(hostile, base=[report(CELL, line("test_a"))])
    assert "img" not in parsed.tags
    assert "script" not in parsed.tags
    assert parsed.text.count(HOSTILE) >= 12
    assert all(link.startswith("#") for link in parsed.links)


def test_a_page_tells_trouble_repetitions_and_changes() -> None:
    broken = report(CELL, line("test_a"), trouble="it was ended", reruns=("its worker w died",))
    text = drawn(broken, base=[report(CELL, line("test_a", "failed"))]).text
    for part in ("it was ended", "its worker w died", "the last line", "Changes since", "failed"):
        assert part in text
    assert "No test has another outcome" in drawn(MIXED, base=[MIXED]).text


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_json_gives_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "base.json"
    reports = [MIXED, outcome.report(ARM, "", State.NOT_RUN), report(BUILT, trouble="lost", reruns=("again",))]
    path.write_text(outcome.to_json(reports, 1000.0))
    again = outcome.from_json(path)
    assert outcome.to_json(again, 1000.0) == path.read_text()
    assert [each.name for each in again] == [each.name for each in reports]
    assert again[0].surprises == 3


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "something else"}'])
def test_a_foreign_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"^\S+ does not hold the results of a matrix: .*$"):
        outcome.from_json(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 9}, "has version 9 of the format"),
        ({"cells": [{}]}, "is damaged"),
        ({"cells": 3}, "is damaged"),
        ({"cells": [{"state": "splendid", "tests": []}]}, "is damaged"),
    ],
)
def test_a_future_version_and_damage_are_told(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = tmp_path / "base.json"
    path.write_text(json.dumps(json.loads(outcome.to_json([MIXED], 0.0)) | change))
    with pytest.raises(UsageError, match=said) as caught:
        outcome.from_json(path)
    assert "\n" not in str(caught.value)


# --- changes ---------------------------------------------------------------------------------------------------------


def told(base: list[Report], now: list[Report]) -> list[str]:
    return [str(each) for each in changes.compare(base, now)]


def test_the_same_again_is_no_change() -> None:
    assert told([MIXED], [replace(MIXED, state=State.KEPT, seconds=1.0, host="elsewhere")]) == []


def test_a_test_with_another_outcome_is_told_with_its_reason() -> None:
    before = report(CELL, line("test_a"), line("test_b"), line("test_gone"))
    after = report(CELL, line("test_a", "failed", message="lost"), line("test_b"), line("test_new", "skipped"))
    assert told([before], [after]) == [
        "debian:6.12 x86_64  guest_tests/test_a.py::test_a: passed -> failed  lost",
        "debian:6.12 x86_64  guest_tests/test_a.py::test_gone: passed -> no result",
        "debian:6.12 x86_64  guest_tests/test_a.py::test_new: no result -> skipped",
    ]


def test_a_finding_that_no_longer_shows_is_a_change() -> None:
    before = report(CELL, line("test_a", "xfailed"))
    after = report(CELL, line("test_a", "passed", failed=True, message="finding x does not show"))
    assert told([before], [after]) == [
        "debian:6.12 x86_64  guest_tests/test_a.py::test_a: xfailed -> passed, against the expectation"
        "  finding x does not show"
    ]


def test_a_cell_on_one_side_only_is_one_change() -> None:
    one, other = report(CELL, line("test_a"), line("test_b")), report(ARM, line("test_a"))
    assert told([one], [other]) == [
        "debian:6.12 arm64: not in the matrix -> 1 tests",
        "debian:6.12 x86_64: 2 tests -> not in the matrix",
    ]


def test_a_cell_that_broke_is_told_once() -> None:
    broken = outcome.report(CELL, "", State.BROKEN, trouble="no such kernel")
    assert told([report(CELL, line("test_a"))], [broken]) == ["debian:6.12 x86_64: 1 tests -> broken  no such kernel"]
    assert told([broken], [broken]) == []


def test_the_page_in_the_documentation_names_no_directory_of_the_machine() -> None:
    seen = {
        "sections": [["QEMU", "-kernel '/home/me/.cache/mremap-harness/kernels/a' -append 'x /mnt'"]],
        "output": "/srv/work/.venv/bin/python3 -m pytest",
        "seconds": 1.5,
    }
    assert matrix_page.without_directories(seen) == {
        "sections": [["QEMU", "-kernel '~/.cache/mremap-harness/kernels/a' -append 'x /mnt'"]],
        "output": ".venv/bin/python3 -m pytest",
        "seconds": 1.5,
    }
