# SPDX-License-Identifier: GPL-2.0
"""The guest's archives hold what the recipe says, and the same input gives the same bytes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from harness.kernels.modules import Module
from harness.machine import initramfs, payload, userland
from tests.test_cpio import names

RECIPE = userland.Recipe(
    suite="trixie",
    packages=("one",),
    without=(),
    leave_out=("usr/share/*", "*/left-out-*"),
    symlinks=(("lib", "usr/lib"), ("usr/bin/sh", "busybox")),
    files=(("etc/passwd", "root\n"),),
)


def package(**files: bytes) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The members of a package; double underscores are slashes, a value that starts with @ is a link's target."""
    for name, data in files.items():
        info = tarfile.TarInfo(name.replace("__", "/"))
        info.mode = 0o4755
        if data.startswith(b"@"):
            info.type, info.linkname = tarfile.SYMTYPE, data[1:].decode()
            yield info, None
        else:
            yield info, io.BytesIO(data)


def paths_of(*packages: Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]) -> set[str]:
    return set(names(userland.userland(RECIPE, packages)))


def test_the_projects_recipe_is_well_formed() -> None:
    recipe = userland.Recipe.load()
    assert any(name.startswith("python3") for name in recipe.packages)
    assert not set(recipe.packages) & set(recipe.without)


def test_a_userland_has_the_packages_files_what_scripts_would_have_made_and_init() -> None:
    assert {"usr/bin/tool", "etc/passwd", "usr/bin/sh", "init"} <= paths_of(package(usr__bin__tool=b"elf"))


def test_what_is_to_be_left_out_is_left_out_at_any_depth() -> None:
    found = paths_of(package(usr__share__doc__x=b"", usr__lib__left_out=b"", usr__lib__deep__b=b""))
    assert "usr/share/doc/x" not in found
    assert "usr/lib/deep/b" in found


def test_files_of_unmerged_packages_land_behind_the_symlink() -> None:
    found = paths_of(package(lib__libz=b"elf"))
    assert "usr/lib/libz" in found
    assert "lib" in found
    assert "lib/libz" not in found


@pytest.mark.parametrize("name", ["/etc/x", "./etc/x", "../../etc/x", "a/../../etc/x"])
def test_no_member_leaves_the_archive(name: str) -> None:
    found = paths_of(package(**{name.replace("/", "__"): b"data"}))
    assert not any(path.startswith(("/", "..")) for path in found)


def test_nothing_in_the_guest_is_set_uid() -> None:
    data = userland.userland(RECIPE, [package(usr__bin__su=b"elf")])
    at = data.index(b"usr/bin/su\0") - 110
    assert int(data[at + 14 : at + 22], 16) == 0o100755


def test_the_first_of_two_packages_with_one_path_wins_and_the_recipes_files_win_over_both() -> None:
    data = userland.userland(RECIPE, [package(a=b"first", etc__passwd=b"theirs"), package(a=b"second")])
    assert b"first" in data
    assert b"second" not in data
    assert b"theirs" not in data


def test_a_userland_is_the_same_whenever_it_is_made() -> None:
    one = userland.userland(RECIPE, [package(b=b"2", a=b"1")])
    assert one == userland.userland(RECIPE, [package(a=b"1", b=b"2")])
    assert one != userland.userland(replace(RECIPE, files=()), [package(a=b"1", b=b"2")])


def test_the_agents_layer_is_all_that_pytest_and_the_agent_need(tmp_path: Path) -> None:
    """Run from the layer alone, with no site packages: what is missing shows."""
    data = payload.agent_layer()
    unpacked = tmp_path / "harness"
    at = 0
    while data[at : at + 6] == b"070701":
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1].decode()
        start = (at + 110 + fields[11] + 3) // 4 * 4
        if fields[1] & 0o170000 == 0o100000:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data[start : start + fields[6]])
        at = (start + fields[6] + 3) // 4 * 4
    program = "import harness.agent.__main__, pytest; pytest.main(['--version'])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": str(unpacked), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert pytest.__version__ in done.stdout + done.stderr
    assert not (unpacked / "harness" / "plugin.py").exists()


def test_modules_are_named_in_the_order_they_load() -> None:
    layer = initramfs.modules_layer([Module("virtio_ring", b"1"), Module("virtio", b"2")])
    assert [name for name in names(layer) if name.endswith(".ko")] == [
        "modules/00-virtio_ring.ko",
        "modules/01-virtio.ko",
    ]


def test_the_configuration_comes_in_the_form_of_a_config_file() -> None:
    assert b"CONFIG_KSM=y\nCONFIG_NR_CPUS=8\n" in initramfs.config_layer({"NR_CPUS": "8", "KSM": "y"})


def test_an_unknown_config_is_not_an_empty_one() -> None:
    layer = initramfs.config_layer({})
    assert b"etc/harness\0" in layer
    assert b"etc/harness/config" not in layer, "tests would take every option for switched off"


# ----------------------------------------------------------------------------------------------------------------------
# Tests


def members(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {info.name: (tar.extractfile(info) or io.BytesIO()).read() for info in tar}


@pytest.fixture
def checks(tmp_path: Path) -> Path:
    directory = tmp_path / "checks"
    (directory / "sub").mkdir(parents=True)
    (directory / "test_a.py").write_text("a = 1\n")
    (directory / "sub" / "test_b.py").write_text("b = 1\n")
    (directory / "notes.txt").write_text("stays here\n")
    return directory


def test_tests_travel_under_their_directorys_name_with_the_library_and_an_ini_file(checks: Path) -> None:
    found = members(payload.tests_archive(checks, ["shared_guest: leaves nothing"]))
    assert found["checks/test_a.py"] == b"a = 1\n"
    assert "checks/sub/test_b.py" in found
    assert "checks/notes.txt" not in found
    assert "guest_tests/mm/ksm.py" in found
    assert not any(name.startswith("guest_tests/test_") for name in found)
    assert b"    shared_guest: leaves nothing\n" in found["pytest.ini"]


def test_the_projects_own_tests_travel_whole() -> None:
    found = members(payload.tests_archive(payload.LIBRARY, []))
    assert {f"guest_tests/{path.name}" for path in payload.LIBRARY.glob("test_*.py")} <= found.keys()


def test_an_archive_changes_with_its_contents_and_with_nothing_else(checks: Path) -> None:
    before = payload.tests_archive(checks, [])
    os.utime(checks / "test_a.py", (1, 1))
    (checks / "test_a.py").chmod(0o600)
    assert payload.tests_archive(checks, []) == before
    (checks / "test_a.py").write_text("a = 2\n")
    assert payload.tests_archive(checks, []) != before
