# SPDX-License-Identifier: GPL-2.0
"""Mutants: deliberate bugs in memory management, each of which the guest tests should notice.

They stand in ``kernel_configs/mutants/*.toml``; ``kernel_configs/README.md`` describes the format. All mutants of a
variant are compiled into one kernel, where at most one is active: see :mod:`harness.build.schemata`.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import paths
from harness.errors import UsageError

#: stands for the condition "this mutant is active" in the added lines of a diff
SWITCH = "MUTANT"

#: The names of mutants.
NAME = re.compile(r"[a-z][a-z0-9-]{2,60}")

_HEADING = re.compile(r"@@ (\S+) (\w+)")
_KEYS = {"breaks", "shows", "commit", "variants", "arch", "cpus", "equivalent", "sample", "diff"}
_VARIANTS = ("unpatched", "relocate-anon")
_ARCHES = ("x86_64", "arm64")
_MOST_CPUS = 4


@dataclass(frozen=True)
class Hunk:
    """A change of one function."""

    #: path of the file in the kernel source
    file: str
    function: str
    #: lines that start with a space, a minus or a plus, as in a diff
    lines: tuple[str, ...]

    @property
    def old(self) -> list[str]:
        """The lines that the function must contain."""
        return [line[1:] for line in self.lines if not line.startswith("+")]


@dataclass(frozen=True)
class Mutant:
    """A deliberate bug."""

    name: str
    #: what kind of promise it breaks: the name of its file
    group: str
    #: the promise that it breaks, as a sentence
    breaks: str
    #: what a user would notice, as a sentence
    shows: str
    #: the commit that fixed this bug when the kernel had it; empty if the kernel never had it
    commit: str
    #: the variants that can have it
    variants: tuple[str, ...]
    #: why no test can notice it; empty if one can
    equivalent: str
    #: the tests that are run against it in a sample: ids without a kernel's label; empty if it is not in the sample
    sample: tuple[str, ...]
    hunks: tuple[Hunk, ...]
    #: the architecture without which it changes nothing; empty if any will do
    arch: str = ""
    #: how many virtual CPUs a guest needs for a test to notice it
    cpus: int = 1

    def changes(self, arch: str) -> bool:
        """Whether it changes anything on an architecture."""
        return self.arch in ("", arch)

    @property
    def places(self) -> str:
        """The functions that it changes."""
        return ", ".join(dict.fromkeys(f"{hunk.function}()" for hunk in self.hunks))


@dataclass(frozen=True)
class Mutants:
    """The mutants of one variant, ordered by group and name."""

    variant: str
    all: tuple[Mutant, ...]

    def find(self, name: str) -> Mutant:
        """One of them by its name.

        :raises UsageError: if there is none.
        """
        for mutant in self.all:
            if mutant.name == name:
                return mutant
        raise UsageError(f"{self.variant} has no mutant {name}: harness mutants --list shows them")


def load(variant: str, directory: Path = paths.KERNEL_CONFIGS / "mutants") -> Mutants:
    """Read the mutants of a variant.

    :param variant: its name in ``variants.toml``.
    :raises UsageError: if a file has an error, or if the variant has no mutants.
    """
    mutants = [mutant for mutant in read(directory) if variant in mutant.variants]
    if not mutants:
        what = f"the kernel {variant}" if variant else "a kernel that is no variant"
        raise UsageError(f"there are no mutants for {what}: use {' or '.join(_VARIANTS)}")
    return Mutants(variant, tuple(mutants))


def read(directory: Path) -> list[Mutant]:
    """All mutants in a directory.

    :raises UsageError: if a file has an error, or if two mutants have the same name.
    """
    found: dict[str, Mutant] = {}
    for file in sorted(directory.glob("*.toml")):
        try:
            tables = tomllib.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UsageError(f"{file}: {error}") from None
        for name, table in sorted(tables.items()):
            if name in found:
                raise UsageError(f"{file}: there are two mutants {name}")
            try:
                found[name] = _mutant(name, file.stem, table)
            except ValueError as error:
                raise UsageError(f"{file}: {name}: {error}") from None
    return list(found.values())


def _mutant(name: str, group: str, table: Any) -> Mutant:
    if not isinstance(table, dict) or not NAME.fullmatch(name):
        raise ValueError("a mutant is a table, and its name consists of small letters, digits and dashes")
    if unknown := table.keys() - _KEYS:
        raise ValueError(f"unknown keys: {', '.join(sorted(unknown))}")
    for key in ("breaks", "shows", "diff"):
        if not isinstance(table.get(key), str) or not table[key].strip():
            raise ValueError(f"{key!r} is missing")
    variants = tuple(table.get("variants", _VARIANTS))
    if not variants or not set(variants) <= set(_VARIANTS):
        raise ValueError(f"'variants' names {', '.join(_VARIANTS)}, or some of them")
    if table.get("arch", _ARCHES[0]) not in _ARCHES:
        raise ValueError(f"'arch' names one of {', '.join(_ARCHES)}")
    cpus = table.get("cpus", 1)
    if type(cpus) is not int or not 1 <= cpus <= _MOST_CPUS:
        raise ValueError(f"'cpus' is a number from 1 to {_MOST_CPUS}")
    return Mutant(
        name=name,
        group=group,
        breaks=table["breaks"],
        shows=table["shows"],
        commit=table.get("commit", ""),
        variants=variants,
        equivalent=table.get("equivalent", ""),
        sample=tuple(table.get("sample", ())),
        hunks=tuple(_hunks(table["diff"].splitlines())),
        arch=table.get("arch", ""),
        cpus=cpus,
    )


def _hunks(lines: Iterable[str]) -> list[Hunk]:
    hunks: list[Hunk] = []
    for line in lines:
        if heading := _HEADING.fullmatch(line):
            hunks.append(Hunk(heading[1], heading[2], ()))
        elif not hunks:
            raise ValueError("the diff must begin with a line '@@ FILE FUNCTION'")
        elif line and line[0] not in " -+":
            raise ValueError(f"a line of the diff begins neither with a space nor with - or +: {line!r}")
        else:
            last = hunks[-1]
            hunks[-1] = Hunk(last.file, last.function, (*last.lines, line or " "))
    for hunk in hunks:
        if not any(line.startswith("+") and SWITCH in line for line in hunk.lines):
            raise ValueError(f"the hunk of {hunk.function}() adds no line with {SWITCH}: it could not be switched off")
        if not hunk.old:
            raise ValueError(f"the hunk of {hunk.function}() has no line that says where it belongs")
    return hunks
