# SPDX-License-Identifier: GPL-2.0
"""Finds the function that a kernel report is about: the first frame of its stack that says something.

Bots group reports by title, and a title names one function. The topmost frames of a stack belong to the checker that
noticed, to an allocator, or to a helper that everything calls. They are skipped. Which ones is data here: they are the
functions that the titles of syzbot's reports leave out, as far as code without drivers and network calls them.
The source is syzkaller, pkg/report/linux.go, at commit 48e93b3d72c9.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice

#: so many frames are looked at
MAX_FRAMES = 200
#: so many characters of the name of a function are looked at
MAX_NAME = 128
#: a function name; suffixes such as .constprop.0 and .cold depend on the compiler and are left out
FN = r"(?P<fn>[A-Za-z_]\w*)(?:\.\w+)*\+0x"


class Choice(Enum):
    """Which of the frames that are not skipped is taken."""

    #: the first
    FIRST = "first"
    #: the one that a dispatcher called, such as a system call: a loop is seen in any of the functions it calls
    CALLED = "called"
    #: the one that waits, without the functions that implement waiting
    WAITS = "waits"
    #: what the report itself names, even if it would be skipped in a stack
    NAMED = "named"


@dataclass(frozen=True)
class Where:
    """Where the function is looked for."""

    #: each is searched below the one before; its group ``fn`` is a candidate in front of the stack
    firsts: tuple[re.Pattern[str], ...] = ()
    #: the stack begins below a match; None if it begins directly below ``firsts``
    stack: re.Pattern[str] | None = re.compile(r"^Call [Tt]race:", re.M)
    #: found in functions that are skipped besides :data:`SKIPPED`
    skip: re.Pattern[str] | None = None
    choice: Choice = Choice.FIRST
    #: everything is looked for below the first match, if there is one
    below: re.Pattern[str] | None = None


#: fragments of the names of functions that no title names, by subject
SKIPPED: dict[str, tuple[str, ...]] = {
    "checkers": (
        "kasan|hwasan|kmsan|__[am]san|__sanitizer|kcsan_setup_watchpoint|check_(?:memory_region|heap_object|object)",
        "read_word_at_a_time|(?:read|write)_once_.*nocheck|print_(?:address_description|report|usage_bug|tainted)",
        "valid_state|lockdep|print_unlock|imbalance_bug|debug_object|(?:timer|work)_is_static_object|get_taint$",
        "might_(?:fault|sleep|resched)|(?:__|^)fortify_report|seqprop_assert|ref_tracker|assertfail",
    ),
    "traps": (
        "panic|invalid_op|(?:report|fixup)_bug|do_error|_trap$|do_trap|__warn|warn_(?:slowpath|alloc|bogus)",
        "do_(?:kernel|translation)_fault|do_mem_abort|el1_abort|el1h_64_sync(?:_handler)?",
        "(?:show|dump|walk|arch)_stack|dump_backtrace|stack_trace_(?:save|consume_entry)|_indirect_thunk_",
        "show_(?:regs|trace_log|task|state)",
    ),
    "allocators": (
        "alloc_page|k?v?[mzc]alloc|krealloc|kmem_cache|slab_|allocate_slab|alloc_frozen_pages|^kv?free$|kfree_skb",
        "memdup|strn?dup|ida_free|__phys_addr",
    ),
    "locks": (
        "lock_(?:acquire|release|class)|mark_lock|(?:reacquire|mark)_held_locks|raw_spin_rq|bh_(?:en|dis)able",
        "spin_(?:lock|trylock|unlock)|(?:read|write)_(?:lock|trylock|unlock)|owner_on_cpu|osq_(?:un)?lock",
        "^down$|down_(?:read|write|trylock)|up_(?:read|write)|^(?:__|rt_)?mutex_|(?:lock|release)_sock",
        "^(?:un)?lock_page|folio_unlock|(?:trace|lockdep)_(?:hard|soft)irq",
    ),
    "counters and bits": (
        "atomic(?:64)?_(?:dec|inc|read|set|x?or|and|add|sub|fetch|(?:cmp)?xchg|try)|(?:set|clear|change|test)_bit",
        "^(?:refcount|kref|klist|kobject)_|kobject_|^put_device$|drop_nlink|(?:fast_)?dput|^ihold$|^iput(?:_final)?$",
    ),
    "memory and strings": (
        "mem(?:cpy|cmp|set|chr|move)|str(?:n?cmp|[nls]?cpy|scpy|n?len|n?str|chr)|string|pointer|crc_itu_t|^crc\\d+",
        "copy_(?:to|from)_(?:user|iter)|copy_(?:page|folio)_(?:to|from)_iter|^copy(?:in|out)$|(?:put|get)_user",
        "extract_(?:user|iter)_to_sg|(?:read|write)[bwlq]$|logic_(?:in|out)",
    ),
    "lists and trees": ("list_(?:add|del|replace|move|splice)|^(?:__)?rb_|rhashtable_lookup|xas_(?:start|load|find)",),
    "printing": ("s[cn]+printf|kv?asprintf|printk|va_format|hex_dump|dev_(?:info|notice|warn|err|alert|crit|emerg)$",),
    "waiting and work": (
        "__wake_up|^complete$|wait_for_completion|finish_wait|kthread_stop|perf_trace|cleanup_srcu_struct",
        "del_timer|__timer_delete_sync|sk_stop_timer_sync|__mod_timer|lock_timer_base|try_to_grab_pending|insert_work",
        "(?:flush|queue|cancel|destroy|drain)_?_?(?:delayed_)?work|__cancel_work_timer",
    ),
    "the page cache": (
        "folio_alloc|filemap_alloc_folio|__filemap_get_folio|find_or_create_page|do_read_cache_folio|read_cache_page",
        "pagecache_get_page|grab_cache_page_write_begin|find_lock_entries|folio_invalidate|ifs_free|mark_buffer_dirty",
        "iomap_invalidate_folio|truncate_(?:cleanup|inode(?:_partial)?)_folio|truncate_inode_pages_range",
    ),
}
_SKIPPED = re.compile("|".join(each for fragments in SKIPPED.values() for each in fragments))

#: the functions that call what a task was asked to do; whatever loops is below them
_DISPATCHERS = re.compile(
    r"do_(?:fast_)?syscall_|sysenter_dispatch|el0_svc_handler|invoke_syscall|ret_fast_syscall"  # system calls
    r"|process_one_work|do_softirq|call_timer_fn|_run_timers|run_timer_softirq|hrtimer_run|run_ksoftirqd"
    r"|smpboot_thread_fn|^kthread$|start_secondary|cpu_startup_entry|ret_from_fork|tasklet_(?:hi_)?action"
    r"|vfs_(?:iter_)?(?:read|write)|vfs_(?:ioctl|open)|do_iter_(?:read|write)|call_(?:read|write)_iter|ksys_ioctl"
    r"|new_sync_(?:read|write)|do_dentry_open|compat_(?:sys_)?ioctl|^(?:sys_)?(?:ioctl|connect|socketpair)"
    r"|netif_receive_skb|netlink_dump|^(?:setsockopt|listen|accept)$|^(?:__)?sock_(?:sendmsg|recvmsg|release|mmap)"
    r"|^call_mmap|mmap_region|do_mmap|__do_fault|do_page_fault|^page_fault$"
    r"|__fput|task_work_run|exit_to_usermode"
)
#: functions that say what is waited for: the title is the same wherever they are called
_WAITED_FOR = {"synchronize_": "synchronize_rcu", "rtnl_lock": "rtnl_lock"}
_WAITS_FOR = re.compile("synchronize_s?rcu|synchronize_(?:net|sched)|rtnl_lock")
_WAITING = re.compile(
    r"sched|_lock|_slowlock|down|rwsem|completion|kthread|wait|synchronize|context_switch|__switch_to|rcu_barrier"
    r"|cancel_delayed_work"
)
#: what the entry code of system calls puts in front of their names
_WRAPPER = re.compile(r"^(?:__(?:x64|ia32|arm64|se)_|_{2,4}sys_|__do_sys_|k?sys_)")
_FRAME = re.compile(rf"^[ \t]+(?:\[<[0-9a-f]+>\] ?)?{FN}")
#: ends a stack: an empty line, the next stack, or the end of the report
_ENDS = re.compile(r"\s*$|Call [Tt]race:|(?:Allocated|Freed) by |---\[ end|Uninit was")


def function(body: str, where: Where) -> str:
    """The function that a report is about, or an empty string if no frame says it.

    :param body: the report's lines without their prefixes, as one processor printed them.
    """
    if where.choice is Choice.NAMED:
        return next((match["fn"] for first in where.firsts if (match := first.search(body))), "")
    kept = _kept(body, where)
    if where.choice is Choice.CALLED:
        return _called(list(kept))
    if where.choice is Choice.WAITS:
        return _waits(list(kept))
    return next(kept, "")


def _called(found: list[str]) -> str:
    """What a dispatcher called, or the innermost frame if the stack does not reach a dispatcher."""
    before = found[0] if found else ""
    for name in found:
        if "smp_call_function" in name:
            return "smp_call_function"
        if _DISPATCHERS.search(name):
            return before
        before = name
    return found[0] if found else ""


def _waits(found: list[str]) -> str:
    """What is waited for if that has a name of its own, or else the innermost function that does not just wait."""
    for name in found:
        if match := _WAITS_FOR.search(name):
            return next(title for start, title in _WAITED_FOR.items() if match[0].startswith(start))
    return next((name for name in found if not _WAITING.search(name)), "")


def _kept(body: str, where: Where) -> Iterator[str]:
    """The functions that are not skipped, from the innermost on, without the wrappers of system calls."""
    for name in islice(_all(body, where), MAX_FRAMES):
        name = name[:MAX_NAME]
        if not _SKIPPED.search(name) and not (where.skip and where.skip.search(name)):
            yield _WRAPPER.sub("", name)


def _all(body: str, where: Where) -> Iterator[str]:
    """The functions from the innermost on."""
    at = 0
    interrupted = where.below.search(body) if where.below else None
    if interrupted:
        body = body[interrupted.end() :]
    for pattern in where.firsts:
        if match := pattern.search(body, at):
            yield match["fn"]
            at = match.end()
    match = None if where.stack is None or interrupted else where.stack.search(body, at)
    if match:
        at = match.end()
    # A stack without a headline of its own follows what was found before it.
    if at or interrupted:
        yield from _frames(body[at:])


def _frames(text: str) -> Iterator[str]:
    """The frames of the stack that begins below the first line of ``text``; not those with a question mark."""
    begun = False
    for line in text.split("\n")[1:]:
        if match := _FRAME.match(line):
            begun = True
            yield match["fn"]
        elif begun and _ENDS.match(line):
            return
