# SPDX-License-Identifier: GPL-2.0
"""Reads a matrix from a TOML file: which kernels, architectures, presets and options are combined, in groups.

``docs/matrix.md`` describes the file.
"""

from __future__ import annotations

import itertools
import shlex
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import arch, paths
from harness.errors import UsageError
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec
from harness.options import BuildOptions

#: The matrix of the project.
DEFAULT = paths.KERNEL_CONFIGS / "matrix.toml"

#: The directory of the guest tests, relative to where cells run.
_TESTS = "guest_tests"

#: Options of pytest that a cell is given in another way, with the key that does it.
_TAKEN = {
    "--kernel": "kernels",
    "--arch": "arches",
    "--preset": "presets",
    "-n": "workers",
    "--numprocesses": "workers",
    "-k": "keyword",
    "--results": "",
    "--keep": "",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of pytest on one kernel."""

    #: the name of its group
    group: str
    #: for ``--kernel``
    kernel: str
    arch: str
    #: for ``--preset``; empty for the default
    preset: str = ""
    #: more options of pytest, as one line
    options: str = ""
    #: files below guest_tests; empty for all
    tests: tuple[str, ...] = ()
    #: for ``-k``; empty for all
    keyword: str = ""
    #: minutes after which it is ended
    minutes: float = 120.0
    #: how many guests run side by side
    workers: int = 2
    #: what a machine of a cluster has to offer
    resources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Names it in tables, and in a comparison with another run."""
        preset = f":{self.preset}" if self.preset else ""
        return " ".join(filter(None, (f"{self.kernel}{preset}", self.arch, self.options)))

    @property
    def spec(self) -> BootSpec:
        """Its kernel.

        :raises UsageError: if it names none, or a machine that is not booted here.
        """
        building = BuildOptions(words=tuple(word for word in self.preset.split(":") if word))
        (spec,) = grammar.parse_all([self.kernel], arch.find(self.arch), building)
        if not isinstance(spec, BootSpec):
            raise UsageError(f"{self.kernel} is a running machine: a matrix takes kernels that are booted in guests")
        return spec

    @property
    def arguments(self) -> list[str]:
        """What decides its results: pytest's arguments without those about reports and speed."""
        preset = [f"--preset={self.preset}"] if self.preset else []
        keyword = ["-k", self.keyword] if self.keyword else []
        files = [f"{_TESTS}/{name}" for name in self.tests] or [_TESTS]
        chosen = [f"--kernel={self.kernel}", f"--arch={self.arch}", *preset, *shlex.split(self.options), *keyword]
        return [*chosen, "--expect-findings", *files]


@dataclass(frozen=True)
class Group:
    """Cells that are run together."""

    name: str
    description: str
    #: whether it has to be asked for
    optional: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Definition:
    """A whole file."""

    path: Path
    groups: Mapping[str, Group]

    def cells(self, names: Sequence[str] = ()) -> list[Cell]:
        """The cells of these groups, or of all that are not optional.

        :raises UsageError: if there is no such group, or two groups run the same kernel in different ways.
        """
        for name in names:
            if name not in self.groups:
                raise UsageError(f"{self.path} has no group {name!r}: it has {', '.join(self.groups)}")
        chosen = [self.groups[name] for name in names] or [each for each in self.groups.values() if not each.optional]
        found: dict[str, Cell] = {}
        for cell in (cell for group in chosen for cell in group.cells):
            other = found.setdefault(cell.name, cell)
            if replace(other, group=cell.group) != cell:
                raise UsageError(
                    f"{self.path}: the groups {other.group} and {cell.group} run {cell.name} in different ways: "
                    "run one group at a time"
                )
        if not found:
            raise UsageError(f"every group of {self.path} is optional: choose one with --group")
        return list(found.values())


def load(path: Path = DEFAULT) -> Definition:
    """Read a file.

    :raises UsageError: if it cannot be read, or is not a matrix; one line that names the place.
    """
    try:
        data = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{path}: {why}") from None
    try:
        if unknown := data.keys() - {"groups"}:
            raise UsageError(f"{sorted(unknown)[0]!r} is not known here: a matrix consists of tables [groups.NAME]")
        groups = data.get("groups")
        if not isinstance(groups, dict) or not groups:
            raise UsageError("there is no group: write a table [groups.NAME]")
        return Definition(path, {name: _group(name, table) for name, table in groups.items()})
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and _is_positive(value)


#: What each key of a group takes: a check, and its description for messages.
_KEYS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "description": (_is_text, "a text"),
    "optional": (lambda value: isinstance(value, bool), "true or false"),
    "kernels": (_are_texts, "a list of kernels, as --kernel takes them"),
    "arches": (_are_texts, "a list of architectures"),
    "presets": (_are_texts, "a list of presets"),
    "options": (_are_texts, "a list of command lines, one for each variant"),
    "tests": (_are_texts, "a list of files below guest_tests"),
    "keyword": (_is_text, "an expression for pytest's -k"),
    "minutes": (_is_positive, "a number above 0"),
    "workers": (_is_count, "a whole number above 0"),
    "resources": (_are_texts, "a list of names"),
}


def _group(name: str, table: Any) -> Group:
    place = f"groups.{name}"
    if not isinstance(table, dict):
        raise UsageError(f"{place} has to be a table")
    for key, value in table.items():
        if key not in _KEYS:
            raise UsageError(f"{place}.{key} is not known: use {', '.join(_KEYS)}")
        check, what = _KEYS[key]
        if not check(value):
            raise UsageError(f"{place}.{key} has to be {what}")
    for key in ("kernels", "arches"):
        if not table.get(key):
            raise UsageError(f"{place}.{key} is missing: give {_KEYS[key][1]}")
    for file in table.get("tests", []):
        if not (paths.PROJECT / _TESTS / file).is_file():
            raise UsageError(f"{place}.tests: there is no file {_TESTS}/{file}")
    for line in table.get("options", []):
        _check_options(line, f"{place}.options")
    return Group(name, table.get("description", ""), table.get("optional", False), tuple(_cells(name, table)))


def _check_options(line: str, place: str) -> None:
    try:
        words = [word.partition("=")[0] for word in shlex.split(line)]
    except ValueError as error:
        raise UsageError(f"{place}: {line!r} is no command line: {error}") from None
    for word in words:
        if word in _TAKEN:
            instead = f"use the key {_TAKEN[word]}" if _TAKEN[word] else "the matrix runs each cell unattended"
            raise UsageError(f"{place}: {word} does not belong here: {instead}")


def _cells(name: str, table: Mapping[str, Any]) -> list[Cell]:
    shared: dict[str, Any] = {key: table[key] for key in ("keyword", "minutes", "workers") if key in table}
    shared |= {key: tuple(table[key]) for key in ("tests", "resources") if key in table}
    axes = itertools.product(
        table["kernels"], table["arches"], table.get("presets") or [""], table.get("options") or [""]
    )
    found = []
    for kernel, architecture, preset, options in axes:
        cell = Cell(group=name, kernel=kernel, arch=architecture, preset=preset, options=options, **shared)
        try:
            cell.spec  # noqa: B018 - a wrong name has to be found before hours of work
        except UsageError as error:
            raise UsageError(f"groups.{name}: {error}") from None
        found.append(cell)
    return found
