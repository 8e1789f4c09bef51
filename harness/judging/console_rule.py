# SPDX-License-Identifier: GPL-2.0
"""What a rule of the console grammar says: how a kind of report begins, goes on and ends, and how it is called."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from harness.judging.frames import Where


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

    #: a block ends after more than this many lines in a row that do not match ``BODY`` of the grammar
    max_strays: int
    #: matches the last line; None for reports that have no fixed last line
    end: re.Pattern[str] | None = None
    #: matches a second headline, of another rule, that continues this block; at most one
    joins: re.Pattern[str] | None = None
    #: the kernel, or the task that ran into it, never survives such a report
    fatal: bool = False


@dataclass(frozen=True)
class Variant:
    """Some of the headlines of a rule, with a title of their own."""

    #: searched in the headline
    headline: re.Pattern[str]
    #: see :class:`Rule`
    title: str
    where: Where | None = None


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
    #: where ``{fn}`` is looked for; if it is not found there, ``{fn}`` is what ``start`` says
    where: Where | None = None
    #: searched in the whole block for further named groups
    fact: re.Pattern[str] | None = None
    #: headlines that have another title, or another place where ``{fn}`` is looked for; the first that matches decides
    variants: tuple[Variant, ...] = ()
