# SPDX-License-Identifier: GPL-2.0
"""What pytest's users have works for guest tests, or is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.terminal import Terminal
from tests.lab import KERNEL, Lab

SUBTESTS = """
    def test_of_parts(subtests):
        for number in range(3):
            with subtests.test("part", number=number):
                assert number != 1, "the part in the middle"

    def test_of_sound_parts(subtests):
        for number in range(2):
            with subtests.test(number=number):
                assert number < 2
"""

MARKED = """
    import os

    import pytest

    def test_plain():
        pass

    @pytest.mark.xfail(reason="known")
    def test_fails_as_expected():
        assert not os.path.exists("/harness"), "in a guest"

    @pytest.mark.xfail(reason="known")
    def test_passes_unexpectedly():
        assert os.path.exists("/harness")

    @pytest.mark.xfail(reason="known")
    def test_breaks_the_kernel():
        with open("/dev/kmsg", "w") as log:
            log.write("<4>BUG: Bad page state in process python3  pfn:12345\\n")
        assert False, "as expected"

    @pytest.mark.skipif("not os.path.exists('/harness')", reason="asked on the host")
    def test_asks_where_it_runs():
        pass

    @pytest.fixture(params=[1, 2])
    def number(request):
        assert os.path.exists("/harness"), "a fixture was set up on the host"
        return request.param

    def test_has_a_fixture(number):
        assert number
"""


@pytest.fixture(scope="module")
def subtests_run(lab: Lab) -> tuple[Lab, str]:
    lab.write("test_parts.py", SUBTESTS)
    outcome = lab.run("-rA")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    return lab, outcome.output


def test_a_failed_subtest_fails_its_test_and_is_told_by_itself(subtests_run: tuple[Lab, str]) -> None:
    _, output = subtests_run
    assert "SUBFAILED[part] (number='1')" in output or "SUBFAILED[part] (number=1)" in output
    assert "the part in the middle" in output
    assert "contains 1 failed subtest" in output
    assert "infrastructure" not in output


def test_sound_subtests_pass(subtests_run: tuple[Lab, str]) -> None:
    lab, _ = subtests_run
    outcome = lab.run("-k", "sound")
    assert outcome.status == pytest.ExitCode.OK
    assert "1 passed" in outcome.output


def test_marks_and_fixtures_belong_to_the_guest(lab: Lab) -> None:
    lab.write("test_marked.py", MARKED)
    outcome = lab.run("-rA", "-p", "no:randomly")
    assert [(case.name, case.verdict) for case in outcome.cases] == [
        ("test_plain", "PASS"),
        ("test_fails_as_expected", "SKIP"),
        ("test_passes_unexpectedly", "PASS"),
        ("test_breaks_the_kernel", "FAIL"),
        ("test_asks_where_it_runs", "PASS"),
        ("test_has_a_fixture", "PASS"),
        ("test_has_a_fixture", "PASS"),
    ]
    assert "1 failed, 4 passed, 1 xfailed, 1 xpassed" in outcome.output


@pytest.mark.parametrize(("option", "name"), [("--pdb", "--pdb"), ("--trace", "--trace")])
def test_a_debugger_is_refused_with_what_to_use_instead(lab: Lab, option: str, name: str) -> None:
    lab.write("test_plain.py", "def test_plain():\n    pass\n")
    outcome = lab.run(option)
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert f"{name} cannot stop inside a guest: use --keep" in outcome.output


FLAKY = """
    from pathlib import Path

    def test_passes_in_its_second_guest():
        boot = Path("/proc/sys/kernel/random/uuid").read_text()
        assert int(boot[0], 16) == 99, "never"
"""


def plugin(name: str, directory: Path) -> dict[str, str]:
    """The environment of a run that has one plug-in more; skips where it cannot be had."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={directory}"]
    done = subprocess.run([*command, name], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{name} cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    return {"PYTHONPATH": str(directory)}


def test_failures_are_run_again_in_fresh_guests(lab: Lab, tmp_path: Path) -> None:
    """pytest-rerunfailures drives pytest's own protocol, more than once for an item."""
    lab.write("test_flaky.py", FLAKY)
    outcome = lab.run("--reruns=2", "-rR", env=plugin("pytest-rerunfailures", tmp_path / "plugins"))
    assert "1 failed, 2 rerun" in outcome.output
    assert [case.verdict for case in outcome.cases] == ["FAIL"] * 3


def test_allure_sees_guest_tests_like_any_other(lab: Lab, tmp_path: Path) -> None:
    """Allure wraps pytest's hooks for the phases of an item, and learns the outcome from its reports."""
    lab.write("test_marked.py", MARKED)
    environment = plugin("allure-pytest", tmp_path / "plugins")
    lab.run(f"--alluredir={tmp_path / 'allure'}", "-k", "plain or as_expected or breaks", env=environment)
    found = [json.loads(path.read_text()) for path in (tmp_path / "allure").glob("*-result.json")]
    assert {each["name"].partition("[")[0]: each["status"] for each in found} == {
        "test_plain": "passed",
        "test_fails_as_expected": "skipped",
        "test_breaks_the_kernel": "failed",
    }


def test_a_person_sees_what_takes_long_and_a_pipe_does_not(lab: Lab, tmp_path: Path) -> None:
    lab.write("test_new.py", f"def test_new():\n    '''{tmp_path}: new to the template store'''\n")
    with Terminal("pytest", f"--kernel={KERNEL}", cwd=lab.root) as terminal:
        terminal.expect(r"\r\x1b\[Kharness: collecting the tests")
        terminal.expect("1 passed")
        assert terminal.status() == 0
    shown = terminal.seen.replace("\r\n", "\n").split("\n")
    place = next(number for number, each in enumerate(shown) if "collecting the tests" in each)
    assert shown[place].endswith("\r\x1b[K"), f"the line of progress is not taken away: {shown[place]!r}"
    assert shown[place + 1].startswith("checks/test_new.py ."), "the row of dots is torn apart"
    lab.write("test_new.py", f"def test_new():\n    '''{tmp_path}: another one'''\n")
    assert "harness:" not in lab.run().output
