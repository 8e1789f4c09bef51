# SPDX-License-Identifier: GPL-2.0
"""A host without apt and dpkg: the kernel is a file, and so is the guest's userland."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels import grammar, kernel
from tests.lab import KERNEL, Lab

MOVES = """
    from guest_tests.mm.mapping import move

    def test_moves(area):
        move(area.map(0, 4).fill(), area.page(10))
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A kernel as distributions install it: in boot/ with its configuration, and its modules in lib/modules/."""
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    cache = Cache()
    spec = grammar.parse(KERNEL, X86_64)
    assert isinstance(spec, kernel.BootSpec)
    found = spec.resolve(cache, Archive(cache))
    assert found.modules is not None
    root = tmp_path_factory.mktemp("installed")
    (root / "boot").mkdir()
    path = root / "boot" / f"vmlinuz-{found.release}"
    shutil.copy(found.boot_image, path)
    (root / "boot" / f"config-{found.release}").write_text(
        "".join(f"CONFIG_{name}={value}\n" for name, value in found.config.items())
    )
    (root / "lib").symlink_to(found.boot_image.parent / "lib")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The userland, as a Debian machine makes it."""
    path = tmp_path_factory.mktemp("carried") / "userland.cpio"
    done = _harness("userland", f"--output={path}", "--arch=x86_64")
    assert done.returncode == 0, done.stderr
    assert f"sha256 {_sha256(path)}\n" in done.stdout
    assert "busybox-static" in done.stdout
    return path


def _sha256(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout.split()[0]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The environment of a host without apt and dpkg, whose cache is empty."""
    programs = tmp_path_factory.mktemp("bin")
    for directory in reversed(os.environ["PATH"].split(":")):
        for path in Path(directory).glob("*"):
            link = programs / path.name
            if not path.name.startswith(("apt", "dpkg")):
                link.unlink(missing_ok=True)
                link.symlink_to(path)
    assert shutil.which("apt-get", path=str(programs)) is None
    return {"PATH": str(programs), "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


def _harness(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "harness.commands.cli", *arguments]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True, check=False)


def test_without_a_userland_one_line_says_how_to_get_it(
    lab: Lab, image: Path, elsewhere: Mapping[str, str], tmp_path: Path
) -> None:
    env = {**elsewhere, "XDG_CACHE_HOME": str(tmp_path)}
    outcome = lab.run(lab.write("test_moves.py", MOVES), kernel=str(image), env=env)
    assert outcome["test_moves"].verdict == "MISS"
    line = outcome.said("this host has no apt-get")
    assert "harness userland --output FILE --arch x86_64" in line
    assert "give the kernel as a file" not in outcome.output, "it is a file"
    doctor = _harness("doctor", env=env)
    assert doctor.returncode == 1
    assert "→ on a Debian machine: harness userland --output FILE" in doctor.stdout


def test_with_a_userland_guests_run_and_the_cache_keeps_it(
    lab: Lab, image: Path, file: Path, elsewhere: Mapping[str, str]
) -> None:
    test = lab.write("test_moves.py", MOVES)
    first = lab.run(test, f"--userland={file}", kernel=str(image), env=elsewhere)
    assert first.verdicts == {"test_moves": "PASS"}, first.output
    again = lab.run(test, kernel=str(image), env=elsewhere)
    assert again.verdicts == {"test_moves": "PASS"}, again.output
    doctor = _harness("doctor", env=elsewhere)
    assert doctor.returncode == 0, doctor.stdout
    assert "x86_64, in the cache" in doctor.stdout


def test_a_shell_takes_a_userland(image: Path, file: Path, elsewhere: Mapping[str, str]) -> None:
    done = _harness("shell", f"--kernel={image}", f"--userland={file}", "uname -s", env=elsewhere)
    assert done.stdout == "Linux\n", done.stderr


def test_a_file_that_is_no_userland_is_a_usage_error(lab: Lab, image: Path, elsewhere: Mapping[str, str]) -> None:
    outcome = lab.run(lab.write("test_moves.py", MOVES), f"--userland={image}", kernel=str(image), env=elsewhere)
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "is no whole cpio archive" in outcome.said("the userland ")
