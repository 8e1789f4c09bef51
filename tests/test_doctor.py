# SPDX-License-Identifier: GPL-2.0
"""``harness doctor`` on this host, and on hosts that lack something."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness import __version__, paths
from harness.arch import ARCHITECTURES, ARM64
from harness.build import builder
from harness.commands import cli, doctor
from harness.commands.doctor import Check, State
from harness.debian import mirror
from harness.errors import HostError
from harness.host import requirements
from harness.host.cache import Cache
from harness.machine import userland
from tests.integration.terminal import Terminal


def _found(name: str) -> Check:
    return next(each for each in doctor.checks() if each.name == name)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it; what is linked there is found."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    # The host's network is not what is tested here; the reserved port 9 of this host answers nobody.
    monkeypatch.setenv(mirror.MIRROR_VARIABLE, "http://127.0.0.1:9/debian")


def _program(directory: Path, name: str, says: str = "") -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


def test_a_host_without_qemu_is_told_how_to_get_it(bare: Path) -> None:
    assert _found("qemu arm64").state is State.MISSING
    assert _found("qemu arm64").remedy == "install qemu-system-arm, as Debian calls it"
    _program(bare, "apt-get")
    assert _found("qemu arm64").remedy.endswith("apt-get install qemu-system-arm")


def test_one_emulator_is_enough_and_none_is_not(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for vital in ("setpriv", "apt-get", "apt-config", "dpkg-deb"):
        _program(bare, vital)
    assert doctor.main() == 1
    assert "No guest can run here yet" in capsys.readouterr().out
    _program(bare, "qemu-system-aarch64", "QEMU emulator version 9.9.9 (something)")
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"ok +qemu arm64 +9\.9\.9", said)
    assert "Guests of arm64 can run here, but without qemu x86_64" in said


def test_a_program_reads_the_same_as_json(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["usable"] is False
    assert told["harness"] == __version__
    checks = {each["name"]: each for each in told["checks"]}
    assert list(checks) == [each.name for each in doctor.checks()]
    assert checks["qemu arm64"] == {
        "name": "qemu arm64",
        "state": "missing",
        "text": "qemu-system-aarch64 is not installed: no arm64 guests",
        "remedy": "install qemu-system-arm, as Debian calls it",
        "vital": False,
    }


def test_without_setpriv_nothing_runs(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program in ("qemu-system-aarch64", "apt-get", "apt-config", "dpkg-deb"):
        _program(bare, program, "version 9.9.9")
    assert doctor.main() == 1
    assert re.search(r"missing +setpriv .*\n +→ .*apt-get install util-linux", capsys.readouterr().out)


def test_a_mirror_out_of_reach_leaves_the_cache() -> None:
    finding = _found("mirror")
    assert finding.state is State.LESS
    assert "not reachable now" in finding.text


def test_a_missing_keyring_is_a_package_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(mirror.KEYRING_VARIABLE, str(tmp_path / "nothing"))
    finding = _found("mirror")
    assert finding.state is State.MISSING
    assert finding.remedy.endswith("apt-get install debian-archive-keyring")


def test_a_small_cache_disk_is_said() -> None:
    finding = doctor._space("cache", Path("/dev/shm/not/there/yet"), 1 << 40, "anything", "buy a bigger one")
    assert finding.state is State.LESS
    assert finding.remedy == "buy a bigger one"


def test_guests_that_are_kept_on_a_disk_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container, whose /dev/shm is small."""
    monkeypatch.setattr(doctor, "_TEMPLATES_NEED", 0)
    finding = doctor._templates(tmp_path / "templates")
    assert finding.state is State.LESS
    assert "/dev/shm cannot hold them" in finding.text
    assert "--shm-size" in finding.remedy
    assert doctor._templates(Path("/dev/shm/templates")).state is State.OK


def test_a_missing_compiler_is_optional(bare: Path) -> None:
    finding = _found("build arm64")
    assert finding.state is State.OPTIONAL
    assert "flex" in finding.remedy


def test_a_build_that_would_fail_is_not_called_possible(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thing that a build cannot do without is missed when it alone is missing."""
    rows = [row for row in requirements.needed([requirements.BUILD], ARM64.machine) if not row.optional]
    assert {"git", "ld", "gelf.h", "openssl/ssl.h", "aarch64-linux-gnu-ld"} <= {row.name for row in rows}

    def build() -> None:
        builder.Toolchain.of(ARM64)
        builder.check_host()

    absent = ""
    monkeypatch.setattr(requirements.Requirement, "found", lambda row: row.name != absent)
    for program in ("apt-get", "dpkg-deb", "apt-config", "gcc", "aarch64-linux-gnu-gcc"):
        _program(bare, program, "a compiler")
    assert _found("build arm64").state is State.OK
    for row in rows:
        absent = row.name
        finding = _found("build arm64")
        assert finding.state is State.OPTIONAL, f"{row.name} is missing, and doctor does not say so"
        assert finding.remedy.endswith(f"apt-get install {row.package}")
        with pytest.raises(HostError, match=f"apt-get install {row.package}$"):
            build()


@pytest.fixture
def no_apt(bare: Path) -> Path:
    """A host that has all that guests need, but apt and dpkg."""
    for program in ("setpriv", "qemu-system-x86_64"):
        _program(bare, program, "version 9.9.9")
    return bare


def test_without_apt_a_userland_must_be_brought(no_apt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 1
    said = capsys.readouterr().out
    assert re.search(r"missing +userland +cannot be made without apt-get and dpkg-deb", said)
    assert "harness userland --output FILE; then here: pytest --kernel=IMAGE --userland=FILE" in said
    assert " mirror " not in said


def test_without_apt_a_userland_in_the_cache_is_enough(no_apt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Cache().file("userlands", f"x86_64-{userland.Recipe.load().digest}-made-elsewhere", lambda path: path.touch())
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert re.search(r"ok +userland +x86_64, in the cache", said)
    assert re.search(r"less +apt-get +not installed", said)
    assert "Try: pytest --kernel=IMAGE" in said


# ----------------------------------------------------------------------------------------------------------------------
# The table of requirements

ROWS = requirements.REQUIREMENTS


def test_the_table_names_the_emulators_that_guests_run_under() -> None:
    """Those of best effort are left to whoever wants them: doctor says how to get them."""
    named = {(row.name, row.package, row.machine) for row in ROWS if row.name.startswith("qemu-")}
    wanted = [each for each in ARCHITECTURES if not each.best_effort]
    assert named == {(each.qemu, each.qemu_package, each.machine) for each in wanted}


def test_the_table_knows_architectures_by_the_names_that_the_harness_knows() -> None:
    assert {(name, each.machine) for each in ARCHITECTURES for name in (each.name, *each.aliases)} == set(
        requirements.MACHINES.items()
    )


def test_a_cross_compiler_is_needed_on_other_machines_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def crossing() -> set[str]:
        return {row.name for each in ARCHITECTURES for row in requirements.needed(["build"], each.machine) if row.cross}

    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert crossing() == {f"{machine}-linux-gnu-{tool}" for machine in ("x86_64", "riscv64") for tool in ("gcc", "ld")}
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert crossing() == {f"{machine}-linux-gnu-{tool}" for machine in ("x86_64", "aarch64") for tool in ("gcc", "ld")}


@pytest.fixture
def fresh(bare: Path) -> Path:
    """A fresh Debian machine: hardly more than what a Makefile's recipes run, and an apt-get that notes its orders."""
    for name in ("sh", "make", "id", "env"):
        (bare / name).symlink_to(str(shutil.which(name, path=os.defpath)))
    (bare / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bare / "sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (bare / "true").write_text("#!/bin/sh\n")
    (bare / "apt-get").write_text(f'#!/bin/sh\necho "$@" >>{bare}/ordered\n')
    for path in bare.iterdir():
        path.chmod(0o755)
    return bare


@pytest.mark.parametrize(
    ("goal", "arch", "packages"),
    [
        ("host", "", ("qemu-system-x86", "qemu-system-arm", "util-linux", "dpkg")),
        ("build-host", "", ("make", "gcc", "binutils", "git", "libelf-dev", "libssl-dev", "ccache")),
        ("build-host", "amd64", ("gcc",) if os.uname().machine == "x86_64" else ("gcc-x86-64-linux-gnu",)),
        ("build-host", "arm64", ("gcc",) if os.uname().machine == "aarch64" else ("gcc-aarch64-linux-gnu",)),
    ],
)
def test_make_installs_what_the_table_says_before_there_is_an_environment(
    fresh: Path, goal: str, arch: str, packages: tuple[str, ...]
) -> None:
    if goal == "build-host":
        packages = tuple(each for each in packages if each != "make")  # make is there, or nothing would run
    command = ["make", "--silent", f"--directory={paths.PROJECT}", goal, f"ARCH={arch}", "PYTHON=python3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    update, install = (fresh / "ordered").read_text().splitlines()
    assert update.split()[0] == "update"
    assert set(packages) <= set(install.split()), install


def test_make_says_what_to_do_where_there_is_no_apt(fresh: Path) -> None:
    (fresh / "apt-get").unlink()
    command = ["make", "--silent", f"--directory={paths.PROJECT}", "host", "PYTHON=python3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "This host has no apt-get. Install what these Debian packages hold" in done.stderr
    assert "qemu-system-x86" in done.stderr


def test_lines_are_aligned_and_remedies_stand_below() -> None:
    out = io.StringIO()
    report = [Check("one", State.OK, "fine"), Check("longer", State.MISSING, "gone", "get it")]
    doctor.print_report(report, out)
    assert out.getvalue().splitlines()[:3] == [
        "  ok        one    fine",
        "  missing   longer gone",
        "                   → get it",
    ]


def test_the_exit_status_is_the_verdict_and_a_pipe_gets_no_colours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness.commands.cli", "doctor"], capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if "can run here. Try" in done.stdout or "but without" in done.stdout else 1)
    assert "\033" not in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(("no_color", "coloured"), [("1", False), ("", True)])
def test_a_person_gets_colours_unless_refused(no_color: str, coloured: bool) -> None:
    with Terminal(
        "harness.commands.cli", "doctor", cwd=Path(os.getcwd()), environment={"NO_COLOR": no_color}
    ) as terminal:
        terminal.status()
    assert ("\033[32mok" in terminal.seen) is coloured
