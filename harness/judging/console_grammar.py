# SPDX-License-Identifier: GPL-2.0
"""The formats of kernel reports, as data: how each kind begins, what its lines look like, and where it ends.

The formats are those of Linux 6.12 to 7.3 on x86-64 and arm64. All expressions are matched against lines without their
prefix, see :func:`harness.judging.console_log.clean`. :mod:`harness.judging.console` applies the table :data:`RULES`.
"""

from __future__ import annotations

import re
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
    #: lockdep, and related checks: RCU usage, sleeping in atomic context, spinlock debugging
    LOCKDEP = "lockdep"
    RCU_STALL = "RCU stall"
    SOFT_LOCKUP = "soft lockup"
    HARD_LOCKUP = "hard lockup"
    HUNG_TASK = "hung task"
    BAD_PAGE = "bad page"
    PAGE_TABLE_CHECK = "page table check"
    #: kmemleak
    LEAK = "memory leak"
    #: the OOM killer ended a process: shown, but not a fault of the kernel, see :data:`harness.judging.console.ALLOWED`
    OOM_KILL = "OOM kill"


@dataclass(frozen=True)
class Shape:
    """How a block of lines continues below its headline, and where it ends."""

    #: a block ends after more than this many lines in a row that do not match :data:`BODY`
    max_strays: int
    #: matches the last line; None for reports that have no fixed last line
    end: re.Pattern[str] | None = None
    #: matches a second headline, of another rule, that continues this block; at most one
    joins: re.Pattern[str] | None = None
    #: the kernel, or the task that ran into it, never survives such a report
    fatal: bool = False


@dataclass(frozen=True)
class Rule:
    """How one family of reports is recognised and what its title is."""

    kind: Kind
    shape: Shape
    #: a literal that every such headline contains; lines without it are skipped quickly
    hint: str
    #: matches the headline
    start: re.Pattern[str]
    #: a format string for the title; its fields are the named groups of ``start`` and ``fact``, and numbers in
    #: ``{what}`` are replaced
    title: str
    #: searched in the whole block for further named groups
    fact: re.Pattern[str] | None = None


#: a function name; suffixes such as .constprop.0 and .cold depend on the compiler and are left out
_FN = r"(?P<fn>[A-Za-z_]\w*)(?:\.\w+)*\+0x"
PANIC = re.compile(r"Kernel panic - not syncing: ?(?P<what>.*)")
_PANIC_END = re.compile(r"---\[ end Kernel panic|Rebooting in \d")
END_TRACE = re.compile(r"---\[ end trace")
_BAR = re.compile(r"={20,}\s*$")
#: the second headline of an oops: "Oops: Oops: 0002 [#1] SMP", "Internal error: Oops - BUG: 00000000f2000800 [#1]"
_DIES = re.compile(
    r"(?:Internal error: |Oops: )?(?:Oops(?: - |: ))?(?P<what>[\w ]+?)(?:,[^:]*)?: [0-9a-f]{4,16} \[#\d+\]"
)
TRACE = re.compile(r"Call [Tt]race:")
#: the function the kernel was in; addresses of user space have another code segment and no symbol
_WHERE = re.compile(rf"^(?:RIP: 0010:|pc : ){_FN}", re.M)
_ACCESS = re.compile(r"^(?P<access>Read|Write|Free) (?:of size|of addr|at addr)", re.M)
#: the innermost stack frame that is not part of the scheduler
_BLOCKED_IN = re.compile(rf"^ (?!_*schedule|io_schedule|preempt_schedule|__switch_to|context_switch){_FN}", re.M)
_LOCK_AT = re.compile(rf", at: {_FN}|^(?P<file>\S+\.[ch]:\d+) ", re.M)

#: 6.12: "WARNING: CPU: 1 PID: 2 at FILE:LINE FN"; 7.3: "WARNING: FILE:LINE at FN, CPU#1: COMM/2"
_WARNING = re.compile(
    r"WARNING: (?=CPU: \d+ PID: |at |\S+:\d+ at )(?:CPU: \d+ PID: \d+ )?"
    rf"(?:at )?(?:(?P<site>[^\s:]+:\d+) ?)?(?:at )?(?:{_FN})?"
)
#: the line "------------[ cut here ]------------" above the headline of a WARN() or BUG()
CUT_HERE = re.compile(r"-+\[ cut here \]-+")
#: a headline is looked for in this many lines below "cut here"; the message of a WARN() may stand between
CUT_HERE_REACH = 16

_LINE = Shape(max_strays=0)
_STACK = Shape(max_strays=3)
_PROSE = Shape(max_strays=20)
_BARS = Shape(max_strays=20, end=_BAR)
_CUTS = Shape(max_strays=10, end=END_TRACE)
_DEATH = Shape(max_strays=10, end=END_TRACE, joins=_DIES, fatal=True)
PANIC_TAIL = Shape(max_strays=3, end=_PANIC_END, fatal=True)
_KILL = Shape(max_strays=200, end=re.compile(r".*: Killed process \d+ "))

_r = re.compile
_IN_BUG = "kernel BUG at {site} in {fn}"

#: The rules in order: the first one that matches a line decides.
RULES: tuple[Rule, ...] = (
    Rule(Kind.PANIC, PANIC_TAIL, "Kernel panic", PANIC, "Kernel panic: {what}"),
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
    # Exceptions that print no headline of their own before this line, and logs in which that headline was lost.
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
    # Each is listed by name, because the kernel also prints harmless lines that begin with WARNING.
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
    # Any other headline with "BUG: ". Must come after the rules whose headlines begin the same way.
    Rule(Kind.BUG, _STACK, "BUG: ", _r(r"(?:[\w ]{1,30}: )?BUG: (?P<what>.+)"), "BUG: {what}"),
    # A "cut here" line whose headline was lost. If there is a headline below it, that headline's rule applies.
    Rule(Kind.WARNING, _CUTS, "[ cut here ]", CUT_HERE, "report without a headline"),
)

#: matches the lines of a report below its headline
BODY = re.compile(
    r"""[ \t]+\S                                                    # stack frames, and indented details
    | .*\+0x[0-9a-f]+/0x[0-9a-f]+                                   # anything with the address of a kernel function
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

#: matches lines that may follow the last line of a report and still belong to it
TRAIL = re.compile(
    r"(?:RIP|Code|RSP|R[A-Z0-9]{2}|[CDEFGS]S|CR[0-4]|DR[0-7]|PKRU):|note: \S+\[\d+\] exited|Disabling lock debugging"
)

#: matches lines that may stand directly above a headline and belong to the report
LEAD = re.compile(
    r"={20}|page: ?\S|head: |memcg:|(?:anon |ksm )?flags: |aops:|page_type: |raw: |page dumped because|invalid mapping"
    r"|vma [0-9a-f]{8}|prot [0-9a-f]+ |pgoff [0-9a-f]+ |refcnt [0-9a-f]+|mm [0-9a-f]{8}"
)
#: this many lines above a headline are compared with LEAD
LEAD_REACH = 24

#: matches the lines that make a report fatal, whatever its kind
DEATHS = re.compile(rf"^(?:{_DIES.pattern}|Kernel panic - not syncing|kernel BUG at )", re.M)
