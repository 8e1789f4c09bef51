# SPDX-License-Identifier: GPL-2.0
"""The C programs in docs/findings/ show their bug on a kernel that has it, and nothing on one that has not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.build import builder
from harness.errors import HostError
from harness.judging.findings import known
from tests.findings_page import FINDINGS, load, series_with, series_without
from tests.lab import Case, Lab

#: as docs/findings/ says, and with every warning an error
_GCC = ("gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-pthread")
_SHOWN, _NOT_SHOWN = 1, 0
#: findings that take a configuration which no packaged kernel has
_ONLY_BUILT = {name for name, finding in known().items() if finding.kernel}
#: how many CPUs a program needs, if more than one
_CPUS = {"uffd-move-deadlock": 3}
#: what a kernel with the bug reports when the program ends
_COMPLAINTS = {"uprobe-merge": "the kernel complained during this test: BUG: Bad rss-counter state"}

#: Runs in the guest, and finds the programs beside it: all files of a directory of guest tests travel into the guest.
_GUEST_TEST = '''
"""Runs the programs beside this file, and looks whether they leave KSM's settings as they were."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXPECTED = json.loads((HERE / "expected.json").read_text())
KSM = Path("/sys/kernel/mm/ksm")
KNOBS = ("run", "sleep_millisecs", "pages_to_scan", "smart_scan", "advisor_mode")


def knobs():
    return {name: (KSM / name).read_text() for name in KNOBS if (KSM / name).exists()}


@pytest.mark.guest_timeout(120)
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_says(name):
    program = shutil.copy(HERE / name, "/tmp")
    Path(program).chmod(0o755)
    for knob, value in (("sleep_millisecs", 33), ("pages_to_scan", 77), ("run", 1)):
        (KSM / knob).write_text(str(value))
    before = knobs()
    done = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert knobs() == before, f"{name} changed a setting of KSM"
    said = f"status {done.returncode}\\n{done.stdout}"
    assert done.returncode == EXPECTED[name], said


@pytest.mark.shared_guest
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_says_what_is_missing(name):
    program = shutil.copy(HERE / name, "/tmp")
    Path(program).chmod(0o755)
    before = knobs()
    done = subprocess.run([program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, user=65534)
    assert knobs() == before
    said = f"status {done.returncode}\\n{done.stdout}"
    assert done.returncode == 77, said
    assert "needs root" in done.stdout, said
'''


def _expected() -> dict[str, dict[str, int]]:
    """By kernel: the exit status of each program that is to run there."""
    expected: dict[str, dict[str, int]] = {}
    measured = [each for each in load() if each.arch == "x86_64"]
    for name in (each for each in known() if each not in _ONLY_BUILT):
        for series, status in (
            (series_with(name, measured), _SHOWN),
            (series_without(name, measured), _NOT_SHOWN),
        ):
            if series:
                expected.setdefault(f"debian:{series}", {})[name] = status
    return expected


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Every program, compiled."""
    if shutil.which(_GCC[0]) is None:
        pytest.skip("needs gcc")
    made = {}
    for source in sorted(FINDINGS.glob("*.c")):
        made[source.stem] = tmp_path_factory.mktemp("programs") / source.stem
        done = subprocess.run([*_GCC, "-o", made[source.stem], source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture
def own_lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


def test_every_program_runs_somewhere() -> None:
    run = {name for programs in _expected().values() for name, status in programs.items() if status == _SHOWN}
    assert run == set(known()) - _ONLY_BUILT


@pytest.mark.parametrize("kernel", sorted(_expected()))
def test_programs_say_whether_the_kernel_has_the_bug(kernel: str, programs: Mapping[str, Path], own_lab: Lab) -> None:
    _assert_programs_end(own_lab, kernel, programs, _expected()[kernel])


def test_a_program_that_ends_otherwise_is_noticed(programs: Mapping[str, Path], own_lab: Lab) -> None:
    name = next(name for name, status in _expected()["debian:7.3"].items() if status == _NOT_SHOWN)
    with pytest.raises(AssertionError, match="status 0"):
        _assert_programs_end(own_lab, "debian:7.3", programs, {name: _SHOWN})


@pytest.mark.builds_kernel
def test_no_bug_is_left_with_the_fixes(programs: Mapping[str, Path], own_lab: Lab) -> None:
    """On the newest series, with every patch in docs/findings/."""
    kernel = f"linux-source-7.3+{FINDINGS}"
    _build(kernel)
    _assert_programs_end(own_lab, kernel, programs, dict.fromkeys(sorted(set(known()) - _ONLY_BUILT), _NOT_SHOWN))


@pytest.mark.builds_kernel
def test_a_bug_that_takes_fault_injection_shows_on_a_kernel_that_has_it(
    programs: Mapping[str, Path], own_lab: Lab
) -> None:
    _build("unpatched")
    _assert_programs_end(own_lab, "unpatched", programs, dict.fromkeys(sorted(_ONLY_BUILT), _SHOWN))


def _build(kernel: str) -> None:
    """Build a kernel, which takes longer than a lab waits."""
    try:
        builder.Toolchain.of(X86_64)
        builder.check_host()
    except HostError as error:
        pytest.skip(str(error))
    subprocess.run([sys.executable, "-m", "harness.commands.cli", "shell", f"--kernel={kernel}", "true"], check=True)


def _assert_programs_end(lab: Lab, kernel: str, programs: Mapping[str, Path], expected: Mapping[str, int]) -> None:
    """Run programs on a kernel: as root, each in a guest of its own, and as nobody."""
    path = lab.write("test_programs.py", _GUEST_TEST)
    for cpus in sorted({_CPUS.get(name, 1) for name in expected}):
        some = {name: status for name, status in expected.items() if _CPUS.get(name, 1) == cpus}
        for name in some:
            shutil.copy(programs[name], lab.root / "checks")
        (lab.root / "checks" / "expected.json").write_text(json.dumps(some))
        outcome = lab.run(path, "--arch=x86_64", f"--guest-cpus={cpus}", kernel=kernel)
        assert len(outcome.cases) == 2 * len(some), outcome.output
        assert not {each.message for each in outcome.cases if not _as_expected(each, some)}, outcome.output


def _as_expected(case: Case, expected: Mapping[str, int]) -> bool:
    """Whether a program ended as expected, and the kernel reported nothing but the bug that the program shows."""
    name = next(name for name in expected if case.parameters.endswith(f"-{name}"))
    if case.name != "test_it_says" or name not in _COMPLAINTS or expected[name] != _SHOWN:
        return case.outcome == "passed"
    return _COMPLAINTS[name] in case.message and "The test itself failed as well" not in case.text


_COMPLAINT = _COMPLAINTS["uprobe-merge"]


@pytest.mark.parametrize(
    ("outcome", "text", "status", "is_expected"),
    [
        ("failure", _COMPLAINT, _SHOWN, True),
        ("failure", f"{_COMPLAINT}\n\nThe test itself failed as well:\nstatus 77", _SHOWN, False),
        ("failure", "the kernel complained during this test: WARNING", _SHOWN, False),
        ("passed", "", _SHOWN, False),
        ("failure", _COMPLAINT, _NOT_SHOWN, False),
        ("passed", "", _NOT_SHOWN, True),
    ],
)
def test_only_the_report_of_the_bug_itself_is_expected(outcome: str, text: str, status: int, is_expected: bool) -> None:
    message = text.partition("\n")[0]
    case = Case("test_it_says", "debian:6.1-x86_64-uprobe-merge", outcome, message, text, {})
    assert _as_expected(case, {"uprobe-merge": status}) == is_expected
