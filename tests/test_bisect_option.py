# SPDX-License-Identifier: GPL-2.0
"""``pytest --bisect``: the exit statuses that ``git bisect run`` goes by. No test here boots."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests.lab import Lab, Outcome
from tests.stage import STAGE

CHECKS = """
    import pytest

    def test_good():
        pass

    def test_bad():
        assert 0, "a page is lost"

    def test_skips():
        pytest.skip("needs CONFIG_KSM")

    def test_no_guest():
        pass

    @pytest.fixture
    def broken():
        raise OSError("no such file")

    def test_broken(broken):
        pass

    def test_stops():
        pass
"""

#: What a kernel does before its tests could run. The environment says which error it is.
READY = """
    import os
    from types import SimpleNamespace

    import stage
    from harness import errors
    from harness.guests import template_store
    from harness.pytest_plugin.target import VirtualTarget

    def fail(where):
        kind, _, message = os.environ.get("LAB_" + where, "").partition(": ")
        if kind:
            raise getattr(errors, kind)(message)

    def prepare(self):
        try:
            fail("PREPARE")
        except errors.UsageError:
            raise
        except errors.HarnessError as error:
            self.broken = error

    VirtualTarget.prepare = prepare
    VirtualTarget.machine = property(lambda self: SimpleNamespace(accelerator=SimpleNamespace(name="tcg", reason="")))
    template_store.boot = lambda machine, progress: fail("BOOT")

    def pytest_runtest_logstart(nodeid):
        if "test_stops" in nodeid:
            raise KeyboardInterrupt
"""

Run = Callable[..., Outcome]


@pytest.fixture
def bisecting(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs chosen checks with ``--bisect``, on a kernel that is as the test says."""
    lab.write("test_it.py", CHECKS)
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))
    (lab.root / "ready.py").write_text(textwrap.dedent(READY))
    # The stage misses tests of that name on this kernel.
    return lambda chosen, *args, kernel="debian:7.3", **env: lab.run(
        "-p", "ready", "--bisect", "-k", chosen, *args, kernel=kernel, env=env
    )


@pytest.mark.parametrize(
    ("chosen", "status", "said"),
    [
        ("test_good or test_skips", 0, "harness: good: 1 passed, 1 skipped"),
        ("test_good or test_bad", 1, "harness: bad: checks/test_it.py::test_bad AssertionError: a page is lost"),
        ("test_no_guest or test_bad", 1, "harness: bad:"),
        ("test_good or test_no_guest", 125, "test_no_guest could not be run: "),
        ("test_good or test_broken", 125, "test_broken broke outside of the test itself: "),
        ("test_skips", 125, "harness: no verdict: all of its tests skip: needs CONFIG_KSM"),
    ],
)
def test_what_the_tests_say_is_the_status(bisecting: Run, chosen: str, status: int, said: str) -> None:
    outcome = bisecting(chosen)
    assert outcome.status == status, outcome.output
    outcome.said(said)


@pytest.mark.parametrize(
    ("trouble", "status", "said"),
    [
        ({"LAB_PREPARE": "BuildError: mm/ksm.c:1 is no C"}, 125, "no verdict: mm/ksm.c:1 is no C"),
        ({"LAB_PREPARE": "PatchError: patch 1 does not apply"}, 125, "no verdict: patch 1 does not apply"),
        ({"LAB_BOOT": "BootError: the agent was not reached"}, 125, "it does not boot: the agent was not reached"),
        ({"LAB_PREPARE": "HostError: the disk is full"}, 128, "the disk is full"),
        ({"LAB_PREPARE": "FetchError: no network"}, 128, "no network"),
        ({"LAB_BOOT": "HostError: no QEMU"}, 128, "no QEMU"),
        ({"LAB_PREPARE": "SpecError: no such kernel"}, 129, "no such kernel"),
    ],
    ids=lambda each: str(each).replace("'", "") if isinstance(each, dict) else "",
)
def test_a_kernel_that_cannot_be_asked_is_skipped_and_trouble_of_the_host_stops_git(
    bisecting: Run, trouble: dict[str, str], status: int, said: str
) -> None:
    outcome = bisecting("test_good", **trouble)
    assert outcome.status == status, outcome.output
    outcome.said(said)
    assert "passed" not in outcome.output, "tests ran on a kernel that cannot be asked"


@pytest.mark.parametrize(
    ("chosen", "trouble", "status", "said"),
    [
        ("test_good or test_bad", {}, 1, "harness: bad: "),
        ("test_good or test_no_guest", {}, 125, "test_no_guest could not be run: "),
        ("test_good", {"LAB_BOOT": "BootError: the agent was not reached"}, 125, "it does not boot: the agent"),
        ("test_good", {"LAB_BOOT": "HostError: no QEMU"}, 128, "no QEMU"),
    ],
)
def test_workers_change_nothing(bisecting: Run, chosen: str, trouble: dict[str, str], status: int, said: str) -> None:
    outcome = bisecting(chosen, "-n", "2", **trouble)
    assert outcome.status == status, outcome.output
    outcome.said(said)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--keep",), "--keep"),
        (("--expect-findings",), "--expect-findings has no place"),
        (("--answer",), "--answer has no place"),
        (("--collect-only",), "--collect-only has no place"),
        (("--fail-on=regressed",), "--fail-on=regressed"),
        (("--kernel=debian:6.12",), "--bisect asks one kernel"),
        (("no_such_file.py",), "no_such_file.py"),
        (("--results=/nowhere/results.jsonl",), "/nowhere/results.jsonl"),
    ],
)
def test_a_wrong_request_stops_git(bisecting: Run, args: tuple[str, ...], said: str) -> None:
    outcome = bisecting("test_good", *args)
    assert outcome.status == 129, outcome.output
    outcome.said(said)


def test_it_needs_a_kernel(bisecting: Run) -> None:
    outcome = bisecting("test_good", kernel="")
    assert outcome.status == 129
    outcome.said("give --kernel")


def test_no_tests_stop_git(bisecting: Run) -> None:
    assert bisecting("no_such_test").status == 129


def test_tests_that_cannot_be_collected_stop_git(bisecting: Run, lab: Lab) -> None:
    lab.write("test_it.py", "def test_good(:\n")
    assert bisecting("test_good").status == 130  # pytest itself calls that an interruption


def test_an_interruption_stops_git(bisecting: Run) -> None:
    assert bisecting("test_good or test_stops").status == 130


def test_an_error_in_the_harness_stops_git(bisecting: Run, lab: Lab) -> None:
    (lab.root / "bug.py").write_text("def pytest_collection_finish():\n    1 // 0\n")
    assert bisecting("test_good", "-p", "bug").status == 128
    (lab.root / "bug.py").write_text("def pytest_sessionstart():\n    1 // 0\n")
    assert bisecting("test_good", "-p", "bug").status == 128


def test_a_full_disk_stops_git_unless_the_kernel_is_known_to_be_bad(bisecting: Run) -> None:
    assert bisecting("test_good", "--results=/dev/full").status == 128
    assert bisecting("test_bad", "--results=/dev/full").status == 1


def test_a_failure_of_the_host_is_no_verdict(bisecting: Run, lab: Lab) -> None:
    (lab.root / "test_host.py").write_text("def test_good_host():\n    assert 0\n")
    outcome = bisecting("test_good", "test_host.py", "checks")
    (lab.root / "test_host.py").unlink()
    assert outcome.status == 125
    outcome.said("something failed that is no guest test")


def test_the_record_has_the_status_that_git_is_given(bisecting: Run, lab: Lab) -> None:
    bisecting("test_skips", "--results=results.jsonl")
    assert '"exit_status": 125' in (lab.root / "results.jsonl").read_text().splitlines()[-1]


def test_without_the_option_pytest_ends_as_ever(bisecting: Run, lab: Lab) -> None:
    assert lab.run("-p", "ready", "-k", "test_no_guest", kernel="debian:7.3").status == pytest.ExitCode.TESTS_FAILED
    assert lab.run("-p", "ready", "no_such_file.py", kernel="debian:7.3").status == pytest.ExitCode.USAGE_ERROR


def test_git_bisect_run_finds_the_commit_that_breaks_a_promise(bisecting: Run, lab: Lab) -> None:
    """What the kernel does stands in a file of the tree, as the word of an error or of a test."""
    tree = lab.root / "tree"
    tree.mkdir()

    def git(*args: str) -> str:
        command = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org", *args]
        return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    for word in ("test_good", "test_good", "BuildError: no C", "test_skips", "test_bad", "test_bad"):
        (tree / "word").write_text(word)
        git("add", "word")
        git("commit", "--quiet", "--allow-empty", "--message", word)
    (lab.root / "step.sh").write_text(
        f"""\
        word=$(cat word)
        cd {lab.root}
        case $word in *Error*) export LAB_PREPARE="$word"; word=test_good;; esac
        exec {sys.executable} -m pytest -p ready --kernel=debian:7.3 --bisect -k "$word"
        """
    )
    git("bisect", "start", "HEAD", "HEAD~5")
    environment = os.environ | {"TMPDIR": str(lab.tmp)}
    done = subprocess.run(
        ["git", "bisect", "run", "sh", str(lab.root / "step.sh")],
        cwd=tree, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    # The two before the first bad one have no verdict, so that git names all three.
    assert "We cannot bisect more!" in done.stdout, done.stdout + done.stderr
    assert git("show", "--no-patch", "--format=%s", "bisect/bad").strip() == "test_bad"
    log = git("bisect", "log")
    assert log.count("git bisect skip") == 2, log
