# SPDX-License-Identifier: GPL-2.0
"""Findings: kernel bugs that guest tests show, and what is expected of these tests.

A test that shows a finding carries the marker ``finding(name, match=…)`` and fails like any other test: that is its
verdict on the kernel. ``findings.toml`` says what the finding is and which releases have it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from itertools import islice, permutations
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.judging.verdict import AS_WELL

#: The property in which a test says what a program of the explorer showed that failed: the check, and its operations.
_PROGRAM = "program"


@dataclass(frozen=True)
class Range:
    """Releases that have a bug."""

    #: the architectures this is known of
    arch: tuple[str, ...]
    #: the first release that has it; empty if the oldest one that was tried has it
    first: str
    #: the first release without it in each series that was fixed, mainline's last; empty if none is known
    fixed: tuple[str, ...]

    def covers(self, version: str, arch: str) -> bool:
        """Whether a kernel has the bug."""
        here, fixed = _version(version), [_version(each) for each in self.fixed]
        # A fix holds for the later releases of its own stable series. The last one holds for every newer series too.
        is_fixed = any(here >= each and (here[:2] == each[:2] or each == max(fixed)) for each in fixed)
        return arch in self.arch and _version(self.first) <= here and not is_fixed


@dataclass(frozen=True)
class Shape:
    """Programs of the explorer that show a bug, by what all of them have in common."""

    #: the check that notices
    check: str
    #: all of their operations: groups in this order, and those of a group in any order; ``move`` stands for
    #: ``move-grow`` and so on as well, ``write|lock`` for either
    operations: tuple[tuple[str, ...], ...]
    #: whether others may come before, between and behind them
    others: bool = False

    def covers(self, check: str, operations: Sequence[str]) -> bool:
        """Whether a program that a check complains about is one of them."""
        if check != self.check:
            return False
        rest = iter(operations)
        if self.others:
            return all(any(_are([one], group) for one in rest) for group in self.operations)
        if len(operations) != sum(map(len, self.operations)):
            return False
        return all(_are(list(islice(rest, len(group))), group) for group in self.operations)


@dataclass(frozen=True)
class Finding:
    """A kernel bug."""

    name: str
    #: one sentence
    summary: str
    #: why it happens
    cause: str
    #: what a user notices
    effect: str
    #: the arguments of pytest that show it
    command: str
    ranges: tuple[Range, ...]
    shapes: tuple[Shape, ...] = ()
    #: a kernel that shows it, if it takes a configuration that no packaged kernel has; else empty
    kernel: str = ""

    def expected(self, version: str, arch: str) -> bool:
        """Whether a kernel is known to have it."""
        return any(each.covers(version, arch) for each in self.ranges)


def _are(operations: Sequence[str], group: Sequence[str]) -> bool:
    """Whether operations are those of a group, in any order."""
    return any(
        all(_is(one, each) for one, each in zip(operations, order, strict=True)) for order in permutations(group)
    )


def _is(operation: str, kinds: str) -> bool:
    return any(f"{operation}-".startswith(f"{each}-") for each in kinds.split("|"))


def _groups(operations: Sequence[str | Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple((each,) if isinstance(each, str) else tuple(each) for each in operations)


@cache
def known() -> Mapping[str, Finding]:
    """Every finding, by name, in the order of the file."""
    data = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {
        name: Finding(
            name,
            summary=_one_line(each["summary"]),
            cause=_one_line(each["cause"]),
            effect=_one_line(each["effect"]),
            command=each["command"],
            ranges=tuple(Range(tuple(one["arch"]), one["first"], tuple(one["fixed"])) for one in each["range"]),
            shapes=tuple(
                Shape(one["check"], _groups(one["operations"]), one.get("others", False))
                for one in each.get("program", ())
            ),
            kernel=each.get("kernel", ""),
        )
        for name, each in data.items()
    }


def shown_by(check: str, operations: Sequence[str], version: str, arch: str) -> Finding | None:
    """The finding that a program of the explorer shows on a kernel that is known to have it; None if it is new."""
    return next(
        (
            each
            for each in known().values()
            if each.expected(version, arch) and any(one.covers(check, operations) for one in each.shapes)
        ),
        None,
    )


def of(item: pytest.Item) -> Finding | None:
    """The finding that a test shows; None for an ordinary test.

    :raises UsageError: if its marker names no finding.
    """
    marker = item.get_closest_marker("finding")
    if marker is None:
        return None
    name = str(marker.args[0])
    if name not in known():
        raise UsageError(f"{item.nodeid} is marked with finding {name!r}, which harness/judging/findings.toml lacks")
    return known()[name]


class Expect(Enum):
    """What is made of a test that shows a finding."""

    #: if it fails, that is expected
    SHOWS_OR_NOT = auto()
    #: it must fail on the kernels that are known to have the bug, and is an ordinary test on the others
    AS_RECORDED = auto()


def expect(item: pytest.Item, reports: Sequence[pytest.TestReport], version: str, arch: str, expected: Expect) -> None:
    """Change the reports of a test that shows a finding: an expected failure counts as skipped.

    A skip stays a skip. A failure stays a failure unless its message says what the finding says: the marker's
    ``match``, or one of several. The message counts, not the traceback, which shows the source of other messages too.
    Where the kernel complained, its complaint is the message, and not what the test itself says.

    A test of the explorer's programs has no marker. It is an expected failure if each of its programs that failed shows
    a finding that the kernel is known to have.

    :param version: the kernel's upstream version.
    :param arch: the name of its architecture.
    """
    call = next((report for report in reports if report.when == "call"), None)
    if call is None:
        return
    finding = of(item)
    if finding is None:
        shown = _shown_by_programs(call, version, arch)
        if shown:
            _expected(call, shown)
            reports[0].user_properties.append(("finding", shown[0]))
        return
    has_it = finding.expected(version, arch)
    if expected is Expect.AS_RECORDED and not has_it:
        return
    marker = item.get_closest_marker("finding")
    match = marker.kwargs.get("match", "") if marker else ""
    wanted = (match,) if isinstance(match, str) else match
    if call.failed and any(each in _message(call) for each in wanted):
        _expected(call, [finding.name])
    elif call.passed and expected is Expect.AS_RECORDED:
        call.outcome = "failed"
        call.longrepr = (
            f"finding {finding.name} does not show on {version} ({arch}): say in harness/judging/findings.toml "
            "where it was fixed"
        )


def _shown_by_programs(call: pytest.TestReport, version: str, arch: str) -> list[str]:
    """The findings that the explorer's programs of a failed test show; none if one of the programs is new."""
    names = list[str]()
    for key, value in call.user_properties if call.failed else ():
        check, _, operations = str(value).partition(": ")
        if key != _PROGRAM:
            continue
        finding = shown_by(check, operations.split(" / "), version, arch)
        if finding is None or str(value) not in _message(call):
            return []
        names.append(finding.name)
    return list(dict.fromkeys(names))


def _expected(call: pytest.TestReport, names: Sequence[str]) -> None:
    call.outcome = "skipped"
    call.wasxfail = f"finding {', '.join(names)}, see docs/findings.md"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return report.longreprtext.partition(AS_WELL)[0] if crash is None else str(crash.message)


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a release: "6.12.117+deb13" is (6, 12, 117)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
