# SPDX-License-Identifier: GPL-2.0
"""Runs the tests of one kernel in its guests, one at a time, and judges them."""

from __future__ import annotations

import secrets
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import options
from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import GuestLost, HarnessError, LostCondition, ProtocolError
from harness.guests.guest import Guest
from harness.host import safe_text
from harness.judging import console_log, findings
from harness.judging.verdict import Judgement, Observation, Verdict, judge, missed
from harness.machine import payload
from harness.markers import MARKERS
from harness.pytest_plugin import upstream
from harness.pytest_plugin.audits import Audited, Audits, When
from harness.pytest_plugin.pool import Fate, Isolation, Lease, Pool
from harness.pytest_plugin.target import Target
from harness.report import results
from harness.report.results import Facts

#: Bytes of the console shown as evidence. The end is shown: that is where the failure happened.
_SHOWN_CONSOLE = 16 << 10


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How tests get their guests."""

    #: what gets a guest of its own
    isolation: Isolation = "test"
    #: boot guests instead of cloning
    cold: bool = False
    #: keep the guest of a test that fails
    keep: bool = False
    #: when guests are audited
    audit: When = "off"


@dataclass(frozen=True)
class Ran:
    """A test that has run."""

    judgement: Judgement
    #: the conditions it ran under
    facts: Facts
    #: the guest that was kept for a person; None if none was
    kept: Guest | None = None
    #: whether an earlier test has told why this one could not be run
    told: bool = False


class TestRunner:
    """The tests of one kernel.

    :param target: what they run on.
    :param tests: the directory of guest tests.
    :param args: pytest's command line in the guests.
    """

    __test__ = False

    def __init__(self, target: Target, tests: Path, args: list[str], policy: Policy) -> None:
        self.target = target
        self._tests = tests
        self._args = args
        self._policy = policy
        self._opened: tuple[Pool, Audits] | None = None
        #: what :meth:`prepare` got for the next test
        self._ready: Lease | HarnessError | None = None
        #: whether the reason why the target is broken was told in full
        self._told = False

    def prepare(self, item: pytest.Item) -> None:
        """Get a guest for a test, which may take long, before pytest begins to write about the test."""
        self._ready = self._lease(item)

    def run(self, item: pytest.Item, next_item: pytest.Item | None) -> Ran:
        """Run one test.

        :param next_item: what this kernel runs next; None if nothing, or if another kernel's turn comes.
        """
        nodeid = results.test_id(item, str(self._tests.parent))
        lease = self._ready if self._ready is not None else self._lease(item)
        self._ready = None
        if isinstance(lease, GuestLost):
            return Ran(missed(item, str(lease)), self._facts(item))
        if isinstance(lease, HarnessError):
            # A kernel that does not boot will not boot for the next test either. The details are told once.
            told = self._told
            message = str(lease).partition("\n")[0] if told else str(lease)
            self.target.broken, self._told = lease, True
            return Ran(missed(item, message), self._facts(item), told=told)
        pool, _ = self._open()
        if nodeid not in lease.nodeids:
            why = "".join(f"\n{safe_text.escape(error)}" for error in lease.errors)
            pool.settle(lease, Fate.ENDED if lease.scope is None else Fate.SHARED)
            judgement = missed(item, f"{nodeid} was collected on the host but not in the guest{why}")
            return Ran(judgement, self._facts(item))
        following = next_item if next_item is not None and pool.scope(next_item) == lease.scope else None
        if next_item is not None and (following is None or lease.scope is None):
            pool.source.start_ahead()
        seen, audited = self._observe(lease, item, following if lease.scope is not None else None)
        judgement = judge(item, seen)
        lease.taint = seen.taint[1]
        if self._policy.keep and judgement.failed:
            fate = Fate.KEPT
        elif next_item is None or lease.scope is None or not seen.unharmed or judgement.verdict is Verdict.MISS:
            fate = Fate.ENDED
        else:
            fate = Fate.SHARED
        pool.settle(lease, fate)
        return Ran(judgement, self._facts(item, audited), lease.guest if fate is Fate.KEPT else None)

    def end_guests(self) -> None:
        """End the guests in use, those that were kept included."""
        if self._opened is not None:
            self._opened[0].end_all()

    def close(self) -> None:
        """End all guests."""
        if self._opened is not None:
            self._opened[0].close()

    def _lease(self, item: pytest.Item) -> Lease | HarnessError:
        """A guest for a test, or why there is none."""
        try:
            if self.target.broken is not None:
                return self.target.broken
            pool, _ = self._open()
            return pool.lease(pool.scope(item))
        except HarnessError as error:
            return error

    def _open(self) -> tuple[Pool, Audits]:
        """The pool of guests and the audits, made when the first test needs them."""
        if self._opened is None:
            self.target.prepare()
            if self.target.broken is not None:
                raise self.target.broken
            archive = payload.tests_archive(self._tests, MARKERS)
            source = self.target.source(archive, self._args, cold=self._policy.cold)
            auditor = None if self._policy.audit == "off" else self.target.auditor()
            self._opened = Pool(source, self._policy.isolation), Audits(auditor, self._policy.audit)
        return self._opened

    def _observe(self, lease: Lease, item: pytest.Item, next_item: pytest.Item | None) -> tuple[Observation, Audited]:
        pool, audits = self._open()
        guest, root = lease.guest, str(self._tests.parent)
        marker = secrets.token_hex(6)
        next_nodeid = results.test_id(next_item, root) if next_item else ""
        request = protocol.Run(results.test_id(item, root), next_nodeid, marker)
        reports: list[dict[str, Any]] = []
        lost: HarnessError | None = None
        taint = lease.taint
        answer = audits.begin(guest, pool.source.patience.answer)
        try:
            for message in guest.run(request, Deadline.after(self._time_for(item)), answer):
                if isinstance(message, protocol.Finished):
                    taint = message.tainted
                else:
                    reports.append(message)
        except (GuestLost, ProtocolError) as error:
            lost = error
            timed_out = isinstance(error, GuestLost) and error.condition is LostCondition.TEST_TIMEOUT
            if timed_out and not self._policy.keep:
                guest.ask_for_traceback()
        text = safe_text.decode(guest.console_bytes())
        log = console_log.cut(text, marker) + console_log.aftermath(text, marker)
        failed = lost is None and any(each.get("outcome") == "failed" for each in reports)
        audited = audits.end(guest, item.nodeid, pool.source.patience.answer, failed=failed)
        evidence = [*self._evidence(item, log, lease), *audited.evidence]
        return Observation(reports, lost, log, (lease.taint, taint), evidence), audited

    def _time_for(self, item: pytest.Item) -> float:
        """Seconds that a test may take."""
        source = self._open()[0].source
        marker = item.get_closest_marker("guest_timeout")
        race = float(item.config.getoption("race_seconds")) if item.get_closest_marker("storm") else 0.0
        return race + (float(marker.args[0]) * source.slowdown if marker else source.patience.test)

    def _facts(self, item: pytest.Item, audited: Audited | None = None) -> Facts:
        kernel, machine = self.target.kernel, self.target.machine
        obstacles: tuple[str, ...] = ()
        if self._opened is not None:
            pool, audits = self._opened
            obstacles = (*filter(None, [pool.source.obstacle]), *audits.obstacles)
        audited = audited or Audited()
        return Facts(
            label=self.target.label,
            test=results.test_id(item, str(self._tests.parent)),
            guest=self._opened[0].source.origin if self._opened else "",
            release=kernel.release if kernel else "",
            arch=str(kernel.arch) if kernel else "",
            accelerator=machine.accelerator.name if machine else "",
            obstacles=obstacles,
            finding=finding.name if (finding := findings.of(item)) else "",
            audits=audited.count,
            audit_seconds=round(audited.seconds, 3),
            audit_errors=audited.errors,
        )

    def _evidence(self, item: pytest.Item, log: str, lease: Lease) -> list[tuple[str, str]]:
        """Sections for the report of a test that fails."""
        shown = safe_text.escape(log[-_SHOWN_CONSOLE:]) or "(nothing)"
        ready = lease.guest.ready
        assert ready is not None
        kernel = self.target.kernel
        where = f" from {kernel.provenance}" if kernel else ""
        running = safe_text.escape(f"{ready.release}, {ready.machine}")
        facts = [f"kernel:  {running}{where}", *self._open()[0].source.facts(lease.guest)]
        given = options.again(item.config.getoption) + upstream.option(item)
        again = f"{self.target.again}{given} {shlex.quote(selector(item))}"
        return [("kernel console", shown), ("machine", "\n".join(facts)), ("run it again", again)]


def selector(item: pytest.Item) -> str:
    """A test as pytest's command line names it.

    That is its id, unless its file lies outside the root directory: such ids begin at the directory that was collected.
    """
    file, colons, rest = item.nodeid.partition("::")
    return item.nodeid if (item.config.rootpath / file).exists() else f"{item.path}{colons}{rest}"
