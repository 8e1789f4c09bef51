# SPDX-License-Identifier: GPL-2.0
"""Titles of kernel complaints beside those that syzkaller states for the same logs.

``syzbot_logs/NUMBER.log`` is the file NUMBER of syzkaller's pkg/report/testdata/linux/report, shortened to the lines
that matter to its title. The title that syzkaller states is in its first line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from harness.host.safe_text import decode
from harness.judging import console, frames, titles
from harness.judging.console_grammar import RULES
from harness.judging.console_rule import Kind, Rule
from harness.judging.frames import Choice, Where

LOGS = Path(__file__).parent / "syzbot_logs"

#: titles that differ from the stated ones, and why
DIFFERENT = {
    "arm64-665": ("inconsistent lock state in ntfs_fill_super", "stated before iput() and atomics were skipped"),
    "arm64-727": ("BUG: Bad page state", "corrupted is for bots: arm64 does not print where the page came from"),
    "x86-1002": ("INFO: rcu detected stall", "corrupted is for bots: every frame has a question mark"),
    "x86-590": ("KFENCE: use-after-free read in find_uprobe", "stated before the access became part of the title"),
    "x86-669": ("inconsistent lock state in fs_reclaim_acquire", "stated before the title was taken from the stack"),
    "x86-718": (
        "INFO: rcu detected stall in arch_do_signal_or_restart",
        "corrupted is for bots: the stack of the processor that stalled was not printed in its interrupt",
    ),
    "x86-720": (
        "INFO: rcu detected stall in rtnetlink_rcv_msg",
        "corrupted is for bots: the stack of the task that stalled was not printed in an interrupt",
    ),
}


@dataclass(frozen=True)
class Stated:
    name: str
    title: str
    text: str


def _load(log: Path) -> Stated:
    head, _, text = decode(log.read_bytes()).partition("\n\n")
    return Stated(log.stem, head.split("\n")[0].removeprefix("TITLE: "), text)


STATED = tuple(_load(log) for log in sorted(LOGS.glob("*.log")))
WARN = """\
------------[ cut here ]------------
WARNING: CPU: 0 PID: 7 at {site} {top}+0x1/0x20
RIP: 0010:{top}+0x1/0x20
Call Trace:
 <TASK>
 {between}+0x1/0x20
 move_ptes+0x41c/0x8a0
 </TASK>
"""


HELPERS = [
    ("__queue_delayed_work", "queue_delayed_work_on"),
    ("vsnprintf", "snprintf"),
    ("memcpy", "strscpy"),
    ("__list_add_valid_or_report", "list_add_tail"),
    ("mutex_lock", "down_write"),
    ("__rb_insert_augmented", "rb_insert_color"),
]


def _first(text: str) -> str:
    reports = console.parse(text)
    return reports[0].title if reports else "no report"


def _differing() -> dict[str, tuple[str, str]]:
    ours = {each.name: (_first(each.text), each.title) for each in STATED}
    return {name: (our, stated) for name, (our, stated) in ours.items() if our != stated}


def test_titles_are_those_that_syzkaller_states() -> None:
    differing = _differing()
    listed = "\n".join(f"{name}: {our!r}, stated {stated!r}" for name, (our, stated) in sorted(differing.items()))
    assert {name: our for name, (our, _) in differing.items()} == {name: our for name, (our, _) in DIFFERENT.items()}, (
        f"titles that differ:\n{listed}"
    )


def test_logs_of_all_architectures_are_compared() -> None:
    assert len(STATED) >= 60
    assert {name.name.partition("-")[0] for name in STATED} == {"arm64", "riscv64", "x86"}


@pytest.mark.parametrize(("top", "between"), HELPERS)
def test_helpers_are_not_named(top: str, between: str) -> None:
    assert _first(WARN.format(site="mm/mremap.c:321", top=top, between=between)) == "WARNING in move_ptes"


FOR_OTHERS = [
    ("lib/debugobjects.c:612", "debug_print_object", "__debug_check_no_obj_freed", "WARNING: ODEBUG bug in"),
    ("mm/usercopy.c:86", "usercopy_warn", "__check_object_size", "WARNING: bad usercopy in"),
    ("lib/kobject.c:736", "kobject_put", "kobject_del", "WARNING: kobject bug in"),
    ("lib/refcount.c:28", "refcount_warn_saturate", "refcount_dec", "WARNING: refcount bug in"),
    ("kernel/locking/lockdep.c:4731", "lock_release", "up_write", "WARNING: locking bug in"),
    ("mm/util.c:661", "kvmalloc_node", "__kvmalloc_node_noprof", "WARNING: kmalloc bug in"),
    ("mm/vmalloc.c:3108", "__vmalloc_node_range", "vzalloc", "WARNING: zero-size vmalloc in"),
]


@pytest.mark.parametrize(("site", "top", "between", "title"), FOR_OTHERS)
def test_a_check_of_what_others_do_is_named_after_them(site: str, top: str, between: str, title: str) -> None:
    assert _first(WARN.format(site=site, top=top, between=between)) == f"{title} move_ptes"


BUG = """\
------------[ cut here ]------------
kernel BUG at {site}!
Oops: invalid opcode: 0000 [#1] SMP
RIP: 0010:{top}+0x1/0x20
Call Trace:
 <TASK>
 __check_object_size+0x1/0x20
 move_ptes+0x41c/0x8a0
 </TASK>
---[ end trace 0000000000000000 ]---
"""

LOCKS = {
    "possible deadlock in unlink_anon_vmas": """\
WARNING: possible recursive locking detected
python3/412 is trying to acquire lock:
ffff888002a7c9b0 (&anon_vma->rwsem){++++}-{4:4}, at: unlink_anon_vmas+0x7a/0x2b0
Call Trace:
 move_ptes+0x41c/0x8a0
""",
    "possible deadlock in rmap_walk_ksm": """\
WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected
python3/412 [HC0[0]:SC0[2]:HE1:SE0] is trying to acquire:
ffff888002a7c9b0 (&anon_vma->rwsem){++++}-{4:4}, at: unlink_anon_vmas+0x7a/0x2b0
which became SOFTIRQ-irq-safe at:
  lock_acquire+0xc9/0x2d0
  rmap_walk_ksm+0x2f1/0x3c0
Call Trace:
 move_ptes+0x41c/0x8a0
""",
    "WARNING: bad unlock balance in move_ptes": """\
WARNING: bad unlock balance detected!
python3/412 is trying to release lock (&mm->page_table_lock) at:
[<ffffffff81234567>] move_ptes+0x41c/0x8a0
but there are no more locks to release!
Call Trace:
 unlink_anon_vmas+0x7a/0x2b0
""",
    "WARNING: held lock freed in unlink_anon_vmas": """\
WARNING: held lock freed!
python3/412 is freeing memory ffff888002a7c9b0-ffff888002a7ca00, with a lock still held there!
ffff888002a7c9b0 (&anon_vma->rwsem){++++}-{4:4}, at: unlink_anon_vmas+0x7a/0x2b0
""",
    "WARNING: suspicious RCU usage in move_ptes": """\
WARNING: suspicious RCU usage
mm/ksm.c:3051 suspicious rcu_dereference_check() usage!
Call Trace:
 dump_stack_lvl+0x5d/0x80
 lockdep_rcu_suspicious+0x159/0x1a0
 rcu_helper+0x1/0x2
 move_ptes+0x41c/0x8a0
""",
}


def test_a_bug_found_for_others_is_named_after_them() -> None:
    assert _first(BUG.format(site="mm/usercopy.c:102", top="usercopy_abort")) == "BUG: bad usercopy in move_ptes"
    listed = BUG.format(site="lib/list_debug.c:65", top="__list_del_entry_valid_or_report")
    assert _first(listed) == "BUG: corrupted list in move_ptes"


@pytest.mark.parametrize("title", LOCKS)
def test_locks(title: str) -> None:
    assert _first(LOCKS[title]) == title


DOUBLE_FREE = """\
BUG: KASAN: double-free in kfree+0x1/0x20
Free of addr ffff888012acfc20 by task python3/412
Call Trace:
 kasan_report_invalid_free+0x1/0x20
 kfree+0x1/0x20
 unlink_anon_vmas+0x7a/0x2b0
"""


def test_a_double_free_is_named_after_who_freed() -> None:
    assert _first(DOUBLE_FREE) == "KASAN: invalid-free in unlink_anon_vmas"


PREEMPTIBLE = """\
BUG: using smp_processor_id() in preemptible [00000000] code: python3/412
Call Trace:
 dump_stack_lvl+0x5d/0x80
 check_preemption_disabled+0xd1/0xe0
 move_ptes+0x41c/0x8a0
"""


def test_preemptible_code_is_named_after_its_function() -> None:
    assert _first(PREEMPTIBLE) == "BUG: using smp_processor_id() in preemptible code in move_ptes"


def _all() -> Iterator[str]:
    """Every text here that has a title."""
    yield from (each.text for each in STATED)
    yield from (decode(log.read_bytes()) for log in sorted(LOGS.parent.glob("console_logs/*.log")))
    yield from (*LOCKS.values(), DOUBLE_FREE, PREEMPTIBLE)
    yield from (WARN.format(site=site, top=top, between=between) for site, top, between, _ in FOR_OTHERS)
    yield from (BUG.format(site=site, top="list_add") for site in ("mm/usercopy.c:102", "lib/list_debug.c:65"))
    yield "stack segment: 0000 [#1] SMP\nRIP: 0010:move_ptes+0x1/0x2\n"


def _titles(rules: tuple[Rule, ...]) -> list[str]:
    return [report.title for text in TEXTS for report in console.parse(text, rules)]


TEXTS = tuple(_all())
TITLES = _titles(RULES)
VARIANTS = [(at, which) for at, rule in enumerate(RULES) for which in range(len(rule.variants))]


@pytest.mark.parametrize(("at", "which"), VARIANTS)
def test_no_variant_can_be_removed_unnoticed(at: int, which: int) -> None:
    rule = RULES[at]
    fewer = replace(rule, variants=rule.variants[:which] + rule.variants[which + 1 :])
    assert _titles((*RULES[:at], fewer, *RULES[at + 1 :])) != TITLES, rule.variants[which].title


def test_every_waiting_function_leads_to_one_title() -> None:
    text = "INFO: task python3:412 blocked for more than 120 seconds.\nCall Trace:\n {}+0x1/0x2\n move_ptes+0x1/0x2\n"
    for name in ("synchronize_rcu_expedited", "synchronize_srcu", "synchronize_net"):
        assert _first(text.format(name)) == "INFO: task hung in synchronize_rcu"
    assert _first(text.format("rwsem_down_write_slowpath")) == "INFO: task hung in move_ptes"


@pytest.mark.parametrize("choice", [Choice.CALLED, Choice.WAITS])
def test_what_is_chosen_from_a_stack_matters(choice: Choice) -> None:
    changed = tuple(
        replace(rule, where=replace(rule.where, choice=Choice.FIRST))
        if rule.where and rule.where.choice is choice
        else rule
        for rule in RULES
    )
    assert _titles(changed) != TITLES


def test_a_function_without_a_frame_is_left_out() -> None:
    assert titles.title(RULES[0], _headline("Kernel panic - not syncing: drowned"), "") == "kernel panic: drowned"
    assert frames.function("", Where()) == ""
    assert _first("BUG: kernel NULL pointer dereference, address: 0000000000000018\n") == (
        "BUG: unable to handle kernel NULL pointer dereference"
    )


def _headline(line: str) -> re.Match[str]:
    match = RULES[0].start.match(line)
    assert match
    return match


def test_only_the_first_frames_of_a_stack_are_looked_at() -> None:
    body = "Call Trace:\n" + " memcpy+0x1/0x2\n" * frames.MAX_FRAMES + " move_ptes+0x1/0x2\n"
    assert frames.function(body, Where()) == ""
    assert frames.function(body.replace(" memcpy+0x1/0x2\n", "", 1), Where()) == "move_ptes"
    long = "Call Trace:\n " + "a" * 1_000 + "+0x1/0x2\n"
    assert frames.function(long, Where()) == "a" * frames.MAX_NAME


def test_lines_of_another_task_neither_extend_nor_end_a_report() -> None:
    (each,) = (each for each in STATED if each.name == "arm64-680")
    (report,) = console.parse(each.text)
    assert report.kind is Kind.OOPS
    assert report.text.endswith("Kernel panic - not syncing: Oops: Fatal exception")
    alone = re.sub(r"\[ *T\d+\]", "", each.text)
    assert len(console.parse(alone)) > 1


@pytest.mark.parametrize("subject", frames.SKIPPED)
def test_each_subject_of_skipped_functions_is_needed(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them, a title names a function of that subject."""
    helpers = [WARN.format(site="mm/mremap.c:321", top=top, between=between) for top, between in HELPERS]
    before = [_first(text) for text in (*helpers, *TEXTS)]
    fewer = (each for name, fragments in frames.SKIPPED.items() if name != subject for each in fragments)
    monkeypatch.setattr(frames, "_SKIPPED", re.compile("|".join(fewer)))
    assert [_first(text) for text in (*helpers, *TEXTS)] != before
