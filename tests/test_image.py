# SPDX-License-Identifier: GPL-2.0
"""The guest's archives hold what the recipe says, and the same input gives the same bytes."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest

from harness.arch import ARM64, X86_64, Architecture
from harness.debian.apt import Archive
from harness.errors import HostError, UsageError
from harness.host.cache import Cache
from harness.kernels.modules import Module
from harness.machine import cpio, initramfs, payload, userland
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


MADE = userland.Manifest("x86_64", RECIPE.digest, "trixie", ("one 1.0 amd64",))


def paths_of(*packages: Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]) -> set[str]:
    return set(names(userland.userland(RECIPE, packages, MADE)))


def test_the_projects_recipe_is_well_formed() -> None:
    recipe = userland.Recipe.load()
    assert any(name.startswith("python3") for name in recipe.packages)
    assert not set(recipe.packages) & set(recipe.without)


def test_a_userland_has_the_packages_files_and_what_scripts_would_have_made() -> None:
    assert {"usr/bin/tool", "etc/passwd", "usr/bin/sh"} <= paths_of(package(usr__bin__tool=b"elf"))


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
    data = userland.userland(RECIPE, [package(usr__bin__su=b"elf")], MADE)
    at = data.index(b"usr/bin/su\0") - 110
    assert int(data[at + 14 : at + 22], 16) == 0o100755


def test_the_first_of_two_packages_with_one_path_wins_and_the_recipes_files_win_over_both() -> None:
    data = userland.userland(RECIPE, [package(a=b"first", etc__passwd=b"theirs"), package(a=b"second")], MADE)
    assert b"first" in data
    assert b"second" not in data
    assert b"theirs" not in data


def test_a_userland_is_the_same_whenever_it_is_made() -> None:
    one = userland.userland(RECIPE, [package(b=b"2", a=b"1")], MADE)
    assert one == userland.userland(RECIPE, [package(a=b"1", b=b"2")], MADE)
    assert one != userland.userland(replace(RECIPE, files=()), [package(a=b"1", b=b"2")], MADE)


def test_the_agents_layer_is_all_that_pytest_and_the_agent_need(tmp_path: Path) -> None:
    """Run from the layer alone, with no site packages: what is missing shows."""
    unpacked = tmp_path / "harness"
    for entry in cpio.entries(payload.agent_layer()):
        if stat.S_ISREG(entry.mode):
            (tmp_path / entry.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / entry.path).write_bytes(entry.data)
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
    assert not (unpacked / "harness" / "pytest_plugin").exists()
    assert (tmp_path / "init").read_bytes().startswith(b"#!/bin/busybox sh\n"), "the kernel runs /init as process 1"


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
# A userland that another host made


def elf(machine: int) -> bytes:
    """The head of a program for a machine, as far as it is looked at."""
    return b"\x7fELF\2\1\1" + bytes(11) + machine.to_bytes(2, "little") + bytes(44)


def own_recipe(arch: Architecture) -> userland.Manifest:
    return userland.Manifest(arch.name, userland.Recipe.load().digest, "trixie", ("one 1:1.0 amd64",))


@pytest.fixture
def carried(tmp_path: Path) -> Path:
    """A userland for x86_64, carried here in a file."""
    path = tmp_path / "userland.cpio"
    path.write_bytes(userland.userland(RECIPE, [package(usr__bin__busybox=elf(62))], own_recipe(X86_64)))
    return path


def provided(file: Path | None, arch: Architecture = X86_64) -> Path:
    cache = Cache()
    return userland.provided(arch, file, cache, Archive(cache))


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without apt."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def test_a_userland_that_was_given_once_is_in_the_cache_of_a_host_without_apt(bare: None, carried: Path) -> None:
    assert provided(carried).read_bytes() == carried.read_bytes()
    carried.unlink()
    assert "one 1:1.0 amd64" in userland.manifest_of(provided(None)).packages


def test_the_userland_of_another_recipe_is_not_taken_from_the_cache(
    bare: None, carried: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provided(carried)
    monkeypatch.setattr(userland.Recipe, "load", lambda: RECIPE)
    with pytest.raises(HostError, match="this host has no apt-get and no dpkg-deb"):
        provided(None)


def test_a_host_without_apt_is_told_how_to_get_a_userland(bare: None) -> None:
    with pytest.raises(HostError) as caught:
        provided(None, ARM64)
    assert "`harness userland --output FILE --arch arm64`, and give it here with --userland=FILE" in str(caught.value)


def test_the_userland_of_another_architecture_is_refused(carried: Path) -> None:
    with pytest.raises(UsageError, match=r"userland\.cpio holds programs for x86_64, and the kernel is for arm64"):
        provided(carried, ARM64)


def test_the_programs_count_and_not_what_the_userland_says_of_itself(carried: Path) -> None:
    carried.write_bytes(userland.userland(RECIPE, [package(usr__bin__busybox=elf(183))], own_recipe(X86_64)))
    with pytest.raises(UsageError, match="holds programs for arm64, and the kernel is for x86_64"):
        provided(carried)


def test_the_userland_of_another_recipe_is_refused(carried: Path) -> None:
    carried.write_bytes(userland.userland(RECIPE, [package(usr__bin__busybox=elf(62))], MADE))
    with pytest.raises(UsageError, match="was made by another version of mremap-harness"):
        provided(carried)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "is no whole cpio archive"),
        (lambda data: b"\x1f\x8b" + data, "is no whole cpio archive"),
        (lambda data: data[: len(data) // 2], "is no whole cpio archive"),
        (lambda data: data.replace(b"00000000", b"-0000001", 1), "is no whole cpio archive"),
        (lambda data: cpio.archive([cpio.file("init", b"")]), "is a cpio archive, but not a userland"),
        (lambda data: data.replace(b'"packages"', b'"pockages"'), "is a cpio archive, but not a userland"),
    ],
    ids=["empty", "compressed", "cut short", "negative number", "another archive", "no list of packages"],
)
def test_what_is_no_userland_is_refused_in_one_line(carried: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    carried.write_bytes(damage(carried.read_bytes()))
    with pytest.raises(UsageError, match=says) as caught:
        provided(carried)
    assert "\n" not in str(caught.value)


def test_a_userland_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file or directory"):
        provided(tmp_path / "nothing")


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
    (directory / "sub" / "table.csv").write_text("1,2\n")
    return directory


def test_tests_travel_under_their_directorys_name_with_the_library_and_an_ini_file(checks: Path) -> None:
    found = members(payload.tests_archive(checks, ["shared_guest: leaves nothing"]))
    assert found["checks/test_a.py"] == b"a = 1\n"
    assert "checks/sub/test_b.py" in found
    assert found["checks/sub/table.csv"] == b"1,2\n"
    assert "guest_tests/mm/ksm.py" in found
    assert not any(name.startswith("guest_tests/test_") for name in found)
    assert b"    shared_guest: leaves nothing\n" in found["pytest.ini"]


def test_tests_that_live_elsewhere_get_the_librarys_fixtures_and_its_own_tests_have_them(checks: Path) -> None:
    assert b"guest_tests.support.fixtures" in members(payload.tests_archive(checks, []))["conftest.py"]
    assert "conftest.py" not in members(payload.tests_archive(payload.LIBRARY, []))


def test_programs_stay_executable(checks: Path) -> None:
    (checks / "sub" / "tool.sh").write_text("#!/bin/sh\n")
    (checks / "sub" / "tool.sh").chmod(0o755)
    with tarfile.open(fileobj=io.BytesIO(payload.tests_archive(checks, []))) as tar:
        assert tar.getmember("checks/sub/tool.sh").mode == 0o755
        assert tar.getmember("checks/sub/table.csv").mode == 0o644


@pytest.mark.parametrize("name", [".git/config", "sub/__pycache__/test_b.pyc", "old.pyc"])
def test_caches_and_hidden_directories_stay_behind(checks: Path, name: str) -> None:
    (checks / name).parent.mkdir(exist_ok=True)
    (checks / name).write_bytes(b"not wanted")
    assert f"checks/{name}" not in members(payload.tests_archive(checks, []))


def test_hidden_files_travel(checks: Path) -> None:
    (checks / ".config").write_text("CONFIG_KSM=y\n")
    assert members(payload.tests_archive(checks, []))["checks/.config"] == b"CONFIG_KSM=y\n"


def test_more_than_fits_is_refused_and_the_largest_file_is_named(checks: Path) -> None:
    with (checks / "sub" / "dump.bin").open("wb") as file:
        file.truncate(payload.MAX_TESTS)
    with pytest.raises(UsageError, match=r"16\.0 MiB, and at most 16 MiB travel .* sub/dump\.bin, 16\.0 MiB\)$"):
        payload.tests_archive(checks, [])


def test_a_directory_with_the_librarys_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "guest_tests").mkdir()
    with pytest.raises(UsageError, match="has the name of the library that guest tests import: rename the directory"):
        payload.check_tests(tmp_path / "guest_tests")


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing is no directory: the ini option guest_tests names"):
        payload.check_tests(tmp_path / "nothing")


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
