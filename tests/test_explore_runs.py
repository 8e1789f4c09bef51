# SPDX-License-Identifier: GPL-2.0
"""How the explorer deals with guests, and what it makes of failures, without a guest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from harness.agent import protocol
from harness.audit.discrepancies import Discrepancy, DiscrepancyKind, Severity
from harness.audit.result import Audit, Counts
from harness.deadline import Deadline
from harness.errors import GuestLost, LostCondition, ProtocolError
from harness.explore import campaign, files
from harness.explore.campaign import Campaign, Found, Progress
from harness.explore.plan import Plan
from harness.explore.runner import Batch, Failure, Runner
from harness.guests.guest import Guest, Patience
from harness.guests.source import GuestSource
from harness.judging import findings
from harness.programs.language import Kind, Operation, Program

if TYPE_CHECKING:
    from harness.audit.live import Auditor

PROGRAMS: list[Program] = [(Operation(Kind.MAP),)] * 5
DONE: dict[str, Any] = {"done": 5, "counts": [["map", 0, 5]], "errors": [0], "untrue": [], "walked": 7, "unable": 0}


class FakeGuest:
    """Says what a test wants it to say."""

    vm = object()

    def __init__(self, said: Sequence[dict[str, Any] | Exception], console: bytes) -> None:
        self._said = iter([{"kinds": ["map", "no-such-kind"]}, *said])
        self._console = console
        self._asked = 0
        self.told: list[dict[str, Any]] = []

    def call(self, *_: object) -> None:
        pass

    def tell(self, data: dict[str, Any], _: Deadline) -> None:
        self.told.append(data)

    def hear(self, _: Deadline) -> dict[str, Any]:
        said = next(self._said)
        if isinstance(said, Exception):
            raise said
        return said

    def console_bytes(self) -> bytes:
        self._asked += 1
        return b"" if self._asked == 1 else self._console

    def close(self) -> None:
        pass


class FakeSource:
    """Gives out such guests."""

    patience = Patience.scaled(1)

    def __init__(self, *said: dict[str, Any] | Exception, console: bytes = b"") -> None:
        self._said, self._console = said, console
        self.given = 0
        self.guest = FakeGuest((), b"")

    def fresh(self) -> tuple[Guest, protocol.Collected]:
        self.given += 1
        self.guest = FakeGuest(self._said, self._console)
        return cast(Guest, self.guest), protocol.Collected([], [])


def _run(*said: dict[str, Any] | Exception, console: bytes = b"") -> Batch:
    return Runner(cast(GuestSource, FakeSource(*said, console=console))).run(PROGRAMS)


# --- what a guest says -------------------------------------------------------------------------------------------


def test_programs_that_pass_are_counted() -> None:
    batch = _run({"at": 0}, {"at": 4}, DONE)
    assert (batch.done, batch.failure, batch.walked) == (5, None, 7)
    assert batch.counts[Kind.MAP, 0] == 5


def test_kinds_that_nobody_knows_are_ignored() -> None:
    runner = Runner(cast(GuestSource, FakeSource()))
    runner.open()
    assert runner.kinds == (Kind.MAP,)


def test_a_failure_is_told_with_its_program() -> None:
    failed = {"oracle": "walk", "process": 1, "page": 48, "text": "page 48 \x1b[2J is lost"}
    batch = _run({"at": 2}, {"failed": failed}, {**DONE, "done": 3})
    assert batch.done == 3
    assert batch.failure == Failure("walk", 1, 48, "page 48 \\x1b[2J is lost")


@pytest.mark.parametrize("condition", [LostCondition.PANIC, LostCondition.HANG, LostCondition.TEST_TIMEOUT])
def test_a_guest_that_dies_names_the_program_that_was_announced(condition: LostCondition) -> None:
    batch = _run({"at": 0}, {"at": 3}, GuestLost(condition, "the kernel panicked"), console=b"Kernel panic\n")
    assert batch.done == 4
    assert batch.failure is not None
    assert (batch.failure.oracle, batch.failure.console) == ("lost", "Kernel panic\n")


def test_a_guest_that_was_lost_is_replaced() -> None:
    source = FakeSource({"at": 0}, GuestLost(LostCondition.PANIC, "the kernel panicked"))
    runner = Runner(cast(GuestSource, source))
    runner.run(PROGRAMS)
    runner.run(PROGRAMS)
    assert source.given == 2


def test_the_death_of_qemu_is_no_failure_of_the_kernel() -> None:
    with pytest.raises(GuestLost):
        _run({"at": 0}, GuestLost(LostCondition.QEMU_DIED, "QEMU was killed"))


def test_a_program_that_ends_its_process_is_told() -> None:
    batch = _run({"at": 1}, {"died": "signal 11"})
    assert batch.done == 2
    assert batch.failure is not None
    assert (batch.failure.oracle, "signal 11" in batch.failure.text) == ("signal", True)


def test_a_complaint_on_the_console_is_a_failure() -> None:
    bug = (
        b"[   10.000000] ------------[ cut here ]------------\n"
        b"[   10.000001] WARNING: CPU: 0 PID: 77 at mm/rmap.c:444 unlink_anon_vmas+0x1b0/0x1d0\n"
        b"[   10.000002] ---[ end trace 0000000000000000 ]---\n"
    )
    batch = _run({"at": 4}, DONE, console=bug)
    assert batch.failure is not None
    assert batch.failure.oracle == "console"


@pytest.mark.parametrize(
    "said",
    [
        {"at": 5},
        {"at": -1},
        {"at": True},
        {"at": "1"},
        {"failed": None},
        {"failed": {"oracle": "walk", "process": 0, "page": -1, "text": ""}},
        {**DONE, "counts": [["map", 0]]},
        {**DONE, "counts": [["explode", 0, 1]]},
        {**DONE, "errors": 7},
        {**DONE, "untrue": [9]},
        {},
    ],
)
def test_nonsense_of_a_guest_is_refused(said: dict[str, Any]) -> None:
    batch = _run(said)
    assert batch.failure is not None
    assert batch.failure.oracle == "lost"
    assert "the guest" in batch.failure.text


# --- audits ---------------------------------------------------------------------------------------------------------

LOST = Discrepancy(DiscrepancyKind.UNREACHABLE, Severity.ERROR, "a[7]", "1-2", 4096, 9, "", "", "nobody finds frame 9")
LATER = replace(LOST, severity=Severity.NOTE, sentence="this goes away")


class FakeAuditor:
    """Finds what a test wants it to find."""

    def __init__(self, *found: Discrepancy) -> None:
        self._found = found
        self.asked: list[Any] = []

    def fresh(self) -> None:
        pass

    def audit(self, _vm: object, _label: str, _deadline: Deadline, wanted: dict[str, Any]) -> Audit:
        self.asked.append(wanted)
        return Audit("7.3", "x86_64", Counts(), self._found, 0)


def _audited(auditor: FakeAuditor, *said: dict[str, Any]) -> tuple[Batch, FakeGuest]:
    source = FakeSource(*said)
    batch = Runner(cast(GuestSource, source), cast("Auditor", auditor)).run(PROGRAMS)
    return batch, source.guest


def test_a_guest_waits_while_the_processes_of_a_program_are_audited() -> None:
    auditor = FakeAuditor(LATER)
    batch, guest = _audited(auditor, {"at": 4}, {"audit": [7, 8]}, DONE)
    assert auditor.asked == [{"pids": [7, 8]}]
    assert guest.told[0]["audit"] is True
    assert guest.told[1:] == [{"stop": False}]
    assert batch.failure is None, "a note of the audit is no failure"


def test_what_the_audit_finds_is_a_failure_of_the_program_and_ends_the_batch() -> None:
    batch, guest = _audited(FakeAuditor(LOST, LATER), {"at": 2}, {"audit": [7]}, {**DONE, "done": 3})
    assert guest.told[-1] == {"stop": True}
    assert batch.done == 3
    assert batch.failure is not None
    assert (batch.failure.oracle, batch.failure.text) == ("audit", str(LOST))


def test_the_words_of_the_audit_are_told_with_what_another_check_noticed() -> None:
    failed = {"oracle": "walk", "process": 0, "page": 48, "text": "page 48 is lost"}
    batch, _ = _audited(FakeAuditor(LOST), {"at": 2}, {"audit": [7]}, {"failed": failed}, {**DONE, "done": 3})
    assert batch.failure == Failure("walk", 0, 48, "page 48 is lost", audit=str(LOST))


@pytest.mark.parametrize("pids", [None, ["x"], [-1], 7])
def test_an_audit_of_nonsense_is_refused(pids: Any) -> None:
    auditor = FakeAuditor()
    batch, _ = _audited(auditor, {"audit": pids})
    assert (batch.failure is not None, auditor.asked) == (True, [])


def test_an_audit_that_nobody_ordered_is_refused() -> None:
    batch = _run({"audit": [7]})
    assert batch.failure is not None
    assert "nobody ordered" in batch.failure.text


def test_a_failure_that_only_the_audit_sees_is_shrunk_one_program_at_a_time() -> None:
    class AuditsTheLast(FakeRunner):
        """A guest has the last program of an order audited."""

        audits_programs = True

        def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
            last = programs[-1]
            bad = Failure("audit", 0, -1, "wrong", audit="wrong") if self._wrong(last) else None
            return Batch(len(programs), bad, errors=[0] * len(last))

    found: list[Found] = []
    runner = cast(Runner, AuditsTheLast(_grows))
    exploring = Campaign(runner, 1, "7.3.4", "x86_64", lambda _: None, found.append)
    exploring._look_into(tuple(map(Operation, (Kind.MAP, Kind.GROW, Kind.LOCK, Kind.SHRINK, Kind.LOCK))))
    assert [each.shape for each in found] == [("audit", "grow", "shrink")]


def test_plans_are_run_with_the_model_now_and_then_to_be_audited() -> None:
    counts = []
    for audits in (False, True):
        runner = FakeRunner(lambda _: "")
        runner.audits_programs = audits
        exploring = Campaign(cast(Runner, runner), 1, "7.3.4", "x86_64", lambda _: None, lambda _: None)
        planned, others = exploring._make(iter(()), 400)
        counts.append(len(others))
        assert len(planned) + len(others) == 400
    assert 5 <= counts[1] - counts[0] <= 20


def test_the_audit_is_quoted_in_the_test_and_the_c_program(tmp_path: Path) -> None:
    program: Program = (Operation(Kind.MAP, near=2, arg=2), Operation(Kind.WRITE))
    failure = Failure("walk", 0, 48, "page 48 is lost", audit="\n".join(["nobody finds frame 9"] * 9))
    saved = files.save(Found(program, failure, [0, 0], "7.3"), tmp_path, "seed 7")
    for path in saved[1:]:
        words = " ".join(path.read_text().replace("*", " ").split())
        assert words.count("The audit says: nobody finds frame 9.") == 2, path


# --- what is made of failures -------------------------------------------------------------------------------------


class FakeRunner:
    """Runs programs by a function that says what is wrong with them."""

    kinds = tuple(Kind)
    audits_programs = False

    def __init__(self, wrong: Callable[[Program], str]) -> None:
        self._wrong = wrong
        self.renewed = 0

    def renew(self) -> None:
        self.renewed += 1

    def run_plans(self, plans: Sequence[Plan]) -> Batch:
        return Batch(done=len(plans), untrue=list(range(len(plans))))

    def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
        for number, each in enumerate(programs):
            oracle = self._wrong(each)
            if oracle and (not oracle.startswith("once") or not thorough):
                return Batch(number + 1, Failure(oracle, 0, 1, "wrong"), errors=[0] * len(each))
        return Batch(len(programs))


def _explore(wrong: Callable[[Program], str], release: str = "7.3.4") -> tuple[Progress, list[Found]]:
    found: list[Found] = []
    runner = cast(Runner, FakeRunner(wrong))
    exploring = Campaign(runner, 1, release, "x86_64", lambda _: None, found.append)
    exploring.run(Deadline.after(600), programs=500)
    return exploring.progress, found


def _grows(program: Program) -> str:
    kinds = [each.kind for each in program]
    return "bytes" if Kind.GROW in kinds and Kind.SHRINK in kinds[kinds.index(Kind.GROW) :] else ""


def test_equal_failures_are_told_once_and_counted() -> None:
    progress, found = _explore(_grows)
    (only,) = found
    assert [each.kind for each in only.program] == ["grow", "shrink"]
    assert only.times > 3
    assert progress.programs == campaign.BATCH


def test_different_failures_are_told_apart() -> None:
    _, found = _explore(lambda program: _grows(program) or ("walk" if Kind.LOCK in [x.kind for x in program] else ""))
    assert {each.shape for each in found} == {("bytes", "grow", "shrink"), ("walk", "lock")}


def test_the_program_that_made_the_kernel_complain_is_searched_in_halves() -> None:
    program: Program = (Operation(Kind.MAP, arg=3),)

    class Complains(FakeRunner):
        """Notices at the end of a row that something was wrong."""

        def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
            bad = any(self._wrong(each) for each in programs)
            failure = Failure("console", 0, -1, "WARNING") if bad else None
            return Batch(len(programs), failure, errors=[0] * len(programs[-1]))

    runner = Complains(lambda each: "console" if program[0] in each else "")
    found: list[Found] = []
    exploring = Campaign(cast(Runner, runner), 1, "7.3", "x86_64", lambda _: None, found.append)
    exploring._search([(Operation(Kind.LOCK),)] * 500 + [program] + [(Operation(Kind.LOCK),)] * 200)
    assert [each.program for each in found] == [program]
    assert runner.renewed < 30


def test_a_failure_that_does_not_come_again_is_counted_and_not_told() -> None:
    progress, found = _explore(lambda program: "once" if _grows(program) else "")
    assert not found
    assert progress.unconfirmed > 3


class Racing(FakeRunner):
    """A kernel that gets a program wrong in one of five runs."""

    def __init__(self) -> None:
        super().__init__(_grows)
        self.ran = 0
        self.rivals: set[int | None] = set()

    def run_plans(self, plans: Sequence[Plan]) -> Batch:
        raise AssertionError("the rival does not race with plans")

    def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
        self.rivals.add(rival)
        for number, each in enumerate(programs):
            self.ran += 1
            if self.ran % 5 == 0 and self._wrong(each):
                return Batch(number + 1, Failure("walk", 0, 1, "wrong"), errors=[0] * len(each))
        return Batch(len(programs))


def test_a_race_is_confirmed_and_shrunk_by_running_programs_many_times() -> None:
    runner, found = Racing(), list[Found]()
    exploring = Campaign(cast(Runner, runner), 7, "7.3", "x86_64", lambda _: None, found.append, races=True)
    exploring.run(Deadline.after(600), programs=3000)
    (only,) = found
    assert [each.kind for each in only.program] == ["grow", "shrink"]
    assert 1 <= only.runs <= 5
    assert runner.rivals == {7}


def test_programs_that_race_leave_out_what_a_rival_would_disturb() -> None:
    kinds: set[Kind] = set()

    class Looking(FakeRunner):
        def run(self, programs: Sequence[Program], *, thorough: bool = False, rival: int | None = None) -> Batch:
            kinds.update(each.kind for program in programs for each in program)
            return Batch(len(programs))

    runner = cast(Runner, Looking(lambda _: ""))
    Campaign(runner, 1, "7.3", "x86_64", lambda _: None, lambda _: None, races=True).run(Deadline.after(600), 5000)
    disturbed = {Kind.SCAN, Kind.UNMERGE_ALL, Kind.WALK, Kind.UFFD_PROTECT, Kind.UFFD_UNPROTECT}
    assert kinds == set(Kind) - disturbed


def test_of_a_race_only_the_program_is_saved(tmp_path: Path) -> None:
    program: Program = (Operation(Kind.MAP, arg=3), Operation(Kind.GROW))
    failure = Failure("walk", 0, 1, "page 1 does not move")
    (saved,) = files.save(Found(program, failure, [0, 0], "7.3", runs=4), tmp_path, "seed 7")
    assert saved.name == "race-walk-grow.json"
    assert files.read(saved) == program


@pytest.fixture
def bug(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shapes = (findings.Shape("bytes", (("grow",), ("shrink",))),)
    ranges = (findings.Range(("x86_64",), "", ("7.3",)),)
    made = findings.Finding("a-bug", "", "", "", "", ranges, shapes)
    monkeypatch.setattr(findings, "known", lambda: {"a-bug": made})
    return


@pytest.mark.usefixtures("bug")
def test_a_known_finding_is_told_by_its_name_and_is_not_new() -> None:
    progress, (only,) = _explore(_grows, "7.2.12")
    assert only.known == "a-bug"
    assert not progress.new


@pytest.mark.usefixtures("bug")
def test_a_kernel_that_should_not_have_a_finding_is_not_excused() -> None:
    progress, (only,) = _explore(_grows, "7.3.1")
    assert only.known == ""
    assert progress.new == [only]


def test_an_answer_that_is_no_answer_is_a_protocol_error() -> None:
    runner = Runner(cast(GuestSource, FakeSource()))
    runner.open()
    with pytest.raises(ProtocolError):
        Runner(cast(GuestSource, _Silent())).open()


class _Silent(FakeSource):
    def fresh(self) -> tuple[Guest, protocol.Collected]:
        guest = FakeGuest([], b"")
        guest._said = iter([{"kinds": 7}])
        return cast(Guest, guest), protocol.Collected([], [])
