# SPDX-License-Identifier: GPL-2.0
"""Upstream's tests that can be run here, as ``programs.toml`` lists them.

A test is a program of ``tools/testing/selftests/mm`` with its arguments. Some programs are several tests.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from harness.errors import UsageError

#: what ``--kselftest`` calls all of them
ALL = "mm"

_TABLE = Path(__file__).with_name("programs.toml")


@dataclass(frozen=True)
class Known:
    """A failure that is the test's own fault, or that a small machine or an option causes; with the reason."""

    #: a shell pattern for the names of subtests
    subtest: str
    reason: str
    #: only on guests with at most this many CPUs; 0 for all
    most_cpus: int = 0
    #: only on kernels without this option, without ``CONFIG_``; empty for all
    without: str = ""
    #: only on this machine, as ``uname -m`` says it; empty for all
    machine: str = ""


@dataclass(frozen=True)
class Upstream:
    """One of upstream's tests."""

    name: str
    program: str
    args: tuple[str, ...] = ()
    #: how long it may take with hardware virtualisation, in seconds
    seconds: float = 20.0
    #: memory of the guest in MiB
    memory: int = 0
    cpus: int = 1
    #: NUMA nodes with memory
    nodes: int = 1
    #: options that the kernel must have, without ``CONFIG_``
    config: tuple[str, ...] = ()
    #: what to write to which file before the program runs; a file that the kernel does not have is left out
    settings: Mapping[str, str] = field(default_factory=dict)
    known: tuple[Known, ...] = ()


def load() -> Mapping[str, Upstream]:
    """All tests by name, in the order of the table."""
    return _load()


def choose(wanted: Iterable[str]) -> list[str]:
    """The names of the tests that ``--kselftest`` names, each once, in the order of the table.

    :param wanted: names of tests or of programs, or ``mm`` for all.
    :raises UsageError: if one is none of these.
    """
    tests = load()
    chosen: set[str] = set()
    for each in wanted:
        found = {test.name for test in tests.values() if each in (ALL, test.name, test.program)}
        if not found:
            known = ", ".join(dict.fromkeys(test.program for test in tests.values()))
            raise UsageError(f"there is no upstream test {each!r}: give --kselftest={ALL} for all, or one of {known}")
        chosen |= found
    return [name for name in tests if name in chosen]


def programs() -> list[str]:
    """The programs of all tests, each once."""
    return list(dict.fromkeys(test.program for test in load().values()))


@cache
def _load() -> Mapping[str, Upstream]:
    data: dict[str, dict[str, Any]] = tomllib.loads(_TABLE.read_text())
    return {name: _test(name, each) for name, each in data.items()}


def _test(name: str, fields: dict[str, Any]) -> Upstream:
    lists: dict[str, Any] = {key: tuple(fields[key]) for key in ("args", "config") if key in fields}
    known = tuple(Known(**each) for each in fields.get("known", ()))
    values: dict[str, Any] = {"name": name, "program": name, **fields, **lists, "known": known}
    return Upstream(**values)
