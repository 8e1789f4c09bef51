# SPDX-License-Identifier: GPL-2.0
"""Finds kernel reports, such as oopses and warnings, in console text.

Each one becomes a :class:`Report`: its kind, a title that is the same when it happens again, whether the kernel or a
task died of it, and its lines. The formats are data, see :mod:`harness.judging.console_grammar`. Text with and without
time stamps, caller ids (CONFIG_PRINTK_CALLER), carriage returns and terminal colours is understood.

How lines are combined into reports:

- An oops is one report with everything that it prints: ``kernel BUG at``, ``Oops:``, registers, and the summary after
  the end marker. A panic that follows directly, or that comes in the middle (``panic_on_warn``), belongs to that report
  and makes it fatal. Any other panic is a report of its own.
- A dumped page, a dumped VMA or a bar of equal signs directly above a headline belongs to the report below it.
- Lines that do not look like part of a report never extend one, and several of them in a row end it. So a log that is
  cut off or interleaved does not make reports longer. A marker of the agent ends any report.
- With caller ids (CONFIG_PRINTK_CALLER), lines of another task neither extend nor end a report. Without them, reports
  that two processors print at the same time are not separated.

A guest can print anything. The size of all results is bounded, and titles are escaped. The text of a report is not:
pass it through :func:`harness.host.safe_text.escape` before showing it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from harness.judging import console_grammar as grammar
from harness.judging import titles
from harness.judging.console_grammar import RULES
from harness.judging.console_log import MARKER, caller, clean, is_of, plain, unprefixed
from harness.judging.console_rule import Kind, Rule


@dataclass(frozen=True)
class Report:
    """One complaint of a kernel."""

    kind: Kind
    #: one line in the form that syzbot gives it, so that equal causes have equal titles; escaped
    title: str
    #: the kernel panicked, or a task died inside it: the guest must not be used any more
    fatal: bool
    #: the lines without carriage returns and colours; bounded, not escaped
    text: str
    #: index of the first line in the parsed text, from 0
    line: int


@dataclass(frozen=True)
class Allowance:
    """A report that does not count against a test. Fatal reports are never allowed."""

    kind: Kind
    #: searched in the title
    title: re.Pattern[str]
    reason: str
    #: documentation that explains the reason
    link: str = ""


ALLOWED: tuple[Allowance, ...] = (
    Allowance(
        Kind.OOM_KILL,
        re.compile(r""),
        reason="the limit works as documented; a test that did not expect the kill fails because it lost its process",
        link="Documentation/admin-guide/cgroup-v2.rst",
    ),
)

#: a report has at most this many lines
MAX_LINES = 600
#: a report has at most this many characters
MAX_CHARS = 64 * 1024
#: after this many reports only fatal ones are looked for, so that a flooded console is parsed in seconds
MAX_REPORTS = 1000


def parse(text: str, rules: Sequence[Rule] = RULES) -> list[Report]:
    """All reports in ``text``, in the order in which they begin.

    The text is read once: 64 MiB take a few seconds, whatever the guest printed.

    :param text: console text, see :func:`harness.host.safe_text.decode`.
    :param rules: the grammar; tests leave rules out.
    """
    return list(_Parser(text, rules).reports())


def splats(text: str) -> list[Report]:
    """The reports in ``text`` that make the test fail in which they happened: all but those in :data:`ALLOWED`."""
    return [report for report in parse(text) if not allowed(report)]


def allowed(report: Report) -> Allowance | None:
    """Why ``report`` does not count against a test, or None if it does."""
    if report.fatal:
        return None
    return next((a for a in ALLOWED if a.kind is report.kind and a.title.search(report.title)), None)


@dataclass(frozen=True)
class _Start:
    """A headline that was recognised."""

    rule: Rule
    match: re.Match[str]
    #: line number of the headline
    head: int
    #: line number of "cut here" above the headline, or of the headline
    first: int


class _Parser:
    def __init__(self, text: str, rules: Sequence[Rule]) -> None:
        self.lines = text.split("\n")
        if self.lines[-1] == "":
            self.lines.pop()
        self.rules = [rule for rule in rules if rule.hint in text]

    def reports(self) -> Iterator[Report]:
        rules, found, here, free = self.rules, 0, 0, 0
        may_be_headline = _headline_test(rules)
        while here < len(self.lines):
            if not may_be_headline(self.lines[here]) or (start := self.start(here, rules)) is None:
                here += 1
                continue
            first = self.lead(start.first, free)
            last = self.extent(start, may_be_headline, rules)
            yield self.report(start, first, last)
            here = free = last + 1
            found += 1
            if found == MAX_REPORTS:
                rules = [rule for rule in rules if rule.shape.fatal]
                may_be_headline = _headline_test(rules)

    def start(self, here: int, rules: Sequence[Rule]) -> _Start | None:
        """The report that begins at line ``here``, if one does."""
        start = self.headline(here, rules)
        if start is None or start.rule.start is not grammar.CUT_HERE:
            return start
        for below in range(here + 1, min(here + grammar.CUT_HERE_REACH, len(self.lines))):
            if MARKER.match(clean(self.lines[below])):
                break
            if inner := self.headline(below, rules):
                if inner.rule.shape.end is grammar.END_TRACE and inner.rule.start is not grammar.CUT_HERE:
                    return _Start(inner.rule, inner.match, below, here)
                break
        return start

    def headline(self, here: int, rules: Sequence[Rule]) -> _Start | None:
        line = clean(self.lines[here])
        for rule in rules:
            if rule.hint in line and (match := rule.start.match(line)):
                return _Start(rule, match, here, here)
        return None

    def lead(self, first: int, free: int) -> int:
        """The first of the lines directly above ``first`` that belong to the report, but no line above ``free``."""
        lowest = max(free, first - grammar.LEAD_REACH)
        while first > lowest and grammar.LEAD.match(clean(self.lines[first - 1])):
            first -= 1
        return first

    def extent(self, start: _Start, may_be_headline: Callable[[str], object], rules: Sequence[Rule]) -> int:
        """The last line of the report."""
        shape = start.rule.shape
        end, max_strays, joins = shape.end, shape.max_strays, shape.joins
        last, strays, over = start.head, 0, False
        who = caller(self.lines[start.head])
        for here in range(start.head + 1, min(start.head + MAX_LINES, len(self.lines))):
            line = clean(self.lines[here])
            if MARKER.match(line):
                break
            if grammar.PANIC.match(line):
                end, max_strays = grammar.PANIC_TAIL.end, grammar.PANIC_TAIL.max_strays
                last, strays, over = here, 0, False
            elif not is_of(self.lines[here], who):
                continue
            elif over:
                if not grammar.TRAIL.match(line):
                    break
                last = here
            elif end and end.match(line):
                last, over = here, True
            elif may_be_headline(line) and self.headline(here, rules):
                if not joins or not joins.match(line):
                    break
                last, strays, joins = here, 0, None
            elif not line or line.isspace():
                continue
            elif grammar.BODY.match(line) or grammar.TRAIL.match(line):
                last, strays = here, 0
                if end is None and grammar.TRACE.match(line):
                    max_strays = min(max_strays, 3)  # such a report ends with its stack
            else:
                strays += 1
                if strays > max_strays:
                    break
        return last

    def report(self, start: _Start, first: int, last: int) -> Report:
        lines = [plain(line) for line in self.lines[first : last + 1]]
        body = "\n".join(unprefixed(line) for line in lines)
        who = caller(self.lines[start.head])
        spoken = "\n".join(unprefixed(line) for line in lines[start.head - first :] if is_of(line, who))
        fatal = start.rule.shape.fatal or grammar.DEATHS.search(body) is not None
        return Report(start.rule.kind, titles.title(start.rule, start.match, spoken), fatal, _bounded(lines), first)


def _headline_test(rules: Sequence[Rule]) -> Callable[[str], object]:
    """A function that tells quickly whether a line can be a headline."""
    hints = sorted({rule.hint for rule in rules})
    # A hint that contains another one is not needed.
    hints = [hint for hint in hints if not any(other != hint and other in hint for other in hints)]
    return re.compile("|".join(map(re.escape, hints))).search if hints else lambda line: None


def _bounded(lines: Sequence[str]) -> str:
    kept, size = 0, 0
    for line in lines:
        size += len(line) + 1
        if size > MAX_CHARS:
            break
        kept += 1
    missing = len(lines) - kept
    return "\n".join([*lines[:kept], *([f"[{missing} more lines]"] if missing else [])])
