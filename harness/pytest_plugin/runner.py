# SPDX-License-Identifier: GPL-2.0
"""Runs pytest items in guests of one kernel: which guest an item gets, and what is done when it is lost."""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import GuestLost, HarnessError, LostCondition, ProtocolError, UsageError
from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.host.cache import Progress
from harness.judging import console
from harness.judging.verdict import Observation, Verdict, judge, missed, verdict
from harness.kernels.kernel import BootSpec, Kernel, SshSpec
from harness.machine import payload, provision
from harness.machine.qemu import Machine
from harness.machine.vm import Vm

if TYPE_CHECKING:  # few runs need these, and their imports take a third of a second
    from harness.audit.live import Auditor
    from harness.guests.board import BoardFleet

#: What separates one guest from the next.
Isolation = Literal["test", "module", "kernel"]

#: Bytes of console shown as evidence; the end is where it happened.
_SHOWN_CONSOLE = 16 << 10


@dataclass
class _Current:
    """The guest in use."""

    guest: Guest
    nodeids: frozenset[str]
    #: what went wrong when it collected them
    errors: list[str]
    #: what it is shared by, see Runner._scope
    scope: str | None
    taint: int


class Runner:
    """Everything about one kernel of the run.

    :param spec: which kernel.
    :param options: about its machines.
    :param tests: the directory of guest tests.
    :param isolation: how often a fresh guest is taken.
    :param cold: boot instead of cloning.
    :param keep: do not end the guest of a test that fails.
    :param pytest_args: for the guest's pytest.
    :param markers: the registered markers.
    :param audit: "off", or when the guests' memory is audited: at the "end" of tests that move it, or at "each-move".
    """

    def __init__(
        self,
        spec: BootSpec | SshSpec,
        options: provision.Options,
        tests: Path,
        *,
        isolation: Isolation,
        cold: bool,
        keep: bool,
        pytest_args: list[str],
        markers: list[str],
        progress: Progress,
        audit: str = "off",
    ) -> None:
        self.spec = spec
        self._options = options
        self._tests = tests
        self._isolation = isolation
        self._cold = cold
        self._keep = keep
        self._args = pytest_args
        self._markers = markers
        self._progress = progress
        self._audit = audit
        #: by scope: one that shared tests share, which waits while an isolated test has its own
        self._guests: dict[str | None, _Current] = {}
        self._broken: HarnessError | None = None
        self._told = False
        #: the guest of a failed test, if such guests are kept; the caller stops asking for more
        self.kept: Guest | None = None

    @cached_property
    def provisioned(self) -> tuple[Kernel, Machine]:
        """The kernel and its machine; fetched on first use. Only for what is booted."""
        assert isinstance(self.spec, BootSpec)
        return provision.provision(self.spec, self._options, self._progress)

    def provision(self) -> None:
        """Fetch what is needed now. Trouble other than a wrong request is kept, for the tests to report.

        :raises UsageError: if there is no such kernel.
        """
        if isinstance(self.spec, SshSpec):
            return
        try:
            _ = self.provisioned
        except UsageError:
            raise
        except HarnessError as error:
            self._broken = error

    @cached_property
    def fleet(self) -> Fleet | BoardFleet:
        """Where guests come from."""
        tests = payload.tests_archive(self._tests, self._markers)
        if isinstance(self.spec, SshSpec):
            from harness.guests.board import BoardFleet

            return BoardFleet(self.spec, tests, self._args, self._progress)
        _, machine = self.provisioned
        return Fleet(machine, tests, self._args, self._cold, self._progress)

    @cached_property
    def auditor(self) -> Auditor:
        """Audits the guests' memory, if this was asked for and the kernel's debug information can be had."""
        if self._audit == "off" or not isinstance(self.spec, BootSpec):
            from harness.audit.live import Auditor

            return Auditor("no audit was asked for: give --audit=end or --audit=each-move")
        from harness.audit import live

        return live.auditor(self.provisioned[0], self._options, self._progress)

    def run(self, item: pytest.Item, next_item: pytest.Item | None) -> list[pytest.TestReport]:
        """Run one item, and say what came of it.

        :param next_item: what this kernel runs next; None if nothing, or another kernel's turn comes.
        """
        try:
            if self._broken is not None:
                raise self._broken
            current = self._guest_for(self._scope(item))
        except GuestLost as error:
            return missed(item, str(error))
        except HarnessError as error:
            # A kernel that does not boot will not boot for the next test either. Details are told once.
            message = str(error).partition("\n")[0] if self._told else str(error)
            self._broken, self._told = error, True
            return missed(item, message)
        nodeid = self._guest_nodeid(item)
        if nodeid not in current.nodeids:
            why = "".join(f"\n{console.escape(error)}" for error in current.errors)
            return missed(item, f"{nodeid} was collected on the host but not in the guest{why}", facts=self._facts)
        following = next_item if next_item is not None and self._scope(next_item) == current.scope else None
        if next_item is not None and (following is None or current.scope is None):
            self.fleet.start_ahead()
        seen = self._observe(current, item, following if current.scope is not None else None)
        reports = judge(item, seen)
        if self._keep and any(report.failed for report in reports):
            self.kept = current.guest
        elif next_item is None or current.scope is None or not seen.unharmed or verdict(reports) == Verdict.MISS:
            self._drop(current)
        else:
            current.taint = seen.taint[1]
        return reports

    @property
    def release(self) -> str:
        """The kernel's release; empty while it is not known."""
        return self.provisioned[0].release if "provisioned" in vars(self) else ""

    def let_go(self) -> None:
        """End the guest that was kept, if there is one."""
        if self.kept is not None:
            self.kept = None
            self._drop_all()

    def close(self) -> None:
        """End all guests."""
        self._drop_all()
        if "fleet" in self.__dict__:
            self.fleet.close()

    def _guest_for(self, scope: str | None) -> _Current:
        """The guest that tests of this scope share, or a fresh one."""
        if scope is not None and scope in self._guests:
            return self._guests[scope]
        if self._isolation == "module":
            self._drop_all()  # its module is over
        guest, collected = self.fleet.fresh()
        assert guest.ready is not None
        current = _Current(guest, frozenset(collected.nodeids), collected.errors, scope, guest.ready.tainted)
        self._guests[scope] = current
        return current

    def _scope(self, item: pytest.Item) -> str | None:
        """What the guest that runs ``item`` may be shared with; None for nothing."""
        if self._isolation == "kernel":
            return ""
        if self._isolation == "module":
            return str(item.path)
        return "shared" if item.get_closest_marker("shared_guest") else None

    def _observe(self, current: _Current, item: pytest.Item, next_item: pytest.Item | None) -> Observation:
        guest = current.guest
        marker = secrets.token_hex(6)
        run = protocol.Run(self._guest_nodeid(item), self._guest_nodeid(next_item) if next_item else "", marker)
        reports: list[dict[str, Any]] = []
        lost: HarnessError | None = None
        after = current.taint
        try:
            for answer in guest.run(run, Deadline.after(self._time_for(item)), self._answer_audit(guest)):
                if isinstance(answer, protocol.Finished):
                    after = answer.tainted
                else:
                    reports.append(answer)
        except (GuestLost, ProtocolError) as error:
            lost = error
            if isinstance(error, GuestLost) and error.condition is LostCondition.TEST_TIMEOUT and not self._keep:
                guest.ask_for_traceback()
        text = console.decode(guest.vm.console_bytes())
        log = console.cut(text, marker) + console.aftermath(text, marker)
        facts, audits = self._audits(
            item, guest, lost is None and any(each.get("outcome") == "failed" for each in reports)
        )
        evidence = self._evidence(item, log, guest) + audits
        return Observation(reports, lost, log, (current.taint, after), evidence, self._facts + facts)

    def _answer_audit(self, guest: Guest) -> Callable[[protocol.Audit], protocol.Audited]:
        if self._audit != "off":
            self.auditor.fresh()
        return lambda request: self.auditor.answer(guest.vm, request, Deadline.after(self.fleet.patience.answer))

    def _audits(
        self, item: pytest.Item, guest: Guest, failed: bool
    ) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """What came of the audits of a test, as properties and evidence; one more after a failure."""
        if self._audit == "off" or not self.auditor.able or not isinstance(guest.vm, Vm):
            return [], []
        auditor = self.auditor
        text = ""
        if failed:
            try:
                auditor.audit(guest.vm, "after the failure", Deadline.after(self.fleet.patience.answer))
            except HarnessError as error:
                text = f"the guest cannot be audited any more: {error}\n"
        wrong = sum(len(found.errors) + found.unlisted for _, found in auditor.done)
        text += "\n".join(f"{label}: {console.escape(found.report())}" for label, found in auditor.done)
        if (failed or wrong or self._audit == "each-move") and (path := auditor.save_picture(item.nodeid)):
            text += f"\ndrawn in {path}"
        return [("audits", f"{len(auditor.done)} in {auditor.seconds:.1f} s"), ("audit findings", str(wrong))], [
            ("audit of memory", text)
        ]

    def _time_for(self, item: pytest.Item) -> float:
        marker = item.get_closest_marker("guest_timeout")
        patience = self.fleet.patience
        return float(marker.args[0]) * self.fleet.slowdown if marker else patience.test

    @property
    def _facts(self) -> list[tuple[str, str]]:
        """Properties of every report."""
        facts = [("guest", self.fleet.origin)]
        if isinstance(self.spec, BootSpec):
            kernel, machine = self.provisioned
            facts += [("kernel", kernel.release), ("arch", str(kernel.arch))]
            facts += [("accelerator", machine.accelerator.name)]
        if self.fleet.obstacle:
            facts.append((OBSTACLE, self.fleet.obstacle))
        if self._audit != "off" and not self.auditor.able:
            facts.append((OBSTACLE, f"cannot audit: {self.auditor.obstacle}"))
        return facts

    def _evidence(self, item: pytest.Item, log: str, guest: Guest) -> list[tuple[str, str]]:
        shown = console.escape(log[-_SHOWN_CONSOLE:]) or "(nothing)"
        assert guest.ready is not None
        where = f" from {self.provisioned[0].provenance}" if isinstance(self.spec, BootSpec) else ""
        running = console.escape(f"{guest.ready.release}, {guest.ready.machine}")
        facts = [f"kernel:  {running}{where}", *self.fleet.facts(guest)]
        again = f"{self.again} {shlex.quote(item.nodeid)}"
        return [("kernel console", shown), ("machine", "\n".join(facts)), ("run it again", again)]

    def _guest_nodeid(self, item: pytest.Item) -> str:
        """The item's id inside the guest, where no parameter names the kernel and paths start at the tests."""
        path = item.path.relative_to(self._tests.parent).as_posix()
        head, bracket, parameters = item.nodeid.partition("::")[2].partition("[")
        rest = parameters.removesuffix("]").removeprefix(kernel_label(item)).removeprefix("-")
        return f"{path}::{head}[{rest}]" if bracket and rest else f"{path}::{head}"

    @property
    def again(self) -> str:
        """The command line that selects this kernel once more."""
        append = f" --append={shlex.quote(self._options.append)}" if self._options.append else ""
        arch = f" --arch={self.spec.arch}" if self.spec.arch else ""
        return f"pytest --kernel={shlex.quote(self.spec.text)}{arch}{append}"

    def _drop(self, current: _Current) -> None:
        del self._guests[current.scope]
        current.guest.vm.close()

    def _drop_all(self) -> None:
        for current in list(self._guests.values()):
            self._drop(current)


def kernel_label(item: pytest.Item) -> str:
    """The label of the kernel an item is for; empty if it is no guest test."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get(KERNEL_PARAMETER, "")) if callspec else ""


#: The property that says why guests were booted although they were to be cloned.
OBSTACLE = "obstacle"

#: The name of the parameter that multiplies guest tests by kernels.
KERNEL_PARAMETER = "_kernel"
