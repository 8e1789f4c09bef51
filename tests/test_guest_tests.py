# SPDX-License-Identifier: GPL-2.0
"""The guest tests as a body of text: the table of them is made from their docstrings, and the example is a test."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import guest_tests
from harness.machine import payload
from harness.paths import PROJECT
from tests import rows
from tests.rows import GuestTest, Malformed

SECTIONS = {1: "First"}
ONE = GuestTest("test_a.py::test_one", ((1, "name"),), "moves.", "EINVAL.", "success.")


def table(*tests: GuestTest, last: int = 1, untested: dict[int, str] | None = None) -> str:
    return rows.table(list(tests), SECTIONS, last, untested or {})


# --- docstrings --------------------------------------------------------------------------------------------------


def test_a_docstring_is_read() -> None:
    text = """Rows 25 (after-unfaulted) and 26 (before-unfaulted): memory
moves: there.

Why, and
::

    a picture

Unpatched: two
mappings.
Patched: one."""
    assert rows.parse("test_a.py::test_a", text) == GuestTest(
        "test_a.py::test_a",
        ((25, "after-unfaulted"), (26, "before-unfaulted")),
        "memory moves: there.",
        "two mappings.",
        "one.",
    )


def test_every_kernel_stands_for_both() -> None:
    found = rows.parse("test_a.py::test_a", "No row: memory moves.\n\nEvery kernel: success.")
    assert (found.rows, found.unpatched, found.patched) == ((), "success.", "success.")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "begin the docstring with"),
        ("Memory moves.\n\nEvery kernel: success.", "begin the docstring with"),
        ("Row 25, after-unfaulted: moves.\n\nEvery kernel: success.", "its name in parentheses"),
        ("Row 25 (after-unfaulted): moves.", "end the docstring with"),
        ("Row 25 (after-unfaulted): moves.\n\nUnpatched: EINVAL.", "end the docstring with"),
    ],
)
def test_a_docstring_without_row_or_expectation_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Malformed, match=f"test_a.py::test_a: .*{reason}"):
        rows.parse("test_a.py::test_a", text)


def test_a_new_test_without_a_row_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "test_new.py").write_text("def test_new(area):\n    pass\n")
    with pytest.raises(Malformed, match=r"test_new\.py::test_new"):
        list(rows.read(tmp_path))


# --- the table ---------------------------------------------------------------------------------------------------


def test_a_row_has_a_line_for_each_of_its_tests() -> None:
    other = GuestTest("test_a.py::test_other", ((1, "name"),), "a|b.", "success.", "success.")
    assert table(ONE, other).partition("|---|---|---|---|---|---|\n")[2].splitlines()[:2] == [
        "| 1 | name | moves. | EINVAL. | success. | `test_a.py::test_one` |",
        "| 1 | name | a\\|b. | success. | the same | `test_a.py::test_other` |",
    ]


def test_a_test_without_a_row_comes_last() -> None:
    other = GuestTest("test_a.py::test_other", (), "more.", "success.", "success.")
    assert "test_a.py::test_other" in table(ONE, other).partition("## Beyond the rows")[2]


def test_a_row_without_a_test_needs_a_reason() -> None:
    with pytest.raises(Malformed, match="row 2 has no test"):
        table(ONE, last=2)
    assert "| 2 | - | no test: not yet | - | - | - |" in table(ONE, last=2, untested={2: "not yet"})


@pytest.mark.parametrize(("number", "title", "reason"), [(2, "x", "no row 2"), (1, "x", "row 1 is called x here")])
def test_rows_that_do_not_exist_or_have_two_names_are_refused(number: int, title: str, reason: str) -> None:
    other = GuestTest("test_a.py::test_other", ((number, title),), "moves.", "success.", "success.")
    with pytest.raises(Malformed, match=reason):
        table(ONE, other)


def test_the_check_notices_a_table_that_is_not_current(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rows, "TABLE", tmp_path / "TESTS.md")
    assert rows.main(["--check"]) == 1
    assert "run python -m tests.rows" in capsys.readouterr().err
    assert rows.main([]) == 0
    assert rows.main(["--check"]) == 0
    (tmp_path / "TESTS.md").write_text("edited by hand\n")
    assert rows.main(["--check"]) == 1


# --- the example -------------------------------------------------------------------------------------------------


def test_the_example_in_the_documentation_is_the_test_that_runs() -> None:
    source = (rows.GUEST_TESTS / "test_example.py").read_text()
    code = source[source.index("from guest_tests") :]
    assert textwrap.indent(code, "    ") in (guest_tests.__doc__ or "")


# --- the fixtures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["plug-in", "conftest"])
def test_tests_elsewhere_can_load_the_fixtures(tmp_path: Path, how: str) -> None:
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {PROJECT}\n")
    (tmp_path / "test_a.py").write_text(
        "def test_a(area, observed):\n    assert observed.areas == [area]\n    assert False, 'on purpose'\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:mremap-harness", "-p", "no:cacheprovider", str(tmp_path)]
    if how == "plug-in":
        command += ["-p", "guest_tests.support.fixtures"]
    else:
        (tmp_path / "conftest.py").write_text("from guest_tests.support.fixtures import *\n")
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert "AssertionError: on purpose" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("memory under test at the failure") == 1, done.stdout


def test_the_fixtures_travel_with_tests_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("")
    assert b"guest_tests/support/fixtures.py" in payload.tests_archive(tmp_path, [])
