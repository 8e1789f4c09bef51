# SPDX-License-Identifier: GPL-2.0
"""The documents name what exists: modules, layers, options, links and paths."""

from __future__ import annotations

import ast
import itertools
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from harness import options
from harness.paths import PROJECT

CONTRIBUTING = PROJECT / "CONTRIBUTING.md"
DOCUMENTS = sorted(
    path for folder in (".", "docs", "docs/findings", "kernel_configs") for path in (PROJECT / folder).glob("*.md")
)

#: The folders of which CONTRIBUTING.md has a row for each module.
MAPPED = ("harness", "guest_tests/mm", "guest_tests/support")


def sections(document: Path) -> dict[str, list[str]]:
    """The lines of a document by the heading they stand under, without code blocks' comments taken for headings."""
    found: dict[str, list[str]] = {"": []}
    heading, code = "", False
    for line in document.read_text().splitlines():
        code ^= line.startswith("```")
        if not code and (match := re.match(r"#+ (.*)", line)):
            heading = match[1]
            found[heading] = []
        else:
            found[heading].append(line)
    return found


def rows(lines: list[str]) -> list[tuple[str, str]]:
    """The first cell's quoted name and the second cell of each row of a table."""
    matches = (re.match(r"\| `([^`]+)` \| (.*) \|", line) for line in lines)
    return [(match[1], match[2]) for match in matches if match]


def mapped_modules() -> list[tuple[str, str]]:
    """The files that CONTRIBUTING.md has a row for, relative to the project, and what it says of them."""
    return [
        (f"{folder}/{name}" if "." in name else f"{folder}/{name}.py", job)
        for folder, lines in sections(CONTRIBUTING).items()
        if folder.split("/")[0] in ("harness", "guest_tests")
        for name, job in rows(lines)
    ]


def anchors(document: Path) -> set[str]:
    """The fragments that GitHub makes of a document's headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections(document)}


def defines(module: Path, name: str) -> bool:
    """Whether a module defines a function or class, or a class in it the method after the dot."""
    body: list[ast.stmt] = ast.parse(module.read_text()).body if module.is_file() else []
    for part in name.split("."):
        found = next((each for each in body if getattr(each, "name", None) == part), None)
        if not isinstance(found, ast.ClassDef | ast.FunctionDef):
            return False
        body = found.body
    return True


def named(document: Path) -> str:
    return document.relative_to(PROJECT).as_posix()


# --- CONTRIBUTING.md ---------------------------------------------------------------------------------------------


def test_every_module_has_a_row() -> None:
    modules = itertools.chain.from_iterable((PROJECT / folder).rglob("*.py") for folder in MAPPED)
    wanted = {named(path) for path in modules if path.stem != "__init__"}
    missing = sorted(wanted - {path for path, _ in mapped_modules()})
    assert not missing, f"CONTRIBUTING.md has no row for {', '.join(missing)}: say in one sentence what each is for"


def test_every_row_names_a_file_once() -> None:
    paths = Counter(path for path, _ in mapped_modules())
    gone = [path for path in paths if not (PROJECT / path).is_file()]
    assert not gone, f"CONTRIBUTING.md has rows for files that do not exist: {', '.join(gone)}"
    twice = [path for path, count in paths.items() if count > 1]
    assert not twice, f"CONTRIBUTING.md has several rows for {', '.join(twice)}"


def test_the_picture_of_the_layers_is_what_lint_checks() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text())
    (layers,) = (each["layers"] for each in settings["tool"]["importlinter"]["contracts"] if each["type"] == "layers")
    text = "\n".join(sections(CONTRIBUTING)["Layers"])
    picture = text.split("```")[1].strip().splitlines()
    assert [re.split(" {2,}", line)[0] for line in picture] == layers


def test_the_reading_order_names_what_is_there() -> None:
    places = re.findall(r"^\d+\. `([^`]+)`: `([^`]+)`", "\n".join(sections(CONTRIBUTING)["Reading order"]), re.M)
    assert 1 <= len(places) <= 10, "the reading order is for a reader with little time: give it at most ten places"
    gone = [f"{name} in {path}" for path, name in places if not defines(PROJECT / path, name)]
    assert not gone, f"the reading order in CONTRIBUTING.md names what is not there: {', '.join(gone)}"


# --- usage -------------------------------------------------------------------------------------------------------


def test_the_table_of_options_is_complete() -> None:
    text = "\n".join(sections(PROJECT / "docs/usage.md")["Options"])
    told = set(re.findall(r"^\| .*?\|", text, re.M))
    names = {name for cell in told for name in re.findall(r"--[a-z-]+", cell)}
    assert names == {each.name for each in options.OPTIONS}, "docs/usage.md lists the options of harness/options.py"


# --- every document ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_link_leads_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue  # another site
        path, _, fragment = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{named(document)} links to {target}: there is no such file"
        assert not fragment or fragment in anchors(linked), f"{named(document)} links to {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_path_of_the_project_exists(document: Path) -> None:
    folders = "|".join(path.name for path in PROJECT.iterdir() if path.is_dir() and not path.name.startswith("."))
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", document.read_text()):
        assert (PROJECT / path).exists(), f"{named(document)} names {path}: there is no such file"
