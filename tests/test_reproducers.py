# SPDX-License-Identifier: GPL-2.0
"""Each finding has a report and a program in C, in docs/findings/."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.build import series
from harness.judging.findings import known
from tests.findings_page import FINDINGS, PAGE

NAMES = sorted(known())
#: what every report says, in this order
SECTIONS = ["Kernels", "Cause", "Reproducer", "Evidence", "Fix"]
#: these differ from program to program
OWN = {"main", "child", "start"}


def report(name: str) -> str:
    return (FINDINGS / f"{name}.md").read_text()


def program(name: str) -> str:
    return (FINDINGS / f"{name}.c").read_text()


def functions(text: str) -> dict[str, str]:
    """The functions of a program, by name. They begin and end in the first column."""
    found = re.finditer(r"^[a-z][^\n;=]*?\b(\w+)\([^;]*?\)\n\{\n.*?^\}$", text, re.MULTILINE | re.DOTALL)
    return {each[1]: each[0] for each in found}


def test_every_finding_has_a_report_and_a_program_and_nothing_else_is_there() -> None:
    assert {each.stem for each in FINDINGS.glob("*.md")} == set(known())
    assert {each.stem for each in FINDINGS.glob("*.c")} == set(known())
    assert {each.suffix for each in FINDINGS.iterdir()} == {".md", ".c", ".patch"}
    assert {each.stem for each in FINDINGS.glob("*.patch")} <= set(known())


@pytest.mark.parametrize("name", NAMES)
def test_the_page_links_to_both(name: str) -> None:
    section = PAGE.read_text().partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert f"(findings/{name}.md)" in section
    assert f"(findings/{name}.c)" in section


@pytest.mark.parametrize("name", NAMES)
def test_a_report_says_everything(name: str) -> None:
    text = report(name)
    assert text.startswith(f"# {name}: ")
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == SECTIONS
    assert f"(../findings.md#{name})" in text
    assert f"({name}.c)" in text
    assert known()[name].command in text
    for patch in re.findall(r"\]\((\S+\.patch)\)", text):
        assert (FINDINGS / patch).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_report_quotes_what_its_program_prints(name: str) -> None:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", report(name), re.MULTILINE | re.DOTALL)
    quoted = [text for language, text in blocks if not language]
    assert any(each.endswith("The kernel is wrong.\n") for each in quoted)
    literals = re.findall(r'"((?:[^"\\]|\\.)*)"', program(name))
    for line in "".join(quoted).splitlines():
        assert any(_prints(literal, line) for literal in literals), line


def _prints(literal: str, line: str) -> bool:
    """Whether a format of printf() can give a line."""
    parts = re.split(r"%(?:#llx|l?d|s)", literal.removesuffix("\\n"))
    return re.fullmatch(".+".join(map(re.escape, parts)), line) is not None and bool("".join(parts).strip(" ."))


@pytest.mark.parametrize(
    ("line", "is_printed"),
    [
        ("It can be migrated.", True),
        ("It has 4 and 0.", True),
        ("It can be moved.", False),
        ("The kernel is wrong.", False),
    ],
)
def test_a_line_that_a_program_does_not_print_is_noticed(line: str, is_printed: bool) -> None:
    formats = ["It %s be migrated.\\n", "It has %ld and %ld.\\n", "%s\\n", " %s "]
    assert any(_prints(each, line) for each in formats) == is_printed


@pytest.mark.parametrize("name", NAMES)
def test_a_program_says_what_it_does_and_needs(name: str) -> None:
    text = program(name)
    head = text[: text.index("*/")]
    assert text.startswith("// SPDX-License-Identifier: GPL-2.0\n/*\n")
    assert f" * {name}: " in head
    assert " * Expected: " in head
    assert " * It needs root" in head
    assert "Exit status: 0 the kernel behaves, 1 the kernel has the bug, 77 it cannot tell here." in head


def test_functions_of_the_same_name_are_the_same() -> None:
    first: dict[str, tuple[str, str]] = {}
    for name in NAMES:
        for function, text in functions(program(name)).items():
            if function not in OWN:
                other, same = first.setdefault(function, (name, text))
                assert text == same, f"{function}() of {name}.c differs from that of {other}.c"
    assert {"cannot", "frame", "follows", "scan", "ksm_begin"} <= set(first)


def test_functions_are_told_apart() -> None:
    text = "static int one(int a,\n\t       int b)\n{\n\treturn a;\n}\n\nint main(void)\n{\n\treturn one(1, 2);\n}\n"
    assert set(functions(text)) == {"one", "main"}
    assert "return a;" in functions(text)["one"]
    assert "return a;" not in functions(text)["main"]


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("name", NAMES)
def test_a_program_compiles_without_warnings(name: str, tmp_path: Path) -> None:
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-c", "-o", tmp_path / "out.o", FINDINGS / f"{name}.c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(FINDINGS.glob("*.patch")), ids=lambda path: path.stem)
def test_a_fix_is_one_patch(path: Path) -> None:
    (patch,) = series.load(path)
    files = re.findall(rb"^\+\+\+ b/(\S+)", patch.diff, re.MULTILINE)
    assert files
    assert all(file.startswith(b"mm/") for file in files), f"a fix in {files} is not small"
    assert f"]({path.name})" in report(path.stem)
