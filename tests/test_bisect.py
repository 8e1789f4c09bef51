# SPDX-License-Identifier: GPL-2.0
"""What a kernel's tests mean for a bisect, how the search goes, and how it goes on after an interruption. No guests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.bisect import journal, packages, step, story
from harness.bisect.asking import Asking
from harness.bisect.journal import Journal
from harness.bisect.search import Direction, Found, WrongBaseline, search
from harness.bisect.step import Step
from harness.bisect.trial import Criterion, Trial
from harness.debian.apt import Archive
from harness.debian.apt_root import Package
from harness.debian.suites import RELEASED
from harness.errors import BootError, FetchError, HarnessError, HostError, PatchError, UsageError
from harness.host.cache import Cache, Progress, silent
from harness.kernels import debian
from harness.kernels.kernel import BootSpec
from harness.matrix.job import Ended, Job
from harness.options import MachineOptions
from harness.report.record import Item
from harness.report.state import State, judge_items
from tests.matrix_runs import Scripted, ended, line

GOOD, BAD, NONE = State.GOOD, State.BAD, State.NONE


# --- what the results of one kernel mean -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("items", "state", "message"),
    [
        ([line("a"), line("b", "skipped")], GOOD, "1 passed, 1 skipped"),
        ([line("a", "lacking", verdict="PASS")], GOOD, "1 lacking"),
        ([line("a", "xfailed", failed=False)], GOOD, "1 xfailed"),
        ([line("a"), line("b", "failed", message="lost page")], BAD, "test_a.py::b lost page"),
        ([line("a", "MISS"), line("b", "failed", message="lost page")], BAD, "lost page"),
        ([line("a"), line("b", "MISS", message="QEMU died\nmore")], NONE, "::b could not be run: QEMU died"),
        ([line("a", "error", verdict="ERROR", message="no file")], NONE, "broke outside of the test itself: no file"),
        ([line("a", "skipped", message="needs KSM"), line("b", "skipped")], NONE, "all of its tests skip: needs KSM"),
        ([line("a", "passed", failed=True, message="no longer")], NONE, "against its expectation: no longer"),
        ([], NONE, "no test has run"),
    ],
    ids=["passed", "lacking", "xfailed", "failed", "failed and missed", "missed", "error", "skipped", "strict", "none"],
)
def test_the_record_decides_what_a_kernel_is(items: Sequence[Item], state: State, message: str) -> None:
    found, why = judge_items(items)
    assert found is state
    assert message in why
    assert "\n" not in why


def test_tests_that_take_too_long_have_no_verdict() -> None:
    late: Ended = {**ended("6.17", trouble="it was ended"), "late": True}
    assert step.judge(late)[0] is NONE


@pytest.mark.parametrize(
    ("status", "error"), [(4, UsageError), (5, UsageError), (2, HostError), (3, HostError), (-9, HostError)]
)
def test_a_run_that_is_no_run_of_the_tests_stops_the_bisect(status: int, error: type[HarnessError]) -> None:
    run = ended("6.17", trouble=f"pytest ended with status {status}")
    broken: Ended = {**run, "status": status, "results": "", "output": "ERROR: file not found: x.py\nno tests ran"}
    with pytest.raises(error, match="file not found" if error is UsageError else "left no results"):
        step.judge(broken)


def test_a_record_that_was_cut_is_no_success() -> None:
    whole = ended("6.17", line("a"))
    cut: Ended = {**whole, "trouble": "its record of results is not complete"}
    with pytest.raises(HostError, match="not complete"):
        step.judge(cut)


# --- one kernel ------------------------------------------------------------------------------------------------------

PLAIN = MachineOptions()
SPEC = debian.parse_debian("debian:6.17", X86_64)


def try_out(
    answers: Sequence[Sequence[Item]] = (),
    error: HarnessError | None = None,
    *,
    repeat: int = 1,
    lenient: bool = False,
    options: MachineOptions = PLAIN,
) -> tuple[Step, list[Job]]:
    """The step of a kernel whose runs have these results, and the jobs that were run."""
    jobs: list[Job] = []

    def answer(task: Job) -> Ended:
        jobs.append(task)
        return ended(task["name"], *answers[len(jobs) - 1])

    def ready(spec: BootSpec, options: MachineOptions, progress: Progress) -> None:
        if error is not None:
            raise error

    tests = Criterion(arguments=("guest_tests/test_a.py", "-k", "moved"), repeat=repeat)
    tried = Trial(tests, options, Scripted(answer), silent, lenient=lenient, ready=ready)
    return tried.of("6.17", SPEC), jobs


def test_the_tests_run_on_the_kernel_as_it_was_asked_for() -> None:
    found, jobs = try_out([[line("a")]], options=MachineOptions(append="slub_debug=F", cpus=2))
    assert (found.name, found.state) == ("6.17", GOOD)
    command = jobs[0]["python"]
    assert {"--kernel=debian:6.17", "--arch=x86_64", "--append=slub_debug=F", "--guest-cpus=2"} <= set(command)
    assert command[-3:] == ["guest_tests/test_a.py", "-k", "moved"]


def test_a_repeated_test_is_bad_if_it_fails_once() -> None:
    found, jobs = try_out([[line("a")], [line("a", "failed", message="lost")], [line("a")]], repeat=3)
    assert found.state is BAD
    assert found.message.endswith("lost, run 2 of 3")
    assert len(jobs) == 2, "a third run could change nothing"


def test_a_repeated_test_is_not_good_if_one_run_has_no_verdict() -> None:
    found, _ = try_out([[line("a")], [line("a", "MISS", message="no guest")], [line("a")]], repeat=3)
    assert found.state is NONE


@pytest.mark.parametrize("error", [BootError("silent"), PatchError("patch 1 of 2 does not apply\nhunk 3")])
def test_a_kernel_that_cannot_be_built_or_booted_has_no_verdict(error: HarnessError) -> None:
    found, jobs = try_out(error=error)
    assert found.state is NONE
    assert found.message == (
        "it does not boot: silent" if isinstance(error, BootError) else "patch 1 of 2 does not apply"
    )
    assert jobs == []


@pytest.mark.parametrize("error", [HostError("no QEMU"), FetchError("no network"), UsageError("no tree")])
def test_trouble_of_the_host_stops_instead(error: HarnessError) -> None:
    with pytest.raises(type(error)):
        try_out(error=error)


def test_a_package_that_the_mirror_lacks_has_no_verdict() -> None:
    found, _ = try_out(error=FetchError("404"), lenient=True)
    assert (found.state, found.message) == (NONE, "404")
    with pytest.raises(HostError):
        try_out(error=HostError("disk full"), lenient=True)


# --- Debian's versions -----------------------------------------------------------------------------------------------


def test_versions_are_listed_once_without_candidates_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def package(version: str, name: str = "") -> Package:
        return Package(name or f"linux-image-{version}-cloud-amd64", version, "amd64", "s", "", "")

    released = [package(each) for each in ("6.16.12-1", "6.16.3-1", "6.12.115-1", "6.12.115-2~deb12u1", "7.3.4-1")]
    unreleased = [package("7.4~rc2-1~exp1"), package("7.3.5-1"), package("9.9-1", "linux-image-9.9-amd64")]

    def packages_of(self: object, arch: object, names: Sequence[str]) -> list[Package]:
        return list(released if names == RELEASED else unreleased)

    monkeypatch.setattr("harness.debian.apt.Archive.packages", packages_of)
    archive = Archive(Cache(tmp_path))
    assert debian.packaged(archive, X86_64) == ["6.12.115", "6.16.3", "6.16.12", "7.3.4", "7.3.5"]


VERSIONS = ["6.12.118", "6.16.3", "6.16.12", "6.17.8", "7.3.4", "7.4.1"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("6.16..7.3", ["6.16.3", "6.16.12", "6.17.8", "7.3.4"]),
        ("6.16.4..6.17.8", ["6.16.12", "6.17.8"]),
        ("6..7", VERSIONS),
    ],
)
def test_a_range_includes_its_ends(text: str, found: list[str]) -> None:
    assert packages.within(VERSIONS, text) == found


@pytest.mark.parametrize("text", ["6.16", "6.16...7.3", "v6.16..v7.3", "7.3..6.16", "7.4..7.5", "..7.3"])
def test_a_range_of_fewer_than_two_kernels_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="two"):
        packages.within(VERSIONS, text)


# --- the search ------------------------------------------------------------------------------------------------------


class Row:
    """Versions with known states: one letter each, "g", "b" or "?"."""

    def __init__(self, states: str) -> None:
        self.states = {f"1.{number}": {"g": GOOD, "b": BAD, "?": NONE}[each] for number, each in enumerate(states)}
        self.asked: list[str] = []
        self.left: list[int] = []

    def ask(self, name: str, left: int) -> Step:
        assert name not in self.asked
        self.asked.append(name)
        self.left.append(left)
        return Step(name=name, state=self.states[name], message="")

    def search(self, old: State = GOOD) -> Found:
        return search(list(self.states), self.ask, Direction(old))


@pytest.mark.parametrize("length", range(2, 20))
def test_every_change_is_found_in_as_few_steps_as_bisecting_takes(length: int) -> None:
    for first in range(1, length):
        row = Row("g" * first + "b" * (length - first))
        found = row.search()
        assert (found.before.name, found.after.name, found.between) == (f"1.{first - 1}", f"1.{first}", ())
        assert len(row.asked) <= 2 + (length - 2).bit_length()
        assert all(later <= earlier for earlier, later in zip(row.left, row.left[1:], strict=False))
        assert row.left[-1] <= 1


def test_the_ends_are_asked_first_the_newest_before_the_oldest() -> None:
    row = Row("gggbb")
    row.search()
    assert row.asked[:2] == ["1.4", "1.0"]


def test_a_wrong_baseline_is_said_before_anything_else_is_asked() -> None:
    passes, fails = Row("gggg"), Row("bbbb")
    with pytest.raises(WrongBaseline, match=r"1\.3 is good.*--fixed"):
        passes.search()
    with pytest.raises(WrongBaseline, match=r"1\.0 is bad already"):
        fails.search()
    assert (passes.asked, fails.asked) == (["1.3"], ["1.3", "1.0"])


def test_the_first_good_one_is_found_where_something_was_fixed() -> None:
    found = Row("bbbgg").search(BAD)
    assert (found.before.name, found.after.name) == ("1.2", "1.3")
    with pytest.raises(WrongBaseline, match=r"1\.1 is bad.*leave out --fixed"):
        Row("bb").search(BAD)


@pytest.mark.parametrize(
    ("states", "before", "after", "between"),
    [
        ("g?b", 0, 2, (1,)),
        ("gg?bb", 1, 3, (2,)),
        ("?gb?", 1, 2, ()),
        ("g??b?b", 0, 3, (1, 2)),
        ("g?gb?", 2, 3, ()),
        ("gg??????b", 1, 8, (2, 3, 4, 5, 6, 7)),
    ],
)
def test_versions_without_a_verdict_are_passed_over_and_named(
    states: str, before: int, after: int, between: tuple[int, ...]
) -> None:
    found = Row(states).search()
    assert (found.before.name, found.after.name) == (f"1.{before}", f"1.{after}")
    assert found.between == tuple(f"1.{each}" for each in between)


@pytest.mark.parametrize("states", ["??", "?b", "g?", "???b"])
def test_a_range_without_two_verdicts_says_so(states: str) -> None:
    with pytest.raises(WrongBaseline, match=r"verdict|newer end"):
        Row(states).search()


# --- the log ---------------------------------------------------------------------------------------------------------

QUESTION = {"packages": "6.16..7.3", "tests": ["test_a.py"]}
SEEN = Step(name="6.17", state=BAD, message="lost", seconds=3.0, results="{}\n")


def kept(path: Path, *steps: Step) -> Path:
    with closing(Journal(path, QUESTION)) as log:
        for each in steps:
            log.add(each)
    return path


def steps_in(path: Path, *, again: bool = False) -> dict[str, Step]:
    """What a bisect finds that opens the log."""
    with closing(Journal(path, QUESTION, again=again)) as log:
        return log.steps


def test_a_log_gives_back_what_was_kept(tmp_path: Path) -> None:
    assert steps_in(kept(tmp_path / "log", SEEN)) == {"6.17": SEEN}


def test_a_line_that_was_cut_is_asked_again(tmp_path: Path) -> None:
    path = kept(tmp_path / "log", SEEN)
    with path.open("a") as file:
        file.write('{"name": "6.18", "sta')
    assert list(steps_in(path)) == ["6.17"]
    kept(path, Step(name="6.18", state=GOOD, message=""))
    assert list(steps_in(path)) == ["6.17", "6.18"]


def test_again_forgets_the_verdicts_of_this_question_only(tmp_path: Path) -> None:
    path = kept(tmp_path / "log", SEEN)
    assert steps_in(path, again=True) == {}
    assert steps_in(path) == {}
    other = tmp_path / "notes"
    other.write_text("dear diary\n")
    with pytest.raises(UsageError, match="no log of a bisect"):
        Journal(other, QUESTION, again=True)
    assert other.read_text() == "dear diary\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cut in the first line", "no log of a bisect"),
        (json.dumps({"format": journal.FORMAT, "version": 2}) + "\n", "has version 2"),
        (json.dumps({"format": journal.FORMAT, "version": 1, "question": {**QUESTION, "tests": []}}) + "\n", "tests"),
        (json.dumps({"format": journal.FORMAT, "version": 1, "question": QUESTION}) + "\n{}\n", "is damaged"),
    ],
    ids=["foreign", "newer", "other", "damaged"],
)
def test_a_file_that_is_no_log_of_this_question_is_left_alone(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        Journal(path, QUESTION)
    assert path.read_text() == text


def test_two_bisects_do_not_write_one_log(tmp_path: Path) -> None:
    first = Journal(tmp_path / "log", QUESTION)
    with pytest.raises(UsageError, match="another bisect writes"):
        Journal(tmp_path / "log", QUESTION)
    first.close()
    Journal(tmp_path / "log", QUESTION).close()


class Interrupted(Exception):
    """Stands for Ctrl-C."""


def test_an_interrupted_bisect_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The second run asks no kernel that the first one has asked."""
    row = "gggggbbbb"
    runs: list[list[str]] = []
    said: list[str] = []

    def bisect(limit: int) -> Found:
        asked: list[str] = []
        runs.append(asked)

        def answer(task: Job) -> Ended:
            if len(asked) == limit:
                raise Interrupted
            asked.append(task["name"])
            bad = row[int(task["name"][2:])] == "b"
            return ended(task["name"], line("a", "failed" if bad else "passed"))

        tried = Trial(Criterion(arguments=("a",)), MachineOptions(), Scripted(answer), silent, ready=lambda *_: None)
        log = Journal(tmp_path / "log", QUESTION)
        asking = Asking(tried, log, said.append)
        try:
            return search(
                [f"1.{number}" for number in range(len(row))],
                lambda name, left: asking.ask(name, name, left, lambda: replace(SPEC, label=name)),
                Direction(),
            )
        finally:
            log.close()

    with pytest.raises(Interrupted):
        bisect(3)
    assert bisect(99).after.name == "1.5"
    assert len(runs[0]) == 3
    assert not set(runs[0]) & set(runs[1])
    assert any("1.8: bad (from the log)" in each for each in said)
    assert bisect(0).after.name == "1.5", "a log is replayed without any kernel"


# --- what is said at the end -----------------------------------------------------------------------------------------


def told(found: Found) -> str:
    return "\n".join(story.ending(found, Direction(), "version", Path("log")))


def recorded_step(name: str, *items: Item) -> Step:
    state, message = judge_items(items)
    return Step(name=name, state=state, message=message, seconds=61.0, results=ended(name, *items)["results"])


def test_the_end_shows_the_change_and_the_evidence_of_both_runs() -> None:
    sections = (
        ("failure in call", "frame 1\nE   page 3 is lost\nE   assert not {3}"),
        ("run it again", "pytest --kernel=debian:6.17.8 t"),
    )
    bad = recorded_step("6.17.8", line("a", "failed", message="page 3", sections=sections))
    text = told(Found(recorded_step("6.16.12", line("a")), bad))
    assert text.startswith("The first bad version is 6.17.8\n")
    for each in ("Last good: 6.16.12 (1:01)", "  1 passed", "E   page 3 is lost", "see it again: pytest --kernel"):
        assert each in text
    assert "frame 1" not in text
    assert "assert not" not in text


def test_the_end_names_all_that_may_be_the_first() -> None:
    text = told(Found(recorded_step("1.0", line("a")), recorded_step("1.3", line("a", "failed")), ("1.1", "1.2")))
    assert text.startswith(
        "The first bad version is one of these, because some have no verdict:\n  1.1\n  1.2\n  1.3\n"
    )


def test_a_record_that_cannot_be_read_hides_nothing() -> None:
    assert "lost" in told(Found(SEEN, SEEN))
