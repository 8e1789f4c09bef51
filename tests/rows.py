# SPDX-License-Identifier: GPL-2.0
"""Generates ``guest_tests/TESTS.md``, the test table, from the docstrings of the guest tests.

``python -m tests.rows`` writes the file, ``python -m tests.rows --check`` (part of ``make lint``) says whether it is
current. The docstring of a guest test begins with its row or rows, and ends with what each kind of kernel must do::

    Row 25 (after-unfaulted): faulted memory moves to the place right behind unfaulted memory.

    Explanations and pictures, which the table leaves out.

    Unpatched: two mappings after a plain move.
    Patched: one mapping of ten pages.

``Every kernel:`` replaces the last two where all kernels must do the same. A test that is in no row says ``No row:``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.paths import PROJECT

GUEST_TESTS = PROJECT / "guest_tests"
TABLE = GUEST_TESTS / "TESTS.md"

#: modules that test the library and the checks themselves; they belong to no row
OWN = (
    "test_checks.py",
    "test_example.py",
    "test_explored.py",
    "test_explorer.py",
    "test_kselftest.py",
    "test_library.py",
    "test_library_ksm.py",
    "test_library_proctree.py",
    "test_library_system.py",
    "test_probes.py",
)

#: headings, by the first row below each
SECTIONS = {
    1: "Flags and bad input",
    25: "Which mappings merge",
    47: "Which memory can be relocated",
    65: "Folios of each kind, and the reverse map",
    92: "Failure and undo",
    101: "KSM",
    142: "Several mappings in one call",
}
LAST_ROW = 145

#: rows without a test, and the reason
UNTESTED = dict.fromkeys(range(138, 142), "this number is not used")

INTRODUCTION = """\
# The test table

`python -m tests.rows` generates this file from the docstrings of the tests; `make lint` checks that it is current.
Change the docstring, not this file.

An *unpatched* kernel does not know the relocation flags 8 (`MREMAP_RELOCATE_ANON`, "best effort") and 16
(`MREMAP_MUST_RELOCATE_ANON`, "must"). It must refuse both with EINVAL and change nothing; each test that gives a flag
asserts that, and the column says what else must happen there. A *patched* kernel relocates. A *plain* move is one
without either flag. A page *is found* if a reverse walk that the test forces arrives at it (README, "What each probe
proves"). Most tests that move memory end by asserting that, also where the table does not say so.

A row may have several tests. A test that takes one of several parameters (the kind of walk, the flags) is named once.
"""

_HEADER = re.compile(r"(?:Rows? (?P<rows>\d[^:]*)|No row): (?P<setup>.+)")
_ROW = re.compile(r"(\d+) \(([\w-]+)\)")
_FIELD = re.compile(r"^(Unpatched|Patched|Every kernel): ", re.MULTILINE)


class Malformed(ValueError):
    """A docstring that the table cannot be made from."""


@dataclass(frozen=True)
class GuestTest:
    """One test function, as its docstring describes it."""

    #: the file's name and the function's, as pytest writes them
    name: str
    #: number and name of each row that it is in; empty if it is in none
    rows: tuple[tuple[int, str], ...]
    #: what the test does
    setup: str
    #: what a kernel without relocation must do
    unpatched: str
    #: what a kernel with relocation must do
    patched: str


def parse(name: str, docstring: str) -> GuestTest:
    """Read the docstring of one test.

    :param name: the file's name and the function's.
    :raises Malformed: saying what is missing.
    """
    first, _, rest = docstring.partition("\n\n")
    header = _HEADER.fullmatch(" ".join(first.split()))
    if header is None:
        raise Malformed(f'{name}: begin the docstring with "Row 25 (after-unfaulted): what happens", or "No row: …"')
    rows = tuple((int(number), title) for number, title in _ROW.findall(header["rows"] or ""))
    if header["rows"] and not rows:
        raise Malformed(f"{name}: give each row its name in parentheses: Row 25 (after-unfaulted)")
    pieces = _FIELD.split(rest)
    fields = {key: " ".join(text.split()) for key, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    if fields.keys() == {"Every kernel"}:
        unpatched = patched = fields["Every kernel"]
    elif fields.keys() == {"Unpatched", "Patched"}:
        unpatched, patched = fields["Unpatched"], fields["Patched"]
    else:
        raise Malformed(f'{name}: end the docstring with "Unpatched: …" and "Patched: …", or with "Every kernel: …"')
    return GuestTest(name, rows, header["setup"], unpatched, patched)


def read(directory: Path) -> Iterator[GuestTest]:
    """Every test below ``directory`` that belongs into the table.

    :raises Malformed: for a docstring without row or expectation.
    """
    for path in sorted(directory.glob("test_*.py")):
        if path.name in OWN:
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                yield parse(f"{path.name}::{node.name}", ast.get_docstring(node) or "")


def table(tests: list[GuestTest], sections: Mapping[int, str], last: int, untested: Mapping[int, str]) -> str:
    """The text of ``TESTS.md``.

    :param sections: headings, by the first row below each.
    :param last: the number of the last row.
    :param untested: rows that have no test, and why.
    :raises Malformed: if a row has neither test nor reason, or both, or two names.
    """
    names: dict[int, str] = {}
    for test in tests:
        for number, title in test.rows:
            if names.setdefault(number, title) != title:
                raise Malformed(f"{test.name}: row {number} is called {title} here and {names[number]} in another test")
            if number > last or number in untested:
                raise Malformed(f"{test.name}: there is no row {number}")
    lines = [INTRODUCTION]
    for number in range(1, last + 1):
        if number in sections:
            lines += [f"\n## {sections[number]}\n", *_HEAD]
        found = [test for test in tests if number in dict(test.rows)]
        if found:
            lines += [_line(str(number), names[number], test) for test in found]
        elif number in untested:
            lines.append(f"| {number} | - | no test: {untested[number]} | - | - | - |")
        else:
            raise Malformed(
                f"row {number} has no test: write one, or give the reason in UNTESTED ({Path(__file__).name})"
            )
    lines += ["\n## Beyond the rows\n", *_HEAD]
    lines += [_line("-", "-", test) for test in tests if not test.rows]
    return "\n".join(lines) + "\n"


_HEAD = ("| row | name | what the test does | unpatched kernel | patched kernel | test |", "|---|---|---|---|---|---|")


def _line(number: str, title: str, test: GuestTest) -> str:
    cells = (number, title, test.setup, test.unpatched, test.patched, f"`{test.name}`")
    if test.unpatched == test.patched:
        cells = (*cells[:4], "the same", cells[5])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: list[str]) -> int:
    """Write the table, or check it; the exit status."""
    try:
        text = table(list(read(GUEST_TESTS)), SECTIONS, LAST_ROW, UNTESTED)
    except Malformed as error:
        print(error, file=sys.stderr)
        return 1
    if arguments != ["--check"]:
        TABLE.write_text(text)
    elif not TABLE.exists() or TABLE.read_text() != text:
        print("guest_tests/TESTS.md is not current: run python -m tests.rows, and commit it", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
