# SPDX-License-Identifier: GPL-2.0
"""Without ``--kernel`` the plug-in changes nothing. With it, pytest's options work as usual. No test here boots."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest

from harness import paths
from harness.arch import ARM64, X86_64
from harness.report import results
from tests.lab import Lab

HEAVY = (
    "qemu.qmp",
    "paramiko",
    "zstandard",
    "harness.pytest_plugin.session",
    "harness.kernels.grammar",
    "harness.machine.vm",
)

ONE = """
    import pytest

    @pytest.mark.shared_guest
    @pytest.mark.guest_timeout(3)
    def test_one():
        pass
"""


@pytest.fixture
def one(lab: Lab) -> Lab:
    lab.write("test_one.py", ONE)
    return lab


def ids(output: str) -> list[str]:
    return [line for line in output.splitlines() if "::" in line]


def test_importing_it_is_light() -> None:
    program = f"import sys, harness.pytest_plugin.plugin; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_run_of_somebody_elses_tests_loads_nothing_more(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(
        f"import sys\ndef test_theirs():\n    assert [name for name in {HEAVY} if name in sys.modules] == []\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_markers_are_known_without_a_kernel(one: Lab) -> None:
    outcome = one.run("-q", kernel="")
    assert outcome.status == 0
    assert "give --kernel" in outcome["test_one"].message


def test_a_kernel_selects_the_guest_tests_unless_something_is_named(one: Lab) -> None:
    (one.root / "test_host.py").write_text("def test_host():\n    pass\n")
    both = one.run("--collect-only", "-q", ".", kernel="debian:6.12")
    guest = one.run("--collect-only", "-q", kernel="debian:6.12")
    (one.root / "test_host.py").unlink()
    assert len(ids(guest.output)) == 1
    assert ids(guest.output)[0].startswith("checks/test_one.py::test_one[debian:6.12-")
    assert "test_host.py::test_host" in ids(both.output)


def test_a_kernel_without_any_guest_test_is_refused(one: Lab) -> None:
    # As from a second checkout of the project with the first one's pytest: the tests would run on the host.
    (one.root / "test_host.py").write_text("def test_host():\n    raise SystemExit('ran on the host')\n")
    outcome = one.run("test_host.py", "--collect-only", kernel="debian:6.12")
    assert outcome.status == pytest.ExitCode.USAGE_ERROR, outcome.output
    assert "none would run in a guest" in outcome.output


def test_packaged_kernels_do_not_load_the_builder(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from harness.kernels.grammar import parse
        parse("debian:6.12")
        print(*(name for name in sys.modules if name.startswith("harness.build.")))
        parse("unpatched")
        print("harness.build.builder" in sys.modules)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["harness.build.dotconfig", "True"]


def test_kernels_and_architectures_multiply(one: Lab) -> None:
    outcome = one.run("--collect-only", "-q", "--kernel=debian:7.3", "--arch=x86_64", "--arch=arm64")
    assert sorted(ids(outcome.output)) == [
        f"checks/test_one.py::test_one[debian:{version}-{architecture}]"
        for version in ("6.12", "7.3")
        for architecture in (ARM64, X86_64)
    ]


def test_what_counts_instructions_is_left_out_unless_asked_for(one: Lab) -> None:
    (one.root / "checks" / "test_counts.py").write_text(
        "import pytest\n\n@pytest.mark.icount\ndef test_counts():\n    pass\n"
    )
    without = one.run("--collect-only", "-q")
    counting = one.run("--collect-only", "-q", "--icount")
    (one.root / "checks" / "test_counts.py").unlink()
    assert [each.partition("[")[0] for each in ids(without.output)] == ["checks/test_one.py::test_one"]
    assert "1/2 tests collected (1 deselected)" in without.output
    assert [each.partition("[")[0] for each in ids(counting.output)] == [
        "checks/test_counts.py::test_counts",
        "checks/test_one.py::test_one",
    ]


def test_without_an_ini_option_the_projects_own_tests_are_meant_wherever_one_stands(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--kernel=debian:6.12", "-k", "test_question"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert ids(done.stdout)
    assert all("test_question.py::" in line for line in ids(done.stdout))


@pytest.mark.parametrize("parameter", ["plain", "a-b", "with [brackets]", "two::colons"])
def test_the_guest_knows_a_test_by_its_place_below_the_guest_tests(
    request: pytest.FixtureRequest, parameter: str
) -> None:
    """Whatever pytest's root directory is on the host."""
    name = "test_the_guest_knows_a_test_by_its_place_below_the_guest_tests"
    assert results.test_id(request.node, str(paths.PROJECT)) == f"tests/test_plugin.py::{name}[{parameter}]"
    assert results.kernel_label(request.node) == ""


@pytest.mark.parametrize(
    "label", ["debian:6.12-x86_64", "a/b+fix.mbx:64k-arm64", "v6.12~rc1-x86_64", "x[0]", "with-2", "ssh-::1-22"]
)
@pytest.mark.parametrize("parameters", ["", "2", "a-b", "-1", "with [brackets]", "two::colons", "x]", "debian:6.12"])
def test_a_test_is_known_by_its_id_without_the_label_whatever_is_in_either(label: str, parameters: str) -> None:
    class Item:
        nodeid = f"guest_tests/test_a.py::Test::test_a[{label}-{parameters}]" if parameters else f"::test_a[{label}]"
        path = Path("/anywhere/guest_tests/test_a.py")

        class callspec:
            params: ClassVar = {results.KERNEL_PARAMETER: label}

    item: Any = Item()
    own = f"Test::test_a[{parameters}]" if parameters else "test_a"
    assert results.test_id(item, "/anywhere") == f"guest_tests/test_a.py::{own}"


def test_every_option_explains_itself() -> None:
    done = subprocess.run([sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, check=True)
    for option in ("--kernel", "--arch", "--append", "--isolate", "--cold", "--debian-mirror", "guest_tests"):
        assert option in done.stdout


def test_a_wrong_value_is_a_usage_error(one: Lab) -> None:
    assert one.run("--isolate=nothing").status == pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    ("markers", "seconds"),
    [({}, 80), ({"guest_timeout": 20}, 160), ({"storm": None}, 180), ({"storm": None, "guest_timeout": 20}, 260)],
)
def test_a_race_is_added_to_the_time_of_its_test(
    monkeypatch: pytest.MonkeyPatch, markers: dict[str, object], seconds: float
) -> None:
    """Or a long race would end with the loss of its guest, and count as the kernel's failure."""
    from harness.pytest_plugin.testrun import TestRunner

    source = SimpleNamespace(slowdown=8.0, patience=SimpleNamespace(test=80.0))
    monkeypatch.setattr(TestRunner, "_open", lambda self: (SimpleNamespace(source=source), None))
    item = SimpleNamespace(
        config=SimpleNamespace(getoption={"race_seconds": 100}.__getitem__),
        get_closest_marker=lambda name: SimpleNamespace(args=[markers[name]]) if name in markers else None,
    )
    assert TestRunner.__new__(TestRunner)._time_for(cast(pytest.Item, item)) == seconds


PRINTS_SELECTORS = """
    from harness.pytest_plugin.testrun import selector

    def pytest_collection_modifyitems(items):
        for item in items:
            print("selector:", selector(item))
"""


@pytest.mark.parametrize("place", ["elsewhere", "root/checks"])
def test_a_failed_test_is_named_so_that_pytest_finds_it_again(tmp_path: Path, place: str) -> None:
    """Also if the tests do not lie below pytest's root directory, as the project's own where it is installed."""
    root, directory = tmp_path / "root", tmp_path / place
    root.mkdir()
    directory.mkdir(exist_ok=True)
    (root / "pytest.ini").write_text("[pytest]\n")
    (root / "prints.py").write_text(textwrap.dedent(PRINTS_SELECTORS))
    (directory / "test_two.py").write_text("def test_one():\n    pass\n\ndef test_two():\n    pass\n")

    def run(argument: str) -> str:
        command = [sys.executable, "-m", "pytest", "-s", "-p", "prints", "-c", "pytest.ini", "--rootdir=.", argument]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout

    _, second = (line.partition(": ")[2] for line in run(str(directory)).splitlines() if "selector:" in line)
    assert second.endswith("test_two.py::test_two")
    assert "1 passed" in run(second)


def test_pytest_html_keeps_its_option(one: Lab) -> None:
    """Two plug-ins with one option would keep every pytest of the environment from starting."""
    (one.root / "pytest_html.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--html', dest='htmlpath', help='theirs')\n"
    )
    outcome = one.run("-p", "pytest_html", "--html=theirs.html", "--collect-only", env={"PYTHONPATH": str(one.root)})
    (one.root / "pytest_html.py").unlink()
    assert outcome.status == pytest.ExitCode.OK, outcome.output
