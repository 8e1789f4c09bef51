# SPDX-License-Identifier: GPL-2.0
"""The project installed from a wheel, and used from directories that have nothing to do with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import harness
from harness import paths
from harness.arch import X86_64
from tests.lab import KERNEL

#: What a wheel is built from, beside the files at the top.
DIRECTORIES = ("harness", "guest_tests", "kernel_configs", "images")

#: Where the wheel holds a directory that it does not hold under its own name.
PLACES = {"kernel_configs": "harness/data/kernel_configs", "images": "harness/data/images"}


@dataclass(frozen=True)
class Installed:
    """The project in a virtual environment of its own."""

    wheel: Path
    venv: Path

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's programs, which nothing leads to but its path."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        program, *arguments = command
        argv = [str(self.venv / "bin" / program), *arguments]
        return subprocess.run(argv, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    def files(self) -> set[Path]:
        """What lies where pip put the project, without the caches that Python keeps of modules it imported."""
        packages = next(self.venv.glob("lib/python*/site-packages"))
        found = [path for name in ("harness", "guest_tests") for path in (packages / name).rglob("*")]
        return {path for path in found if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A wheel of this checkout, installed with what it depends on, as pip is configured on this host."""
    root = tmp_path_factory.mktemp("install")
    source = root / "source"
    for name in DIRECTORIES:
        shutil.copytree(paths.PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.PROJECT / name, source)
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    _checked(sys.executable, *pip, "wheel", "--no-deps", f"--wheel-dir={root}", str(source))
    (wheel,) = root.glob("*.whl")
    _checked(sys.executable, "-m", "venv", str(root / "venv"))
    _checked(str(root / "venv/bin/python"), *pip, "install", str(wheel))
    return Installed(wheel, root / "venv")


def _checked(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr}"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory with nothing in it."""
    directory = tmp_path / "elsewhere"
    directory.mkdir()
    return directory


def passed(done: subprocess.CompletedProcess[str]) -> int:
    """How many tests passed in a run of pytest that was all well."""
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    found = re.search(r"(\d+) passed", said)
    assert found, said
    return int(found[1])


def test_a_wheel_holds_every_file_of_the_checkout(installed: Installed) -> None:
    files = [path for name in DIRECTORIES for path in (paths.PROJECT / name).rglob("*") if path.is_file()]
    wanted = {path.relative_to(paths.PROJECT).as_posix() for path in files if "__pycache__" not in path.parts}
    for name, place in PLACES.items():
        wanted = {re.sub(f"^{name}/", f"{place}/", path) for path in wanted}
    held = {name for name in zipfile.ZipFile(installed.wheel).namelist() if ".dist-info/" not in name}
    assert wanted - held == set(), "list their packages, or the endings of their names, in pyproject.toml"
    assert held - wanted == set()


def test_the_doctor_runs_and_says_which_version_it_is(installed: Installed, elsewhere: Path) -> None:
    doctor = installed.run("harness", "doctor", cwd=elsewhere)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert "can run here" in doctor.stdout
    assert installed.run("harness", "--version", cwd=elsewhere).stdout == f"mremap-harness {harness.__version__}\n"


def test_kernels_to_build_are_known_by_their_names(installed: Installed, elsewhere: Path) -> None:
    command = ("test", "--collect-only", "-q", "--kernel=relocate-anon:kasan", "--arch=x86_64", "-k", "errno")
    done = installed.run("harness", *command, cwd=elsewhere)
    assert "[relocate-anon:kasan-x86_64]" in done.stdout, done.stdout + done.stderr


def test_the_projects_own_tests_run_and_leave_the_installation_as_it_was(installed: Installed, elsewhere: Path) -> None:
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    before = installed.files()
    done = installed.run("harness", "test", "-W", "error", f"--kernel={KERNEL}", "-k", "errno", cwd=elsewhere)
    assert passed(done) >= 1
    assert f"mremap-harness {harness.__version__}\n" in done.stdout
    assert installed.files() == before


def test_harness_test_passes_on_the_exit_status_of_pytest(installed: Installed, elsewhere: Path) -> None:
    assert installed.run("harness", "test", cwd=elsewhere).returncode == pytest.ExitCode.NO_TESTS_COLLECTED
    unknown = installed.run("harness", "test", "--kernel=debian:0.1", "--arch=mips", cwd=elsewhere)
    assert unknown.returncode == pytest.ExitCode.USAGE_ERROR
    (elsewhere / "test_fails.py").write_text("def test_fails():\n    assert False\n")
    assert installed.run("harness", "test", "test_fails.py", cwd=elsewhere).returncode == pytest.ExitCode.TESTS_FAILED


# ----------------------------------------------------------------------------------------------------------------------
# A repository of somebody else's

THEIRS = {
    "pyproject.toml": """
        [tool.pytest.ini_options]
        guest_tests = "tests_in_guest"
        markers = ["theirs: a marker that the harness does not know"]
    """,
    "tests_in_guest/conftest.py": """
        import json
        from pathlib import Path

        import pytest

        @pytest.fixture
        def table():
            return json.loads((Path(__file__).parent / "data" / "table.json").read_text())

        @pytest.fixture
        def filled(area, table):
            return area.map(0, table["pages"]).fill()
    """,
    "tests_in_guest/data/table.json": '{"pages": 4}',
    "tests_in_guest/test_x.py": """
        import os

        import pytest

        from guest_tests.mm.mapping import move

        @pytest.mark.shared_guest
        def test_runs_in_a_guest(request):
            assert os.geteuid() == 0
            assert os.listdir("/sys/class/net") == ["lo"]
            assert "observed" in request.fixturenames, "the library's fixtures are there"

        @pytest.mark.theirs
        def test_moves(filled, area):
            move(filled, area.page(10))
    """,
    "test_host.py": """
        from guest_tests.mm import syscalls

        def test_runs_on_the_host(request):
            assert "site-packages" in syscalls.__file__
            assert request.fixturenames == ["request"], "an autouse fixture of the library has no business here"
    """,
}


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    root = tmp_path / "theirs"
    for name, text in THEIRS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))
    return root


def test_somebody_elses_tests_run_in_guests_and_on_the_host(installed: Installed, theirs: Path) -> None:
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    assert passed(installed.run("pytest", f"--kernel={KERNEL}", ".", cwd=theirs)) == 3


def test_without_a_kernel_somebody_elses_host_tests_run_alone(installed: Installed, theirs: Path) -> None:
    done = installed.run("pytest", cwd=theirs)
    assert passed(done) == 1
    assert "2 skipped" in done.stdout


def test_a_directory_with_the_librarys_name_is_one_clear_error(installed: Installed, theirs: Path) -> None:
    (theirs / "tests_in_guest").rename(theirs / "guest_tests")
    (theirs / "pyproject.toml").write_text('[tool.pytest.ini_options]\nguest_tests = "guest_tests"\n')
    done = installed.run("pytest", f"--kernel={KERNEL}", cwd=theirs)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    (line,) = done.stderr.strip().splitlines()
    assert "has the name of the library that guest tests import: rename the directory" in line
