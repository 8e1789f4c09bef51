# SPDX-License-Identifier: GPL-2.0
"""A mutant is killed by a test that reaches it and fails, and by nothing else. No test here boots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.build.mutants import Mutant
from harness.errors import UsageError
from harness.matrix.definition import Cell
from harness.matrix.job import Ended, Job
from harness.matrix.table import Paint
from harness.mutants import baseline, outcome, page, table
from harness.mutants.baseline import Baseline, Passed
from harness.mutants.order import History, ordered
from harness.mutants.outcome import How, Kill, Result, Score, State
from harness.mutants.scoring import Scoring
from harness.report import record
from harness.report.record import Item
from tests import mutants_page
from tests.matrix_runs import Scripted, ended, line, recorded

CELL = Cell(group="mutants", kernel="unpatched:mutants", arch="x86_64", options="--mutant=record")


def mutant(name: str = "no-growth", equivalent: str = "") -> Mutant:
    return Mutant(name, "size", "It grows.", "It does not grow.", "", ("unpatched",), equivalent, (), ())


def reaching(test: str, *names: str, word: str = "passed", message: str = "") -> Item:
    """The line of a test that reached the places of these mutants."""
    return line(test, word, message=message, properties=(("mutants reached", " ".join(names)),))


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def before(*items: Item) -> Baseline:
    return baseline.read(record.parse(recorded(*items), "the baseline"))


PLAIN = (reaching("test_one", "no-growth"), reaching("test_two", "no-growth", "other"), reaching("test_three"))


def score(
    answer: Callable[[Job], Ended], *mutants: Mutant, everything: bool = False
) -> tuple[list[Result], list[list[str]]]:
    """What became of mutants, and the tests of each run."""
    runs: list[list[str]] = []

    def noted(task: Job) -> Ended:
        runs.append([word for word in task["python"] if word.startswith(("guest_tests/", "--explore"))])
        return answer(task)

    scoring = Scoring(
        CELL,
        mutants or [mutant()],
        before(*PLAIN),
        Scripted(noted),
        History(),
        everything=everything,
        audit=True,
        tell=lambda result: None,
        progress=lambda text: None,
    )
    scoring.run()
    return scoring.results, runs


def explored(task: Job) -> bool:
    return task["python"][-1] == "guest_tests/test_explored.py"


def test_only_tests_that_reach_a_mutant_are_run_against_it_and_the_first_failure_kills_it() -> None:
    ((result,), runs) = score(
        lambda task: ended(task["name"], reaching("test_one", "no-growth", word="failed", message="no page"))
    )
    assert (result.state, result.reaching, result.ran) == (State.KILLED, 2, 1)
    assert result.kills == (Kill(test="guest_tests/test_a.py::test_one", how=How.TEST, message="no page"),)
    assert runs == [["guest_tests/test_a.py::test_one[k]", "guest_tests/test_a.py::test_two[k]"]]


def test_what_the_audit_reports_beside_a_failure_is_counted() -> None:
    report = "after the failure: 7.3.4 (x86_64): 1 error\nerror: wrong index: pfn 0x5"
    for text, seen in ((report, True), ("at the end: no error: all is well", False)):
        failed = reaching("test_one", "no-growth", word="failed", message="no page")
        failed = replace(failed, sections=(("audit of memory", text),))
        ((result,), _) = score(lambda task, failed=failed: ended(task["name"], failed))
        assert result.kills[0].audited is seen
        told = table.total(replace(SCORE, results=(result,), audited=True))
        assert f"1 by checks of tests; the audit reported {int(seen)} of them, none alone" in told


def test_a_mutant_that_needs_two_cpus_gets_them() -> None:
    asked: list[list[str]] = []

    def noted(task: Job) -> Ended:
        asked.append([word for word in task["python"] if word.startswith("--guest-cpus")])
        return ended(task["name"], reaching("test_one", "no-growth", word="failed", message="lost"))

    score(noted, mutant())
    score(noted, replace(mutant(), cpus=2))
    assert asked == [[], ["--guest-cpus=2"]]


def test_a_survivor_meets_the_explorer_last() -> None:
    ((result,), runs) = score(lambda task: ended(task["name"], reaching("test_one", "no-growth")))
    assert (result.state, result.kills) == (State.SURVIVED, ())
    assert runs[-1] == ["--explore=600", "guest_tests/test_explored.py"]
    failed = reaching("guest_tests/test_explored.py::test_programs[1]", "no-growth", word="failed", message="lost")
    ((killed,), _) = score(
        lambda task: ended(task["name"], failed if explored(task) else reaching("test_one", "no-growth"))
    )
    assert (killed.state, killed.kills[0].how) == (State.KILLED, How.EXPLORER)


def test_a_survivor_that_no_test_can_notice_is_equivalent() -> None:
    ((result,), _) = score(lambda task: ended(task["name"]), mutant(equivalent="No path reads the value."))
    assert result.state is State.EQUIVALENT


def test_a_failure_that_did_not_reach_the_mutant_is_no_kill() -> None:
    ((result,), runs) = score(lambda task: ended(task["name"], reaching("test_one", word="failed", message="odd")))
    assert (result.state, result.trouble) == (State.UNDECIDED, "guest_tests/test_a.py::test_one: odd")
    assert runs[0] == runs[1]  # it was given a second chance


@pytest.mark.parametrize("trouble", ["it was ended after 30 minutes", ""])
def test_a_harness_error_is_no_kill_and_is_tried_once_more(trouble: str) -> None:
    missed = () if trouble else (line("test_one", "MISS", message="infrastructure: no guest"),)
    ((result,), runs) = score(lambda task: ended(task["name"], *missed, trouble=trouble))
    assert result.state is State.UNDECIDED
    assert len(runs) == 4  # the tests twice, and the explorer twice
    answers = iter([ended("no-growth", *missed, trouble=trouble)])
    fine = reaching("test_one", "no-growth", word="failed", message="no page")
    ((second,), _) = score(lambda task: next(answers, ended(task["name"], fine)))
    assert second.state is State.KILLED


@pytest.mark.parametrize(
    ("message", "how"),
    [
        ("guest lost (panic): the kernel panicked", How.LOST),
        ("the kernel complained during this test: BUG: Bad page state", How.CONSOLE),
        ("the kernel tainted itself during this test, without a word on the console: B", How.CONSOLE),
        ("AssertionError: no page", How.TEST),
    ],
)
def test_a_kill_says_what_noticed(message: str, how: How) -> None:
    ((result,), _) = score(
        lambda task: ended(task["name"], reaching("test_one", "no-growth", word="failed", message=message))
    )
    assert result.kills[0].how is how


def test_a_lost_guest_cannot_say_what_was_reached() -> None:
    ((result,), _) = score(
        lambda task: ended(task["name"], line("test_one", "failed", message="guest lost (hang): no heartbeat"))
    )
    assert (result.state, result.kills[0].how) == (State.KILLED, How.LOST)


def test_all_tests_are_run_when_that_is_asked_for() -> None:
    items = [reaching(name, "no-growth", word="failed", message="x") for name in ("test_one", "test_two")]
    ((result,), _) = score(lambda task: ended(task["name"], *(() if explored(task) else items)), everything=True)
    assert [kill.test[-8:] for kill in result.kills] == ["test_one", "test_two"]


def test_what_killed_a_mutant_comes_first_next_time_and_alone() -> None:
    kill = reaching("test_two", "no-growth", word="failed", message="x")
    history = History()
    history.add("no-growth", "guest_tests/test_a.py::test_two")
    history.keep()
    (_, runs) = score(lambda task: ended(task["name"], kill))
    assert runs == [["guest_tests/test_a.py::test_two[k]"]]


def test_tests_about_few_mutants_come_first_and_modules_take_turns() -> None:
    tests = [
        Passed("a.py::test_broad", 0.1, frozenset({"m", "n", "o"})),
        Passed("a.py::test_narrow", 0.1, frozenset({"m"})),
        Passed("b.py::test_other", 0.1, frozenset({"m", "n"})),
    ]
    assert ordered(tests, History(), "m") == ["a.py::test_narrow", "b.py::test_other", "a.py::test_broad"]


def test_a_baseline_that_fails_says_nothing_about_mutants() -> None:
    with pytest.raises(UsageError, match=r"1 tests fail although no mutant is active, first .*test_one: no page"):
        before(reaching("test_one", "no-growth", word="failed", message="no page"))
    with pytest.raises(UsageError, match="no test reaches the place of any mutant"):
        before(reaching("test_one"))


def test_findings_and_skipped_tests_cannot_kill() -> None:
    items = (*PLAIN, reaching("test_finding", "no-growth", word="xfailed"), reaching("test_skip", word="skipped"))
    assert [each.test[-8:] for each in before(*items).reaching("no-growth")] == ["test_one", "test_two"]


def test_a_test_is_named_as_pytest_names_it() -> None:
    assert baseline.pytest_name("a.py::test_b", "k") == "a.py::test_b[k]"
    assert baseline.pytest_name("a.py::test_b[c-d]", "k") == "a.py::test_b[k-c-d]"


KILLED = Result(
    name="no-growth",
    group="size",
    state=State.KILLED,
    kills=(Kill(test="guest_tests/test_a.py::test_one", how=How.TEST, message="<b>no page</b>"),),
    seconds=2.5,
    reaching=2,
    ran=1,
)
SURVIVOR = Result(name="grows-twice", group="size", state=State.SURVIVED, reaching=2, ran=2)
SCORE = Score(kernel="unpatched", arch="x86_64", release="7.3.4", accelerator="tcg", results=(KILLED, SURVIVOR))
KNOWN = {each: mutant(each) for each in ("no-growth", "grows-twice")}


def test_the_table_names_killers_and_the_promises_that_survivors_break() -> None:
    text = "\n".join(table.lines(SCORE, KNOWN, 120, Paint(False)))
    assert "no-growth    killed    2.5 s  test_a.py::test_one" in text
    assert "grows-twice survived in" in text
    assert "broken: It grows." in text
    assert "2 tests reach its place." in text
    assert "1 of 2 killed (50 %): 1 by checks of tests; 1 survived; median time to kill 2.5 s" in text


def test_results_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "mutants.json"
    file.write_text(outcome.to_json([SCORE], 1000.0))
    (back,) = outcome.from_json(file)
    assert outcome.to_json([back], 1000.0) == file.read_text()
    file.write_text("{}")
    with pytest.raises(UsageError, match="does not hold the results of mutants"):
        outcome.from_json(file)


def test_the_page_escapes_what_guests_said() -> None:
    text = page.page([SCORE], KNOWN, 1000.0)
    assert "&lt;b&gt;no page" in text
    assert "<b>" not in text


def test_modules_that_kill_nothing_that_others_do_not_are_named() -> None:
    def killed(*tests: str) -> Result:
        kills = tuple(Kill(test=f"guest_tests/{test}.py::t", how=How.TEST, message="") for test in tests)
        return Result(name="x", group="size", state=State.KILLED, kills=kills)

    whole = Score(
        kernel="k", arch="a", release="", accelerator="", results=(killed("test_a"), killed("test_a", "test_b"))
    )
    assert table.idle(whole) == ["guest_tests/test_b.py"]


def test_recorded_results_keep_what_a_new_run_did_not_try() -> None:
    again = replace(SURVIVOR, state=State.KILLED, kills=KILLED.kills)
    untried = replace(KILLED, state=State.NOT_RUN, kills=())
    other = replace(SCORE, kernel="relocate-anon")
    audited = replace(SCORE, audited=True)
    (first, second, third) = mutants_page.merged([SCORE], [replace(SCORE, results=(again, untried)), other, audited])
    assert third.audited
    assert [(each.name, each.state) for each in first.results] == [
        ("grows-twice", State.KILLED),
        ("no-growth", State.KILLED),
    ]
    assert second.kernel == other.kernel
    assert {each.name for each in second.results} == {"no-growth", "grows-twice"}


def test_the_recorded_page_names_survivors_first_and_each_killer() -> None:
    text = mutants_page.page([SCORE], KNOWN, 600)
    assert "| `grows-twice` | It grows. | It does not grow. |" in text
    assert "| `no-growth` | It grows. | `` | `test_a.py::test_one` |" in text
    assert "1 of 2 killed (50 %)" in text


def test_the_recorded_page_leaves_out_what_another_architecture_takes() -> None:
    known = {**KNOWN, "grows-twice": replace(KNOWN["grows-twice"], arch="arm64")}
    text = mutants_page.page([SCORE], known, 600)
    assert "grows-twice" not in text
    assert "1 of 1 killed (100 %)" in text
