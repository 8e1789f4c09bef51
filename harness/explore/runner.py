# SPDX-License-Identifier: GPL-2.0
"""Runs programs in a guest, and says what became of them.

Nothing that the guest says is trusted: each message is checked before it is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from harness.deadline import Deadline
from harness.errors import GuestLost, LostCondition, ProtocolError
from harness.explore.plan import Plan
from harness.guests.guest import Guest
from harness.guests.source import GuestSource
from harness.host import safe_text
from harness.judging import console
from harness.programs import language
from harness.programs.language import KINDS, Kind, Program

if TYPE_CHECKING:  # few explorations audit, and drgn takes a third of a second to import
    from harness.audit.live import Auditor

_SERVE: Final = "guest_tests.explorer.serve:main"

#: how long a text of a guest may be, in characters
_MOST_TEXT: Final = 400
#: how many discrepancies of an audit are told
_MOST_ERRORS: Final = 8

#: Ways to lose a guest that say nothing about its kernel.
_OURS: Final = (LostCondition.QEMU_DIED, LostCondition.CONNECTION_LOST)


@dataclass(frozen=True)
class Failure:
    """What went wrong in a program."""

    #: which check noticed: an oracle of the guest, or "audit", "signal", "console" or "lost"
    oracle: str
    #: the process of the program that is concerned
    process: int
    #: the first page concerned; -1 if that is not known
    page: int
    #: one sentence, escaped
    text: str
    #: the kernel's log, if it said something or the guest was lost; escaped
    console: str = ""
    #: what the audit says of the memory that the program left; escaped
    audit: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a user can see of a program."""

    #: how each operation ended
    errors: tuple[int, ...]
    #: the mappings of each process at the end, as text
    mappings: str


@dataclass
class Batch:
    """What became of a row of programs."""

    #: how many of them ran, the one that failed included
    done: int = 0
    failure: Failure | None = None
    #: how often each kind of operation ended with each errno, 0 for success and -1 for skipped
    counts: Counter[tuple[Kind, int]] = field(default_factory=Counter)
    #: how each operation of the last program ended
    errors: list[int] = field(default_factory=list)
    #: the numbers of the plans that did not come true
    untrue: list[int] = field(default_factory=list)
    #: how many pages were seen to move in walks
    walked: int = 0
    #: how many programs the walks could say nothing of, because the control page did not move either
    unable: int = 0
    #: of each program, if that was asked for
    outcomes: list[Outcome] = field(default_factory=list)


class Runner:
    """Runs programs in one guest after the other: a guest that a program has damaged is replaced.

    :param source: gives out the guests.
    :param auditor: audits the memory that some of the programs leave; None for no audits.
    """

    def __init__(self, source: GuestSource, auditor: Auditor | None = None) -> None:
        self._source = source
        self._auditor = auditor
        self._guest: Guest | None = None
        self._read = 0
        #: how many audits there were
        self.audits = 0
        #: the kinds of operations that the kernel has
        self.kinds: tuple[Kind, ...] = ()

    @property
    def audits_programs(self) -> bool:
        """Whether memory is audited that programs leave."""
        return self._auditor is not None

    def open(self) -> None:
        """Get a fresh guest, unless there is one.

        :raises BootError: if the kernel does not reach the agent.
        """
        if self._guest is not None:
            return
        self._guest, _ = self._source.fresh()
        deadline = Deadline.after(self._source.patience.answer)
        self._guest.call(_SERVE, {}, deadline)
        self.kinds = _kinds(self._guest.hear(deadline))
        self._read = len(self._guest.console_bytes())

    def close(self) -> None:
        """End the guest."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    def renew(self) -> None:
        """Replace the guest by a fresh one."""
        self.close()
        self.open()

    def run(
        self,
        programs: Sequence[Program],
        *,
        thorough: bool = False,
        outcomes: bool = False,
        rival: int | None = None,
    ) -> Batch:
        """Run programs one after the other, until one fails.

        :param thorough: look at every byte and at all accounts, which takes several times as long.
        :param outcomes: say what a user can see of each.
        :param rival: have another process race with each program; the number is the seed of its steps.
        :raises GuestLost: if QEMU died, which says nothing about the kernel.
        """
        wire = [language.to_wire(each) for each in programs]
        audit = self._auditor is not None
        order = {"programs": wire, "thorough": thorough, "outcomes": outcomes, "rival": rival, "audit": audit}
        return self._run(order, len(programs))

    def run_plans(self, plans: Sequence[Plan]) -> Batch:
        """Run programs that were worked out. Those that do not come true are to be run again with :meth:`run`.

        A guest announces one plan in ten. If one ends the guest, :attr:`Batch.done` counts up to the one that was
        announced last, and the next nine may have run.
        """
        return self._run({"plans": [each.to_wire() for each in plans]}, len(plans))

    def _run(self, order: dict[str, Any], count: int) -> Batch:
        self.open()
        guest = self._guest
        assert guest is not None
        batch = Batch()
        at, audited = 0, ""
        patience = self._source.patience
        try:
            guest.tell(order, Deadline.after(patience.answer))
            while True:
                said = guest.hear(Deadline.after(patience.test))
                if "at" in said:
                    at = _number(said["at"], count)
                elif "outcome" in said:
                    batch.outcomes.append(_outcome(said["outcome"]))
                elif "audit" in said:
                    audited = self._audit(guest, said["audit"])
                    guest.tell({"stop": bool(audited)}, Deadline.after(patience.answer))
                elif "failed" in said:
                    batch.failure = _failure(said["failed"])
                elif "died" in said:
                    text = f"the process that ran the program ended with {_text(said['died'])}"
                    batch.failure = Failure("signal", 0, -1, text)
                    batch.done = at + 1
                    break
                else:
                    batch.done = _number(said.get("done"), count + 1)
                    batch.untrue = [_number(each, count) for each in _list(said.get("untrue"))]
                    batch.walked = _number(said.get("walked"), 1 << 40)
                    batch.unable = _number(said.get("unable"), 1 << 20)
                    batch.counts = _counts(said.get("counts"))
                    batch.errors = [_number(each, 4096, least=-1) for each in _list(said.get("errors"))]
                    break
        except (GuestLost, ProtocolError) as error:
            if isinstance(error, GuestLost) and error.condition in _OURS:
                raise
            batch.failure = Failure("lost", 0, -1, safe_text.escape(str(error))[:_MOST_TEXT], self._console())
            batch.done = at + 1
            self.close()
            return batch
        if audited:
            batch.failure = replace(batch.failure or Failure("audit", 0, -1, audited.split("\n")[0]), audit=audited)
        complaints = self._complaints()
        if complaints:
            # Which program of several it was is found out by running them one by one.
            batch.failure = Failure("console", 0, -1, complaints[0].title, self._console())
            self.close()
        return batch

    def _audit(self, guest: Guest, pids: Any) -> str:
        """What the audit says is wrong with the memory of processes, one line for each discrepancy.

        :raises HarnessError: if the guest cannot be audited.
        """
        auditor = self._auditor
        if auditor is None or guest.vm is None:
            raise ProtocolError("the guest asks for an audit that nobody ordered")
        wanted = {"pids": [_number(each, 1 << 22) for each in _list(pids)]}
        auditor.fresh()
        found = auditor.audit(guest.vm, "after a program", Deadline.after(self._source.patience.answer), wanted)
        self.audits += 1
        return "\n".join(safe_text.escape(str(each))[:_MOST_TEXT] for each in found.errors[:_MOST_ERRORS])

    def _complaints(self) -> list[console.Report]:
        assert self._guest is not None
        text = safe_text.decode(self._guest.console_bytes()[self._read :])
        return console.splats(text)

    def _console(self) -> str:
        assert self._guest is not None
        return safe_text.escape(safe_text.decode(self._guest.console_bytes()[self._read :])[-8192:])


# --- what a guest says --------------------------------------------------------------------------------------------


def _number(value: Any, limit: int, *, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < limit:
        raise ProtocolError(f"the guest says {_text(value)} where a number below {limit} is expected")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or len(value) > 4096:
        raise ProtocolError(f"the guest says {_text(value)} where a list is expected")
    return value


def _text(value: Any) -> str:
    return safe_text.escape(str(value)).replace("\n", " ")[:_MOST_TEXT]


def _failure(value: Any) -> Failure:
    if not isinstance(value, dict):
        raise ProtocolError(f"the guest says {_text(value)} where a failure is expected")
    page = _number(value.get("page"), 1 << 20)
    return Failure(_text(value.get("oracle"))[:20], _number(value.get("process"), 64), page, _text(value.get("text")))


def _outcome(value: Any) -> Outcome:
    if not isinstance(value, list) or len(value) != 2:
        raise ProtocolError(f"the guest says {_text(value)} where an outcome is expected")
    errors = tuple(_number(each, 4096, least=-1) for each in _list(value[0]))
    processes = ["; ".join(_mapping(each) for each in _list(one)) for one in _list(value[1])]
    return Outcome(errors, " | ".join(processes))


def _mapping(value: Any) -> str:
    start, end, permissions = value if isinstance(value, list) and len(value) == 3 else (None, None, None)
    return f"{_number(start, 1 << 20)}-{_number(end, 1 << 20)} {_text(permissions)[:8]}"


def _counts(value: Any) -> Counter[tuple[Kind, int]]:
    counts: Counter[tuple[Kind, int]] = Counter()
    for each in _list(value):
        kind, error, count = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
        if kind not in KINDS:
            raise ProtocolError(f"the guest counts {_text(each)}")
        counts[Kind(kind), _number(error, 4096, least=-1)] += _number(count, 1 << 40)
    return counts


def _kinds(said: dict[str, Any]) -> tuple[Kind, ...]:
    return tuple(Kind(each) for each in _list(said.get("kinds")) if each in KINDS)
