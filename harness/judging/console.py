# SPDX-License-Identifier: GPL-2.0
"""Finds what a kernel complains about in its console text, and cuts that text per test. Pure: no files, no clocks.

A complaint ("splat") becomes a :class:`Report`: what kind, one line that stays the same when it happens again, whether
the kernel or a task died of it, and the block of text, bounded. What starts and ends a block is the table
:data:`RULES`; the formats are those of Linux 6.12 to 7.3 on x86-64 and arm64, with or without time stamps, caller ids
(CONFIG_PRINTK_CALLER), carriage returns and terminal colours.

How blocks combine:

- An oops and what it prints on the way down (``kernel BUG at``, ``Oops:``, registers, the summary after the end marker)
  are one report. A panic that follows directly, or in the middle as with ``panic_on_warn``, belongs to that report and
  makes it fatal; any other panic is a report of its own.
- A dumped page, VMA or opening bar right above a headline belongs to the block below it.
- Lines that look like nothing a report prints never extend a block, and a few of them in a row end it, so that a log
  that is cut off or interleaved keeps the blocks short. A marker of ours ends any block.
- Two processors printing at the same time are not told apart.

Console text is a claim of the guest, not a fact: everything is bounded here, and :func:`escape` comes before a terminal
or an XML file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What a report is about; the value is what reports show."""

    PANIC = "panic"
    BUG = "kernel BUG"
    OOPS = "oops"
    WARNING = "warning"
    KASAN = "KASAN"
    KCSAN = "KCSAN"
    KMSAN = "KMSAN"
    KFENCE = "KFENCE"
    UBSAN = "UBSAN"
    SLUB = "SLUB"
    #: lockdep proper, and its neighbours: RCU usage, sleeping in atomic context, spinlock debugging
    LOCKDEP = "lockdep"
    RCU_STALL = "RCU stall"
    SOFT_LOCKUP = "soft lockup"
    HARD_LOCKUP = "hard lockup"
    HUNG_TASK = "hung task"
    BAD_PAGE = "bad page"
    PAGE_TABLE_CHECK = "page table check"
    #: kmemleak
    LEAK = "memory leak"
    #: a process was killed for memory: worth showing, but no fault of the kernel (see :data:`ALLOWED`)
    OOM_KILL = "OOM kill"


@dataclass(frozen=True)
class Report:
    """One complaint of a kernel."""

    kind: Kind
    #: one line without addresses, processor and process numbers: equal for equal causes; already escaped
    title: str
    #: the kernel panicked, or a task died inside it: nothing after this is worth trusting
    fatal: bool
    #: the lines of the block without carriage returns and colours; bounded, not escaped
    text: str
    #: index of the block's first line in the parsed text, from 0
    line: int


@dataclass(frozen=True)
class Shape:
    """How a block goes on below its headline, and where it ends."""

    #: lines in a row that look like no report before the block is given up
    patience: int
    #: the last line; None for reports that just end with a stack
    end: re.Pattern[str] | None = None
    #: headlines of other rules that continue this block, once
    joins: re.Pattern[str] | None = None
    #: the kernel, or the task it ran for, never survives it
    fatal: bool = False


@dataclass(frozen=True)
class Rule:
    """One family of reports: how it is recognised and named."""

    kind: Kind
    shape: Shape
    #: a literal that every such headline contains: most lines are dismissed by it
    hint: str
    #: the headline, without its prefix
    start: re.Pattern[str]
    #: the title, filled from named groups of the headline and of the fact; ``{what}`` loses its numbers
    title: str
    #: searched in the block for more named groups
    fact: re.Pattern[str] | None = None


@dataclass(frozen=True)
class Allowance:
    """A report that does not count against a test. Fatal reports are never allowed."""

    kind: Kind
    #: searched in the title
    title: re.Pattern[str]
    reason: str
    #: where the reason can be read up
    link: str = ""


ALLOWED: tuple[Allowance, ...] = (
    Allowance(
        Kind.OOM_KILL,
        re.compile(r""),
        reason="a limit was kept as documented; a test that did not ask for it fails by losing its process",
        link="Documentation/admin-guide/cgroup-v2.rst",
    ),
)

#: a block keeps at most this many lines …
MAX_LINES = 600
#: … of at most this many characters each …
MAX_COLUMNS = 1024
#: … and this many characters altogether
MAX_CHARS = 64 * 1024
#: after so many reports only fatal kinds are looked for, so that a flood costs seconds
MAX_REPORTS = 1000
#: characters of a title
MAX_TITLE = 200

# ----------------------------------------------------------------------------------------------------------------------
# The grammar

_FN = r"(?P<fn>[A-Za-z_]\w*)(?:\.\w+)*\+0x"  # .constprop.0, .cold and the like come and go with the compiler
_PANIC = re.compile(r"Kernel panic - not syncing: ?(?P<what>.*)")
_PANIC_END = re.compile(r"---\[ end Kernel panic|Rebooting in \d")
_END_TRACE = re.compile(r"---\[ end trace")
_BAR = re.compile(r"={20,}\s*$")
#: the second headline of an oops: "Oops: Oops: 0002 [#1] SMP", "Internal error: Oops - BUG: 00000000f2000800 [#1]"
_DIES = re.compile(
    r"(?:Internal error: |Oops: )?(?:Oops(?: - |: ))?(?P<what>[\w ]+?)(?:,[^:]*)?: [0-9a-f]{4,16} \[#\d+\]"
)
_TRACE = re.compile(r"Call [Tt]race:")
#: where the kernel was; user-space addresses have another code segment and no symbol
_WHERE = re.compile(rf"^(?:RIP: 0010:|pc : ){_FN}", re.M)
_ACCESS = re.compile(r"^(?P<access>Read|Write|Free) (?:of size|of addr|at addr)", re.M)
#: the innermost frame that is not the scheduler's own
_BLOCKED_IN = re.compile(rf"^ (?!_*schedule|io_schedule|preempt_schedule|__switch_to|context_switch){_FN}", re.M)
_LOCK_AT = re.compile(rf", at: {_FN}|^(?P<file>\S+\.[ch]:\d+) ", re.M)
_MARK = re.compile(r"harness: (?P<verb>begin|end) (?P<id>\S{1,128})\s*$")

#: 6.12: "WARNING: CPU: 1 PID: 2 at FILE:LINE FN"; 7.3: "WARNING: FILE:LINE at FN, CPU#1: COMM/2"
_WARNING = re.compile(
    r"WARNING: (?=CPU: \d+ PID: |at |\S+:\d+ at )(?:CPU: \d+ PID: \d+ )?"
    rf"(?:at )?(?:(?P<site>[^\s:]+:\d+) ?)?(?:at )?(?:{_FN})?"
)
_CUT = re.compile(r"-+\[ cut here \]-+")
#: lines between a cut and its headline: the message of a WARN(), mostly one
_CUT_REACH = 16

_LINE = Shape(patience=0)
_STACK = Shape(patience=3)
_PROSE = Shape(patience=20)
_BARS = Shape(patience=20, end=_BAR)
_CUTS = Shape(patience=10, end=_END_TRACE)
_DEATH = Shape(patience=10, end=_END_TRACE, joins=_DIES, fatal=True)
_END = Shape(patience=3, end=_PANIC_END, fatal=True)
_KILL = Shape(patience=200, end=re.compile(r".*: Killed process \d+ "))

_r = re.compile
_IN_BUG = "kernel BUG at {site} in {fn}"

#: In order: the first rule that matches a line decides.
RULES: tuple[Rule, ...] = (
    Rule(Kind.PANIC, _END, "Kernel panic", _PANIC, "Kernel panic: {what}"),
    Rule(
        Kind.PAGE_TABLE_CHECK,
        _DEATH,
        "kernel BUG at",
        _r(r"kernel BUG at (?P<site>mm/page_table_check\.c:\d+)"),
        _IN_BUG,
        _WHERE,
    ),
    Rule(Kind.BUG, _DEATH, "kernel BUG at", _r(rf"kernel BUG at (?:(?P<site>\S+:\d+)!|{_FN})"), _IN_BUG, _WHERE),
    Rule(
        Kind.OOPS,
        _DEATH,
        "BUG: ",
        _r(
            r"BUG: (?:unable to handle )?(?P<what>kernel NULL pointer dereference|page fault|\w+ stack guard page)"
            r"(?= for address|, address| was hit)"
        ),
        "{what} in {fn}",
        _WHERE,
    ),
    Rule(
        Kind.OOPS,
        _DEATH,
        "Unable to handle",
        _r(r"Unable to handle (?P<what>kernel .+?) at virtual address"),
        "{what} in {fn}",
        _WHERE,
    ),
    # The exceptions that have no line of their own before it, and logs that lost that line.
    Rule(Kind.OOPS, _DEATH, " [#", _DIES, "{what} in {fn}", _WHERE),
    Rule(
        Kind.KASAN,
        _BARS,
        "BUG: KASAN",
        _r(rf"BUG: KASAN: (?P<what>[\w-]+)(?: in {_FN})?"),
        "KASAN: {what} {access} in {fn}",
        _ACCESS,
    ),
    Rule(
        Kind.KCSAN,
        _BARS,
        "BUG: KCSAN",
        _r(r"BUG: KCSAN: (?P<what>[\w-]+) in (?P<pair>[\w.]+(?: / [\w.]+)?)"),
        "KCSAN: {what} in {pair}",
    ),
    Rule(Kind.KMSAN, _BARS, "BUG: KMSAN", _r(rf"BUG: KMSAN: (?P<what>[\w-]+) in {_FN}"), "KMSAN: {what} in {fn}"),
    Rule(Kind.KFENCE, _BARS, "BUG: KFENCE", _r(rf"BUG: KFENCE: (?P<what>[\w -]+) in {_FN}"), "KFENCE: {what} in {fn}"),
    Rule(
        Kind.UBSAN, _CUTS, "UBSAN: ", _r(r"UBSAN: (?P<what>[\w-]+) in (?P<site>\S+:\d+):\d"), "UBSAN: {what} in {site}"
    ),
    Rule(
        Kind.SLUB,
        _PROSE,
        "BUG ",
        _r(r"BUG (?P<cache>[\w.-]+) \((?:Not tainted|Tainted: [^)]*)\): (?P<what>.+)"),
        "SLUB: {what} in {cache}",
    ),
    Rule(
        Kind.SOFT_LOCKUP, _STACK, "soft lockup", _r(r"(?:watchdog: )?BUG: soft lockup"), "soft lockup in {fn}", _WHERE
    ),
    Rule(
        Kind.HARD_LOCKUP,
        _STACK,
        "hard LOCKUP",
        _r(r"(?:NMI )?(?:watchdog: )?(?:CPU\d+: )?Watchdog detected hard LOCKUP"),
        "hard lockup in {fn}",
        _WHERE,
    ),
    Rule(
        Kind.RCU_STALL,
        _STACK,
        "INFO: ",
        _r(r"(?:rcu: )?INFO: (?P<flavour>\w+) (?:self-)?detected (?P<what>expedited )?stalls? on"),
        "{flavour} {what}stall in {fn}",
        _WHERE,
    ),
    Rule(
        Kind.HUNG_TASK,
        _STACK,
        "INFO: task",
        _r(r"INFO: task .{1,40}:\d+ blocked(?: in I/O wait)? for more than"),
        "task hung in {fn}",
        _BLOCKED_IN,
    ),
    Rule(
        Kind.BAD_PAGE,
        _STACK,
        "BUG: Bad page",
        _r(r"BUG: (?P<what>Bad page (?:state|cache))"),
        "{what}: {why}",
        _r(r"^page dumped because: (?P<why>.+)", re.M),
    ),
    Rule(
        Kind.BAD_PAGE,
        _STACK,
        "BUG: Bad ",
        _r(
            r"BUG: (?P<what>Bad page map|Bad rss-counter state)"
            r"(?:.*? type:(?P<type>\w+)| in process .*?  (?P<level>p[gmtu4]+[de]):)?"
        ),
        "{what}: {type}{level}",
    ),
    Rule(Kind.BAD_PAGE, _LINE, "BUG: non-zero", _r(r"BUG: (?P<what>non-zero pgtables_bytes on freeing mm)"), "{what}"),
    Rule(
        Kind.LOCKDEP,
        _STACK,
        "BUG: ",
        _r(
            r"BUG: (?P<what>(?:sleeping function called from invalid|assuming (?:atomic|non migratable)) context)"
            r" at (?P<site>\S+)"
        ),
        "{what} at {site}",
    ),
    Rule(
        Kind.LOCKDEP,
        _STACK,
        "BUG: ",
        _r(
            r"BUG: (?P<what>scheduling while atomic|scheduling in a non-blocking section|(?:spin|rw)lock [\w ]+? on CPU"
            r"|using \w+\(\) in preemptible|workqueue leaked atomic, lock or RCU|key \S+ has not been registered"
            r"|MAX_\w+ too low)"
        ),
        "{what}",
    ),
    Rule(Kind.LOCKDEP, _STACK, "INFO: trying", _r(r"INFO: (?P<what>trying to register non-static key)"), "{what}"),
    # By name: the kernel has harmless lines that begin with WARNING as well.
    Rule(
        Kind.LOCKDEP,
        _PROSE,
        "WARNING: ",
        _r(
            r"WARNING: (?P<what>possible [\w ]+ detected|[\w-]+-safe -> [\w-]+-unsafe lock order detected"
            r"|inconsistent lock state|suspicious RCU usage|bad (?:unlock balance|contention) detected"
            r"|held lock freed|lock held when returning to user space|Nested lock was not taken|chain_key collision"
            r")|WARNING: \S+/\d+ (?P<leak>still has locks held)"
        ),
        "{what}{leak} in {fn}{file}",
        _LOCK_AT,
    ),
    Rule(
        Kind.LOCKDEP,
        _PROSE,
        "BUG: Invalid",
        _r(r"\[ BUG: (?P<what>Invalid wait context) \]"),
        "{what} in {fn}",
        _LOCK_AT,
    ),
    Rule(Kind.WARNING, _CUTS, "WARNING: ", _WARNING, "WARNING in {fn} ({site})"),
    Rule(Kind.LEAK, _LINE, "kmemleak: ", _r(r"kmemleak: \d+ (?P<what>new suspected memory leaks)"), "kmemleak: {what}"),
    Rule(
        Kind.OOM_KILL,
        _KILL,
        "invoked oom-killer",
        _r(r".{1,40} invoked oom-killer: "),
        "OOM kill ({limit})",
        _r(r"^oom-kill:constraint=CONSTRAINT_(?P<limit>\w+)", re.M),
    ),
    # Whatever else the kernel calls a bug of its own: after all others that begin so.
    Rule(Kind.BUG, _STACK, "BUG: ", _r(r"(?:[\w ]{1,30}: )?BUG: (?P<what>.+)"), "BUG: {what}"),
    # A cut whose headline was lost: with a headline below it, the headline's rule decides.
    Rule(Kind.WARNING, _CUTS, "[ cut here ]", _CUT, "report without a headline"),
)

#: what the lines of a report look like, below its headline
_BODY = re.compile(
    r"""[ \t]+\S                                                    # frames, and details hung below a line
    | .*\+0x[0-9a-f]+/0x[0-9a-f]+                                   # anything that names a place in the kernel
    | (?:CPU|Tainted|Hardware\ name|Workqueue|Code|Stack|Kernel\ Offset|PHYS_OFFSET|CPU\ features|Memory\ Limit
        |RIP|EIP|RSP|R[A-Z0-9]{2}|[CDEFGS]S|CR[0-4]|DR[0-7]|PKRU|note|rcu|task|page|raw|head|flags|memcg|page_type
        |anon\ flags|ksm\ flags|aops|file|addr|pgd|invalid\ mapping
        |oom_reaper)\b.{0,3}[:=]
    | (?:Modules\ linked\ in|Call\ [Tt]race|Oops|Internal\ error|pstate|pc\ :|lr\ :|sp\ :|pmr:|x\d+\ *:|\#PF|PGD\ |IDT:
        |Mem\ abort|Data\ abort|(?:user|swapper)\ pgtable|\[[0-9a-f]{8,}\]|ESR:|FAR:|---\[|={10}|-{10}
        |page\ dumped|page_owner|vma\ |prot\ |pgoff\ |Object\ |Slab\ |Redzone\ |Padding\ |Bytes\ b4|FIX\ |Showing\ all
        |Sending\ NMI|NMI\ backtrace|SMP:|Shutting\ down\ cpus|Dumping\ ftrace|RCU\ |"echo\ 0|Future\ hung
        |INFO:\ (?:task\ .*\ (?:is\ )?blocked\ on|lockdep\ is|Stall\ ended)|(?:\d+\ |no\ )?locks?\ held\ by
        |stack\ backtrace|preempt_count|in_atomic|Preemption\ disabled|irq\ event|hardirqs|softirqs|other\ info
        |oom-kill:|\[\ *pid|\[\ *\d+\]|Memory\ cgroup|Mem-Info|Node\ \d
        |Allocated\ |Freed\ |The\ buggy|Memory\ state|>)""",
    re.X,
)

#: what may follow the last line of a report and still be part of it
_TRAIL = re.compile(
    r"(?:RIP|Code|RSP|R[A-Z0-9]{2}|[CDEFGS]S|CR[0-4]|DR[0-7]|PKRU):|note: \S+\[\d+\] exited|Disabling lock debugging"
)

#: what may stand right above a headline and be part of the report
_LEAD = re.compile(
    r"={20}|page: ?\S|head: |memcg:|(?:anon |ksm )?flags: |aops:|page_type: |raw: |page dumped because|invalid mapping"
    r"|vma [0-9a-f]{8}|prot [0-9a-f]+ |pgoff [0-9a-f]+ |refcnt [0-9a-f]+|mm [0-9a-f]{8}"
)
_LEAD_REACH = 24

_DEATHS = re.compile(rf"^(?:{_DIES.pattern}|Kernel panic - not syncing|kernel BUG at )", re.M)

# ----------------------------------------------------------------------------------------------------------------------
# Parsing


def parse(text: str, rules: Sequence[Rule] = RULES) -> list[Report]:
    """All reports in ``text``, in the order in which they begin.

    One pass; 64 MiB take a few seconds whatever they hold.

    :param text: console text, see :func:`decode`.
    :param rules: the grammar; another than :data:`RULES` only in tests.
    """
    return list(_Parser(text, rules).reports())


def splats(text: str) -> list[Report]:
    """The reports in ``text`` that count against the test they happened in: all but :data:`ALLOWED`."""
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
    #: line of the headline
    head: int
    #: first line of the block: the headline's, or the cut's above it
    first: int


class _Parser:
    def __init__(self, text: str, rules: Sequence[Rule]) -> None:
        self.lines = text.split("\n")
        if self.lines[-1] == "":
            self.lines.pop()
        self.rules = [rule for rule in rules if rule.hint in text]

    def reports(self) -> Iterator[Report]:
        rules, found, here, free = self.rules, 0, 0, 0
        hot = _finder(rules)
        while here < len(self.lines):
            if not hot(self.lines[here]) or (start := self.start(here, rules)) is None:
                here += 1
                continue
            first = self.lead(start.first, free)
            last = self.extent(start, hot, rules)
            yield self.report(start, first, last)
            here = free = last + 1
            found += 1
            if found == MAX_REPORTS:
                rules = [rule for rule in rules if rule.shape.fatal]
                hot = _finder(rules)

    def start(self, here: int, rules: Sequence[Rule]) -> _Start | None:
        """The report whose block begins at line ``here``, if one does."""
        start = self.headline(here, rules)
        if start is None or start.rule.start is not _CUT:
            return start
        for below in range(here + 1, min(here + _CUT_REACH, len(self.lines))):
            if _MARK.match(_clean(self.lines[below])):
                break
            if inner := self.headline(below, rules):
                if inner.rule.shape.end is _END_TRACE and inner.rule.start is not _CUT:
                    return _Start(inner.rule, inner.match, below, here)
                break
        return start

    def headline(self, here: int, rules: Sequence[Rule]) -> _Start | None:
        line = _clean(self.lines[here])
        for rule in rules:
            if rule.hint in line and (match := rule.start.match(line)):
                return _Start(rule, match, here, here)
        return None

    def lead(self, first: int, free: int) -> int:
        """The first of the lines directly above ``first`` that belong to it, none above ``free``."""
        lowest = max(free, first - _LEAD_REACH)
        while first > lowest and _LEAD.match(_clean(self.lines[first - 1])):
            first -= 1
        return first

    def extent(self, start: _Start, hot: Callable[[str], object], rules: Sequence[Rule]) -> int:
        """The last line of the block."""
        shape = start.rule.shape
        end, patience, joins = shape.end, shape.patience, shape.joins
        last, strays, over = start.head, 0, False
        for here in range(start.head + 1, min(start.head + MAX_LINES, len(self.lines))):
            line = _clean(self.lines[here])
            if _MARK.match(line):
                break
            if _PANIC.match(line):
                end, patience, last, strays, over = _END.end, _END.patience, here, 0, False
            elif over:
                if not _TRAIL.match(line):
                    break
                last = here
            elif end and end.match(line):
                last, over = here, True
            elif hot(line) and self.headline(here, rules):
                if not joins or not joins.match(line):
                    break
                last, strays, joins = here, 0, None
            elif not line or line.isspace():
                continue
            elif _BODY.match(line) or _TRAIL.match(line):
                last, strays = here, 0
                if end is None and _TRACE.match(line):
                    patience = min(patience, 3)  # the stack is the last thing that such a report prints
            else:
                strays += 1
                if strays > patience:
                    break
        return last

    def report(self, start: _Start, first: int, last: int) -> Report:
        lines = [_plain(line) for line in self.lines[first : last + 1]]
        body = "\n".join(_unprefixed(line) for line in lines)
        groups = {name: value or "" for name, value in start.match.groupdict().items()}
        if start.rule.fact and (match := start.rule.fact.search(body)):
            groups |= {name: value for name, value in match.groupdict().items() if value}
        title = _title(start.rule.title, groups)
        fatal = start.rule.shape.fatal or _DEATHS.search(body) is not None
        return Report(start.rule.kind, title, fatal, _bounded(lines), first)


def _finder(rules: Sequence[Rule]) -> Callable[[str], object]:
    """A quick test whether a line can be a headline at all."""
    hints = sorted({rule.hint for rule in rules})
    # A hint that another one is part of adds nothing.
    hints = [hint for hint in hints if not any(other != hint and other in hint for other in hints)]
    return re.compile("|".join(map(re.escape, hints))).search if hints else lambda line: None


_NUMBERS = (
    (re.compile(r"\b0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b"), "N"),
    (re.compile(r"\S{1,40}/\d+(?:/0x[0-9a-f]+)?"), "task"),
    (re.compile(r"\b\d+(?=s?\b)"), "N"),
)


def _title(template: str, groups: dict[str, str]) -> str:
    what = groups.get("what", "")
    for pattern, stable in _NUMBERS:
        what = pattern.sub(stable, what)
    unknown = dict.fromkeys(re.findall(r"{(\w+)}", template), "")
    title = template.format_map(unknown | groups | {"what": what})
    # A log that ended early lacks facts: drop the words that would have introduced them.
    title = re.sub(r" (?:in|at)(?= (?:in|at)\b| ?$| \()| \(\)|:$", "", " ".join(title.split()))
    return escape(title.strip()[:MAX_TITLE])


def _bounded(lines: Sequence[str]) -> str:
    kept, size = 0, 0
    for line in lines:
        size += len(line) + 1
        if size > MAX_CHARS:
            break
        kept += 1
    missing = len(lines) - kept
    return "\n".join([*lines[:kept], *([f"[{missing} more lines]"] if missing else [])])


_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
#: level, time stamp, caller; a time stamp in the middle means that user space left an unfinished line before it
_PREFIX = re.compile(
    r"(?:.{0,200}?(?=\[ {0,4}\d+\.\d{6}\]))?(?:<\d{1,3}>)?(?:\[ {0,4}\d+\.\d{6}\])?(?:\[ *[TC]\d+\])? ?(?:<\d>)?"
)


def _plain(line: str) -> str:
    line = line[:MAX_COLUMNS].rstrip("\r")
    return _ANSI.sub("", line) if "\x1b" in line else line


def _unprefixed(line: str) -> str:
    match = _PREFIX.match(line)
    # Only the prefix takes a space with it: the space that a stack frame begins with has to stay.
    return line[match.end() :] if match and match.end() and not match[0].isspace() else line


def _clean(line: str) -> str:
    return _unprefixed(_plain(line))


# ----------------------------------------------------------------------------------------------------------------------
# Cutting


@dataclass(frozen=True)
class _Mark:
    verb: str
    id: str
    #: offsets of its line and of the line after it
    start: int
    end: int


def begin_marker(id: str) -> str:
    """What the agent writes to /dev/kmsg before the test ``id``: a token without spaces, unique within a boot."""
    return f"harness: begin {id}"


def end_marker(id: str) -> str:
    """What the agent writes to /dev/kmsg after the test ``id``."""
    return f"harness: end {id}"


def cut(text: str, id: str) -> str:
    """The console lines of the test ``id``, without its markers.

    They end at its end marker, at the next test, or where the log ends when the guest died. Where the log lost the
    begin marker (a flooded console drops lines) they begin after the marker before the end marker. Empty if the log
    knows nothing of the test.
    """
    previous = 0
    begun: int | None = None
    for mark in _marks(text):
        if begun is not None:
            return text[begun : mark.start]
        if mark.id == id:
            if mark.verb == "end":
                return text[previous : mark.start]
            begun = mark.end
        previous = mark.end
    return "" if begun is None else text[begun:]


def boot(text: str) -> str:
    """The console lines before the first test."""
    return next((text[: mark.start] for mark in _marks(text)), text)


def aftermath(text: str, id: str) -> str:
    """The console lines between the end of the test ``id`` and the next test: reports that came late."""
    ended: int | None = None
    for mark in _marks(text):
        if ended is not None:
            return text[ended : mark.start]
        if mark.id == id and mark.verb == "end":
            ended = mark.end
    return "" if ended is None else text[ended:]


def _marks(text: str) -> Iterator[_Mark]:
    at = text.find("harness: ")
    while at >= 0:
        start = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = len(text) if end < 0 else end + 1
        # Bounded on both sides: a guest may well print one endless line.
        if end - start <= MAX_COLUMNS and (match := _MARK.match(_clean(text[start:end].rstrip("\n")))):
            yield _Mark(match["verb"], match["id"], start, end)
        at = text.find("harness: ", end)


# ----------------------------------------------------------------------------------------------------------------------
# Making guest text safe to handle


def decode(raw: bytes) -> str:
    """Console bytes as text; bytes that are not UTF-8 become visible ``\\xNN``."""
    return raw.decode("utf-8", errors="backslashreplace")


#: control characters but tab and newline, what reorders or hides text on a terminal, and what XML 1.0 has no place for
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


def escape(text: str, columns: int = 4096) -> str:
    """``text`` made safe for a terminal and for XML.

    Control characters other than tab and newline become visible escapes, carriage returns at line ends vanish, and
    lines longer than ``columns`` characters are cut with a note of how much is missing.
    """
    text = _UNSAFE.sub(_visible, text.replace("\r\n", "\n"))
    if len(text) <= columns:
        return text
    return "\n".join(_clip(line, columns) for line in text.split("\n"))


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _clip(line: str, columns: int) -> str:
    return line if len(line) <= columns else f"{line[:columns]}[… {len(line) - columns} more]"
