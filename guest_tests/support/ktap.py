# SPDX-License-Identifier: GPL-2.0
"""Reads the KTAP that a program prints, line by line.

Documentation/dev-tools/ktap.rst of the kernel defines the format; tools/testing/selftests/kselftest.h and
kselftest_harness.h (Linux 7.3) write it. Nested results are not read: a program's own results count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

#: limits: lines of diagnostics that are kept for a result, and characters of a line
_MOST_LINES: Final = 40
_MOST_CHARACTERS: Final = 400

_VERSION: Final = re.compile(r"(K?TAP) version (\d+)\s*$")
_PLAN: Final = re.compile(r"1\.\.(\d+)\s*(?:#\s*(?i:skip)\b\s*(.*))?$")
_RESULT: Final = re.compile(r"(not )?ok\b(?: +(\d+)\b)?(.*)$")
_DIRECTIVE: Final = re.compile(r"(?:^|\s)#\s*(SKIP|TODO|XFAIL|XPASS|TIMEOUT|ERROR)\b:?\s*(.*)$", re.IGNORECASE)


class Verdict(Enum):
    """What a line says of a subtest."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    #: failed, as the program expects
    XFAILED = "expected to fail"


@dataclass(frozen=True)
class Result:
    """One subtest."""

    number: int
    name: str
    verdict: Verdict
    #: what the line says of a skip or an expected failure
    reason: str
    #: the lines since the last result, without their "# "
    diagnostics: tuple[str, ...]


class Reader:
    """Takes the lines of one program."""

    def __init__(self) -> None:
        #: how many subtests are planned; None as long as that is not said
        self.plan: int | None = None
        #: why the program runs none of its tests; empty if it does
        self.skipped = ""
        #: what the program said when it gave up; empty if it did not
        self.gave_up = ""
        #: subtests that were told of
        self.count = 0
        #: what is no KTAP, in a clause; empty if all is
        self.malformed = ""
        self._version = False
        self._pending: list[str] = []

    @property
    def said(self) -> tuple[str, ...]:
        """The lines since the last result."""
        return tuple(self._pending)

    def line(self, text: str) -> Result | None:
        """Take one line; returns the result if it is one."""
        text = text.rstrip()[:_MOST_CHARACTERS]
        if _VERSION.match(text):
            self._version = True
        elif found := _PLAN.match(text):
            self._planned(int(found[1][:9]), found[2] or "")
        elif text.startswith("Bail out!"):
            self.gave_up = text.removeprefix("Bail out!").strip() or "without a reason"
        elif (found := _RESULT.match(text)) and self._numbered(text, found[2]):
            return self._result(not found[1], found[3].strip())
        elif text:
            self._pending.append(text.removeprefix("#").strip())
            del self._pending[:-_MOST_LINES]
        return None

    def unfinished(self) -> str:
        """What is wrong with the whole, in a clause; empty if nothing is."""
        if self.malformed:
            return self.malformed
        # uffd-wp-mremap of 7.3 leaves out the version, and is understood all the same.
        if not self._version and self.plan is None and not self.count:
            first = f", but {self._pending[0]!r}" if self._pending else ""
            return f"it printed no KTAP{first}"
        if self.plan is None:
            return "it did not say how many subtests it has"
        if self.plan != self.count and not self.skipped:
            return f"it planned {self.plan} subtests and told of {self.count}"
        return ""

    def _planned(self, count: int, reason: str) -> None:
        if self.plan is not None and self.plan != count:
            self.malformed = self.malformed or f"it planned {self.plan} subtests, and then {count}"
        self.plan = count
        if count == 0:
            self.skipped = reason or "it has nothing to run"

    def _numbered(self, text: str, number: str | None) -> bool:
        if number is None or int(number[:9]) != self.count + 1:
            self.malformed = self.malformed or f"subtest {self.count + 1} was due, and it printed {text!r}"
            return False
        self.count += 1
        return True

    def _result(self, ok: bool, text: str) -> Result:
        name, verdict, reason = text.removeprefix("- "), Verdict.PASSED if ok else Verdict.FAILED, ""
        if found := _DIRECTIVE.search(text):
            reason = found[2]
            # kselftest.h puts the directive in front of the name, kselftest_harness.h behind it.
            name = text[: found.start()].removeprefix("- ").strip() or reason
            verdict = {"SKIP": Verdict.SKIPPED, "TODO": Verdict.XFAILED, "XFAIL": Verdict.XFAILED}.get(
                found[1].upper(), verdict
            )
        diagnostics, self._pending = tuple(self._pending), []
        return Result(self.count, name or f"subtest {self.count}", verdict, reason, diagnostics)
