# SPDX-License-Identifier: GPL-2.0
"""Upstream's tests: which are chosen, where their sources come from, and how a program is judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from guest_tests import test_kselftest as guest
from guest_tests.mm import waiting
from guest_tests.support import audited, kselftest, ktap
from guest_tests.support.audited import Seen
from guest_tests.support.kselftest import Broken, Outcome
from guest_tests.support.ktap import Verdict
from harness import arch
from harness.build.source import TreeSource
from harness.errors import UsageError
from harness.kernels.local import TreeSpec
from harness.kselftest import catalog, sources
from harness.kselftest.catalog import Known, Upstream
from harness.machine import initramfs
from tests.lab import wait_until

# --- which tests ---


def test_mm_stands_for_all_of_them() -> None:
    assert catalog.choose(["mm"]) == list(catalog.load())


def test_a_program_stands_for_all_its_tests_and_each_is_chosen_once() -> None:
    chosen = catalog.choose(["ksm_tests-unmerge", "merge", "ksm_tests"])
    assert chosen[:3] == ["merge", "ksm_tests-merge", "ksm_tests-unmerge"]
    assert len(chosen) == len(set(chosen)) == 7


def test_a_name_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(
        UsageError, match=r"no upstream test 'mrege': give --kselftest=mm for all, or one of merge, rmap"
    ):
        catalog.choose(["mrege"])


def test_every_known_failure_has_a_reason() -> None:
    assert all(len(known.reason) > 20 for test in catalog.load().values() for known in test.known)


def test_host_and_guest_agree_where_the_programs_are() -> None:
    assert f"/{initramfs.UPSTREAM}" == str(kselftest.DIRECTORY)


# --- where the sources come from ---


@pytest.mark.parametrize(
    ("version", "package"),
    [("6.12.118", "linux-source-6.12"), ("6.16.3", "linux-source-7.2"), ("9.0", "linux-source-7.3")],
)
def test_a_packaged_kernel_has_the_source_of_its_series_or_the_next(
    monkeypatch: pytest.MonkeyPatch, version: str, package: str
) -> None:
    have = [SimpleNamespace(name=f"linux-source-{each}") for each in ("7.3", "6.12", "7.2", "6.1")]
    monkeypatch.setattr(
        sources, "search", lambda archive, host, fits: SimpleNamespace(fitting=[each for each in have if fits(each)])
    )
    told: list[str] = []
    kernel = SimpleNamespace(spec=None, version=version)
    assert sources.find(kernel, None, SimpleNamespace(progress=told.append)).source.label == package
    assert bool(told) == (package.removeprefix("linux-source-") not in version)


def test_a_build_tree_has_its_own_source_also_behind_an_output_directory(tmp_path: Path) -> None:
    (tmp_path / "linux" / sources.DIRECTORY).mkdir(parents=True)
    (tmp_path / "linux" / sources.DIRECTORY / "Makefile").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/source").symlink_to(tmp_path / "linux")
    for path in (tmp_path / "linux", tmp_path / "out"):
        kernel = SimpleNamespace(spec=TreeSpec("out", "out", arch.host(), path))
        assert sources.find(kernel, None, None).source == TreeSource(tmp_path / "linux")


# --- KTAP ---

SOUND = """TAP version 13
1..5
#  RUN           merge.one ...
#            OK  merge.one
ok 1 merge.one
# merge.c:100:two:Expected 1 (1) == 0 (0)
not ok 2 merge.two
ok 3 # SKIP needs a file
ok 4 merge.four # XFAIL on this machine
not ok 5 - merge.five # TODO one day
# Totals: pass:1 fail:1 xfail:2 xpass:0 skip:1 error:0
"""


def read(text: str) -> tuple[ktap.Reader, list[ktap.Result]]:
    reader = ktap.Reader()
    return reader, [result for line in text.splitlines() if (result := reader.line(line))]


def test_each_line_of_sound_ktap_is_understood() -> None:
    reader, results = read(SOUND)
    assert [(each.name, each.verdict, each.reason) for each in results] == [
        ("merge.one", Verdict.PASSED, ""),
        ("merge.two", Verdict.FAILED, ""),
        ("needs a file", Verdict.SKIPPED, "needs a file"),
        ("merge.four", Verdict.XFAILED, "on this machine"),
        ("merge.five", Verdict.XFAILED, "one day"),
    ]
    assert results[1].diagnostics == ("merge.c:100:two:Expected 1 (1) == 0 (0)",)
    assert reader.unfinished() == ""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it printed no KTAP"),
        ("hello\nworld\n", "it printed no KTAP, but 'hello'"),
        ("TAP version 13\nok 1 a\n", "it did not say how many subtests it has"),
        ("TAP version 13\n1..3\nok 1 a\n", "it planned 3 subtests and told of 1"),
        ("TAP version 13\n1..2\nok 1 a\nok 1 b\n", "subtest 2 was due, and it printed 'ok 1 b'"),
        ("TAP version 13\n1..2\nok a\n", "subtest 1 was due, and it printed 'ok a'"),
        ("TAP version 13\n1..2\n1..3\n", "it planned 2 subtests, and then 3"),
        (f"TAP version 13\n1..{'9' * 5000}\n", "it planned 999999999 subtests and told of 0"),
    ],
)
def test_what_is_no_sound_ktap_is_said_in_one_clause(text: str, complaint: str) -> None:
    reader, _ = read(text)
    assert reader.unfinished() == complaint


def test_much_text_before_a_result_is_cut() -> None:
    _, results = read("TAP version 13\n1..1\n" + f"# {'x' * 5000}\n" * 5000 + "ok 1 a\n")
    assert sum(map(len, results[0].diagnostics)) < 20_000


# --- programs ---

Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a shell script as a program."""
    monkeypatch.setattr(kselftest, "DIRECTORY", tmp_path)
    monkeypatch.setattr(waiting, "patience", lambda seconds: seconds)

    def run(script: str, seen: list[tuple[str, str]] | None = None, **fields: object) -> Outcome:
        program = tmp_path / "toy"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        test = Upstream(**{"name": "toy", "program": "toy", "seconds": 10.0, **fields})  # type: ignore[arg-type]
        row = kselftest.Test("a source", json.loads(json.dumps(asdict(test))))
        return kselftest.run(row, lambda result, known: (seen if seen is not None else []).append((result.name, known)))

    return run


def says(text: str, status: int = 0) -> str:
    return f"cat <<'END'\n{text}END\nexit {status}"


PASSES = "TAP version 13\n1..1\nok 1 a\n"
FAILS = "TAP version 13\n1..2\nok 1 a\nnot ok 2 b\n"


def test_a_program_passes_with_its_subtests(run: Run) -> None:
    seen: list[tuple[str, str]] = []
    outcome = run(says(PASSES), seen)
    assert (outcome.failures, outcome.skipped, outcome.counts()) == ([], "", "1 passed")
    assert seen == [("a", "")]


def test_a_failed_subtest_fails_the_test_whatever_the_exit_status(run: Run) -> None:
    for status in (0, 1):
        assert run(says(FAILS, status)).failures == ["1 subtest failed: b"]


def test_what_a_failed_subtest_said_is_kept(run: Run) -> None:
    text = "TAP version 13\n1..2\n# fine\nok 1 a\n# no room for it\nnot ok 2 b\n"
    assert run(says(text, 1)).failures == ["1 subtest failed: b", "b:\nno room for it"]


def test_a_program_that_says_in_the_end_that_something_failed_has_not_given_up(run: Run) -> None:
    assert run(says(f"{FAILS}Bail out! 1 out of 2 tests failed\n", 1)).failures == ["1 subtest failed: b"]


def test_a_known_failure_is_an_expected_one(run: Run) -> None:
    seen: list[tuple[str, str]] = []
    outcome = run(says(FAILS, 1), seen, known=(Known("b*", "the test is wrong"),))
    assert (outcome.failures, outcome.counts()) == ([], "1 passed, 1 expected to fail")
    assert seen[1] == ("b", "the test is wrong")


def test_a_failure_that_is_known_elsewhere_is_a_failure(run: Run) -> None:
    assert run(says(FAILS, 1), known=(Known("b", "of another machine", machine="sparc"),)).failures


def test_a_program_that_ends_with_status_1_has_failed(run: Run) -> None:
    assert run(says(PASSES, 1)).failures == ["toy ended with status 1, and no subtest failed"]


def test_a_program_that_gives_up_has_failed(run: Run) -> None:
    text = "TAP version 13\n1..2\nok 1 a\nBail out! no memory\n"
    assert run(says(text, 1)).failures == ["toy gave up after 1 subtests: no memory"]


def test_a_program_that_is_killed_has_failed_with_its_last_words(run: Run) -> None:
    (failure,) = run("echo TAP version 13; echo 1..2; echo '# careful'; echo oh >&2; kill -BUS $$").failures
    assert failure == "toy was ended by SIGBUS, after 0 subtests\nIt said last:\ncareful\noh"


def test_a_program_that_hangs_is_ended_with_all_that_it_started(run: Run, tmp_path: Path) -> None:
    script = f"echo TAP version 13; echo 1..2; echo ok 1 a; sleep 1000 & echo $! >{tmp_path}/pid; wait"
    outcome = run(script, seconds=4.0)
    assert outcome.failures == ["toy did not end in 4 s, after 1 subtests"]
    left = Path("/proc", (tmp_path / "pid").read_text().strip())
    wait_until(lambda: not left.exists() or "Z (zombie)" in (left / "status").read_text(), "the program's child")


def test_a_program_whose_child_holds_its_output_has_ended(run: Run) -> None:
    assert not run(f"sleep 1000 &\n{says(PASSES)}", seconds=5.0).failures


@pytest.mark.parametrize("script", [says("1..0 # SKIP no such device\n", 4), says("# no such device\n", 4)])
def test_exit_status_4_skips_the_test(run: Run, script: str) -> None:
    assert run(script).skipped == "no such device"


def test_a_program_that_skips_each_of_its_subtests_is_skipped(run: Run) -> None:
    assert (
        run(says("TAP version 13\n1..1\nok 1 # SKIP no nodes\n")).skipped == "it skipped each of 1 subtests: no nodes"
    )


@pytest.mark.parametrize("status", [0, 1])
def test_rubbish_is_no_verdict_on_the_kernel(run: Run, status: int) -> None:
    with pytest.raises(Broken, match=rf"^toy ended with status {status}, and it printed no KTAP, but '\?\?'"):
        run(says("??\n\x1b[2J\n", status))


def test_a_flood_is_cut_short(run: Run) -> None:
    with pytest.raises(Broken, match="toy printed more than 4 MiB, and was ended"):
        run(f"exec yes {'x' * 1000}")


def test_a_program_that_cannot_be_started_is_no_verdict_on_the_kernel(run: Run) -> None:
    with pytest.raises(Broken, match="missing cannot be started: No such file or directory"):
        run("exit 0", program="missing")


def test_a_setting_holds_while_the_program_runs(run: Run, tmp_path: Path) -> None:
    knob = tmp_path / "knob"
    knob.write_text("1")
    script = f'[ "$(cat {knob})" = 0 ] || exit 1\n{says(PASSES)}'
    assert not run(script, settings={str(knob): "0", str(tmp_path / "missing"): "0"}).failures
    assert knob.read_text() == "1"


# --- what the guest test makes of it ---


def test_an_audit_after_the_program_that_finds_something_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Seen("1 error", 1, [{"severity": "error", "sentence": "page 7 is lost"}], {}, {})
    monkeypatch.setattr(audited, "auditor", lambda config: SimpleNamespace(look=lambda label: wrong))
    asked = SimpleNamespace(config=SimpleNamespace(getoption=lambda name, default: "end"))
    # Where pytest rewrites the assertions of guest_tests, it indents their messages.
    told = r"audited after the program, the reverse map is wrong:\n(?:  )?page 7 is lost"
    with pytest.raises(AssertionError, match=told):
        guest.test_program(Outcome(), asked)


def test_without_audit_nothing_is_audited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "auditor", lambda config: SimpleNamespace())
    guest.test_program(Outcome(), SimpleNamespace(config=SimpleNamespace(getoption=lambda name, default: "off")))
