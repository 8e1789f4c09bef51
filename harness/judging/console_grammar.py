# SPDX-License-Identifier: GPL-2.0
"""The formats of kernel reports, as data: how each kind begins, what its lines look like, and where it ends.

The formats are those of Linux 6.12 to 7.3 on x86-64 and arm64. All expressions are matched against lines without their
prefix, see :func:`harness.judging.console_log.clean`. :mod:`harness.judging.console` applies the table :data:`RULES`.
"""

from __future__ import annotations

import re

from harness.judging.console_rule import Kind, Rule, Shape, Variant
from harness.judging.frames import FN, Choice, Where

PANIC = re.compile(r"Kernel panic - not syncing: ?(?P<what>.*)")
_PANIC_END = re.compile(r"---\[ end Kernel panic|Rebooting in \d")
END_TRACE = re.compile(r"---\[ end trace")
_BAR = re.compile(r"={20,}\s*$")
#: the second headline of an oops: "Oops: Oops: 0002 [#1] SMP", "Internal error: Oops - BUG: 00000000f2000800 [#1]"
_DIES = re.compile(
    r"(?:Internal error: |Oops: )?(?:Oops(?: - |: ))?(?P<what>[\w ]+?)(?:,[^:]*)?: [0-9a-f]{4,16} \[#\d+\]"
)
TRACE = re.compile(r"Call [Tt]race:")
_ACCESS = re.compile(r"^(?P<access>Read|Write|Free) (?:of size|of addr|at addr)", re.M)

#: the function the kernel was in; addresses of user space have another code segment and no symbol
_IP = re.compile(rf"^(?:RIP: 0010:|pc : ){FN}", re.M)
_HEADLINE = re.compile(rf"^.* in {FN}.*", re.M)
_LOCK_AT = re.compile(rf", at: (?:\[<[0-9a-f]+>\] )?{FN}")
#: the frames below an interrupt are those of the task that was interrupted
_INTERRUPT = re.compile(r"^[ \t]+(?:asm_)?(?:sysvec_)?apic_timer_interrupt\+0x.*|^[ \t]+el1h_64_irq\+0x.*", re.M)
_AT_IP = Where((_IP,))
_IN_STACK = Where()
_LOOPS = Where((_IP,), choice=Choice.CALLED)
_LOCK = Where((_LOCK_AT,), choice=Choice.NAMED)

#: 6.12: "WARNING: CPU: 1 PID: 2 at FILE:LINE FN"; 7.3: "WARNING: FILE:LINE at FN, CPU#1: COMM/2"
_WARNING = re.compile(
    r"WARNING: (?:\[.*\] )?(?=CPU: \d+ PID: |at |\S+:\d+ at )(?:CPU: \d+ PID: \d+ )?"
    rf"(?:at )?(?:[^\s:]+:\d+ ?)?(?:at )?(?:{FN})?"
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

_BUGS = (
    Variant(_r(r"at mm/usercopy\.c"), "BUG: bad usercopy in {fn}", Where(skip=_r("usercopy|__check"))),
    Variant(_r(r"at lib/list_debug\.c"), "BUG: corrupted list in {fn}", _IN_STACK),
)
#: warnings whose file says more than their function: these check what another function did
_WARNINGS = (
    Variant(
        _r(r" lib/debugobjects\.c"),
        "WARNING: ODEBUG bug in {fn}",
        Where((_IP,), skip=_r("debug_|rcu|hrtimer_|timer_|work_|percpu_|vunmap|vfree|__free_")),
    ),
    Variant(_r(r" mm/usercopy\.c"), "WARNING: bad usercopy in {fn}", Where((_IP,), skip=_r("usercopy|__check"))),
    Variant(_r(r" lib/kobject\.c"), "WARNING: kobject bug in {fn}", _AT_IP),
    Variant(_r(r" lib/refcount\.c"), "WARNING: refcount bug in {fn}", Where((_IP,), skip=_r("refcount"))),
    Variant(_r(r" kernel/locking/lockdep\.c.*lock_"), "WARNING: locking bug in {fn}", _AT_IP),
    Variant(_r(r" mm/\S+\.c.* k?.?malloc"), "WARNING: kmalloc bug in {fn}", _AT_IP),
    Variant(_r(r" mm/vmalloc\.c.*__vmalloc_node"), "WARNING: zero-size vmalloc in {fn}", _AT_IP),
)
_LOCKS = (
    Variant(
        _r("possible circular locking"),
        "possible deadlock in {fn}",
        Where((_LOCK_AT, _LOCK_AT), None, _r("process_one_work|(?:flush|drain|destroy)_workqueue")),
    ),
    Variant(_r("possible (?:recursive|irq)"), "possible deadlock in {fn}", _LOCK),
    Variant(_r("-safe -> "), "possible deadlock in {fn}", Where(stack=_r("^which became .* at:", re.M))),
    Variant(_r("inconsistent lock state"), "{what} in {fn}", _IN_STACK),
    Variant(_r("suspicious RCU usage"), "WARNING: {what} in {fn}", Where(skip=_r("rcu|kmem|slab"))),
    Variant(_r("bad unlock"), "WARNING: bad unlock balance in {fn}", Where((_r(rf"^\[<[0-9a-f]+>\] {FN}", re.M),))),
    Variant(_r("Nested lock"), "WARNING: nested lock was not taken in {fn}", _LOCK),
)

#: The rules in order: the first one that matches a line decides. Titles have the form that syzbot gives them.
RULES: tuple[Rule, ...] = (
    Rule(
        Kind.PANIC,
        PANIC_TAIL,
        "Kernel panic",
        PANIC,
        "kernel panic: {what}",
        variants=(Variant(_r("Attempted to kill init!"), "kernel panic: Attempted to kill init!"),),
    ),
    Rule(
        Kind.PAGE_TABLE_CHECK,
        _DEATH,
        "kernel BUG at",
        _r(r"kernel BUG at mm/page_table_check\.c:\d+"),
        "kernel BUG in {fn}",
        _AT_IP,
    ),
    Rule(
        Kind.BUG,
        _DEATH,
        "kernel BUG at",
        _r(rf"kernel BUG at (?:\S+:\d+!|{FN})"),
        "kernel BUG in {fn}",
        _AT_IP,
        variants=_BUGS,
    ),
    Rule(
        Kind.OOPS,
        _DEATH,
        "BUG: ",
        _r(r"BUG: (?:unable to handle )?(?:page fault|kernel NULL pointer dereference)(?= for address|, address)"),
        "BUG: unable to handle kernel paging request in {fn}",
        _AT_IP,
        variants=(Variant(_r("NULL"), "BUG: unable to handle kernel NULL pointer dereference in {fn}", _AT_IP),),
    ),
    Rule(
        Kind.OOPS,
        _DEATH,
        " stack guard page",
        _r(r"BUG: \w+ stack guard page was hit"),
        "BUG: stack guard page was hit in {fn}",
        _LOOPS,
    ),
    Rule(
        Kind.OOPS,
        _DEATH,
        "Unable to handle",
        _r(r"Unable to handle (?P<what>kernel .+?) at virtual address"),
        "BUG: unable to handle {what} in {fn}",
        _AT_IP,
    ),
    # Exceptions that print no headline of their own before this line, and logs in which that headline was lost.
    Rule(
        Kind.OOPS,
        _DEATH,
        " [#",
        _DIES,
        "{what} in {fn}",
        _AT_IP,
        variants=(
            Variant(_r("^Internal error"), "Internal error in {fn}", _AT_IP),
            Variant(_r("stack segment"), "stack segment fault in {fn}", _AT_IP),
        ),
    ),
    Rule(
        Kind.KASAN,
        _BARS,
        "BUG: KASAN",
        _r(rf"BUG: KASAN: (?P<what>[\w-]+)(?: in {FN})?"),
        "KASAN: {what} {access} in {fn}",
        Where((_HEADLINE,), skip=_r("kernel_fault|tag_check|mem_abort|^el1h?_")),
        _ACCESS,
        variants=(
            Variant(
                _r("double-free|invalid-free"),
                "KASAN: invalid-free in {fn}",
                Where((_HEADLINE,), skip=_r("slab_|kfree|vunmap|vfree")),
            ),
        ),
    ),
    Rule(
        Kind.KCSAN,
        _BARS,
        "BUG: KCSAN",
        _r(r"BUG: KCSAN: (?P<what>[\w-]+(?:: race)?) in (?P<pair>\w+)[^ ]*(?P<other> / \w+)?"),
        "KCSAN: {what} in {pair}{other}",
    ),
    Rule(
        Kind.KMSAN,
        _BARS,
        "BUG: KMSAN",
        _r(rf"BUG: KMSAN: (?P<what>[\w-]+) in {FN}"),
        "KMSAN: {what} in {fn}",
        Where((_HEADLINE,), None, _r("_encrypt$|^(?:crypto|cipher|drbg|rng)_")),
    ),
    Rule(
        Kind.KFENCE,
        _BARS,
        "BUG: KFENCE",
        _r(rf"BUG: KFENCE: (?P<what>[\w -]+) in {FN}"),
        "KFENCE: {what} in {fn}",
        Where((_HEADLINE,), None),
    ),
    Rule(
        Kind.UBSAN,
        _CUTS,
        "UBSAN: ",
        _r(r"UBSAN: (?P<what>[\w-]+) in \S+:\d+:\d"),
        "UBSAN: {what} in {fn}",
        Where(skip=_r("ubsan|overflow")),
    ),
    Rule(
        Kind.SLUB,
        _PROSE,
        "BUG ",
        _r(r"BUG (?P<cache>[\w.-]+) \((?:Not tainted|Tainted: [^)]*)\): (?P<what>.+)"),
        "SLUB: {what} in {cache}",
    ),
    Rule(
        Kind.SOFT_LOCKUP,
        _STACK,
        "soft lockup",
        _r(r"(?:watchdog: )?BUG: soft lockup"),
        "BUG: soft lockup in {fn}",
        _LOOPS,
    ),
    Rule(
        Kind.HARD_LOCKUP,
        _STACK,
        "hard LOCKUP",
        _r(r"(?:NMI )?(?:watchdog: )?(?:CPU\d+: )?Watchdog detected hard LOCKUP"),
        "hard lockup in {fn}",
        _LOOPS,
    ),
    Rule(
        Kind.RCU_STALL,
        _STACK,
        "INFO: ",
        _r(r"(?:rcu: )?INFO: \w+ (?:self-)?detected (?:expedited )?stalls? on"),
        "INFO: rcu detected stall in {fn}",
        Where((_IP,), skip=_r("apic_timer_interrupt|rcu"), choice=Choice.CALLED, below=_INTERRUPT),
    ),
    Rule(
        Kind.HUNG_TASK,
        _STACK,
        "INFO: task",
        _r(r"INFO: task .{1,40}:\d+ blocked(?: in I/O wait)? for more than"),
        "INFO: task hung in {fn}",
        Where(choice=Choice.WAITS),
    ),
    # Bots group them by where the page was allocated. Only the page owner knows (CONFIG_PAGE_OWNER).
    Rule(
        Kind.BAD_PAGE,
        _STACK,
        "BUG: Bad page",
        _r(r"BUG: (?P<what>Bad page (?:state|cache))"),
        "BUG: {what} in {fn}",
        Where(
            stack=_r("^page last allocated", re.M),
            skip=_r("(?:free|put|get|update|release)_page|free_unref|^_*folio|page_frag_free|alloc|vmap|page_owner"),
        ),
    ),
    Rule(Kind.BAD_PAGE, _STACK, "BUG: Bad ", _r(r"BUG: (?P<what>Bad page map|Bad rss-counter state)"), "BUG: {what}"),
    Rule(
        Kind.BAD_PAGE,
        _LINE,
        "BUG: non-zero",
        _r(r"BUG: (?P<what>non-zero pgtables_bytes on freeing mm)"),
        "BUG: {what}: NUM",
    ),
    Rule(
        Kind.LOCKDEP,
        _STACK,
        "BUG: ",
        _r(
            r"BUG: (?P<what>(?:sleeping function called from invalid|assuming (?:atomic|non migratable)) context)"
            r" at \S+"
        ),
        "BUG: {what} in {fn}",
        _IN_STACK,
    ),
    Rule(
        Kind.LOCKDEP,
        _STACK,
        "BUG: ",
        _r(
            r"BUG: (?P<what>scheduling while atomic|scheduling in a non-blocking section"
            r"|(?:spin|rw)lock [\w ]+?(?= on CPU)|using \w+\(\) in preemptible|workqueue leaked atomic, lock or RCU"
            r"|key \S+ has not been registered|MAX_\w+ too low)"
        ),
        "BUG: {what} in {fn}",
        Where(skip=_r("schedule|spin_|_lock|_unlock|preempt|debug_|processor_id|this_cpu")),
        variants=(
            Variant(
                _r("in preemptible"),
                "BUG: {what} code in {fn}",
                Where(skip=_r("preempt|debug_|processor_id|this_cpu")),
            ),
        ),
    ),
    Rule(
        Kind.LOCKDEP,
        _STACK,
        "INFO: trying",
        _r(r"INFO: (?P<what>trying to register non-static key)"),
        "INFO: {what} in {fn}",
        Where(skip=_r("stack|lock|IRQ")),
    ),
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
        "WARNING: {what}{leak} in {fn}",
        _LOCK,
        variants=_LOCKS,
    ),
    Rule(
        Kind.LOCKDEP,
        _PROSE,
        "BUG: Invalid",
        _r(r"\[ BUG: Invalid wait context \]"),
        "WARNING: locking bug in {fn}",
        Where(skip=_r("lock_sock|release_sock")),
    ),
    Rule(Kind.WARNING, _CUTS, "WARNING: ", _WARNING, "WARNING in {fn}", _AT_IP, variants=_WARNINGS),
    Rule(Kind.LEAK, _LINE, "kmemleak: ", _r(r"kmemleak: \d+ (?P<what>new suspected memory leaks)"), "kmemleak: {what}"),
    Rule(
        Kind.OOM_KILL,
        _KILL,
        "invoked oom-killer",
        _r(r".{1,40} invoked oom-killer: "),
        "OOM kill ({limit})",
        fact=_r(r"^oom-kill:constraint=CONSTRAINT_(?P<limit>\w+)", re.M),
    ),
    # Any other headline with "BUG: ". Must come after the rules whose headlines begin the same way.
    Rule(
        Kind.BUG,
        _STACK,
        "BUG: ",
        _r(r"(?:[\w ]{1,30}: )?BUG: (?P<what>.+)"),
        "BUG: {what}",
        variants=(
            Variant(
                _r("workqueue lockup"),
                "BUG: workqueue lockup in {fn}",
                Where((_r(r"^Workqueue: +\S+ +(?P<fn>\w+)", re.M),), None),
            ),
        ),
    ),
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
        |page\ dumped|page_owner|vma\ |prot\ |pgoff\ |Object\ |Slab\ |Redzone\ |Padding\ |Bytes\ b4|FIX\ |Showing\
        |workqueue\ |pool\ \d
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
