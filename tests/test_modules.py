# SPDX-License-Identifier: GPL-2.0
"""Modules are chosen together with their dependencies, in load order, and uncompressed."""

from __future__ import annotations

import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from harness.errors import SpecError
from harness.kernels.modules import WANTED, Module, ModuleTree, Wanted, load, modinfo, select
from tests.kernel_files import ko

UNKNOWN: dict[str, str] = {}


def tree(directory: Path, modules: dict[str, bytes], builtin: str = "") -> ModuleTree:
    for name, data in modules.items():
        path = directory / "kernel/drivers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (directory / "modules.builtin").write_text(builtin)
    return ModuleTree.of(directory)


def names(modules: list[Module]) -> list[str]:
    return [module.name for module in modules]


def test_what_a_module_depends_on_comes_before_it(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {
            "virtio_console.ko": ko("port"),
            "port.ko": ko("ring"),
            "ring.ko": ko(),
            "unrelated.ko": ko(),
        },
    )
    assert names(select(modules, UNKNOWN)) == ["ring", "port", "virtio_console"]


def test_soft_dependencies_that_come_first_are_loaded_first(tmp_path: Path) -> None:
    modules = tree(
        tmp_path,
        {"zram.ko": ko(softdep="pre: crc absent post: later"), "crc.ko": ko(softdep="pre: zram"), "later.ko": ko()},
    )
    assert names(select(modules, UNKNOWN)) == ["crc", "zram"]


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"virtio-rng.ko": ko("a-b"), "a_b.ko": ko()})
    assert names(select(modules, UNKNOWN)) == ["a_b", "virtio_rng"]


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstandard.compress)],
)
def test_modules_are_handed_over_uncompressed(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    modules = tree(tmp_path, {f"zram.ko{suffix}": compress(ko())})
    assert select(modules, UNKNOWN) == [Module("zram", ko())]


def test_what_is_built_in_is_left_out(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"pvpanic.ko": ko(), "zram.ko": ko()}, builtin="kernel/drivers/misc/pvpanic.ko\n")
    assert names(select(modules, UNKNOWN)) == ["zram"]
    assert names(select(modules, {"ZRAM": "y", "VIRTIO_PCI": "y", "VIRTIO_CONSOLE": "y"})) == []


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    files = {f"{want.name}.ko": ko() for want in WANTED}
    forth = tree(tmp_path / "forth", files)
    back = tree(tmp_path / "back", dict(reversed(files.items())))
    assert select(forth, UNKNOWN) == select(back, UNKNOWN)
    assert names(select(forth, UNKNOWN)) == [want.name for want in WANTED]


def test_a_kernel_without_virtio_console_is_refused(tmp_path: Path) -> None:
    modules = tree(tmp_path, {"virtio_pci.ko": ko()})
    with pytest.raises(
        SpecError, match="no virtio console, so the agent cannot talk to the host: set CONFIG_VIRTIO_CONSOLE=y"
    ):
        select(modules, {"KSM": "y"})


def test_a_kernel_whose_vital_modules_are_elsewhere_is_refused() -> None:
    with pytest.raises(SpecError, match=r"as a module, but its modules are not available.*CONFIG_VIRTIO_PCI=y"):
        select(None, {"VIRTIO_PCI": "m", "VIRTIO_CONSOLE": "m"})


def test_a_kernel_of_unknown_config_gets_the_benefit_of_the_doubt() -> None:
    assert select(None, UNKNOWN) == []


def test_a_build_tree_has_the_modules_its_order_lists(tmp_path: Path) -> None:
    (tmp_path / "include/config").mkdir(parents=True)
    (tmp_path / "include/config/kernel.release").write_text("9.1.2\n")
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers/zram.ko").write_bytes(ko())
    (tmp_path / "drivers/stale.ko").write_bytes(ko())
    (tmp_path / "modules.order").write_text("drivers/zram.o\ndrivers/virtio-rng.o\n")
    modules = ModuleTree.of(tmp_path)
    assert sorted(modules.files) == ["virtio_rng", "zram"]
    with pytest.raises(SpecError, match=r"virtio-rng\.ko: No such file or directory; build the modules"):
        select(modules, UNKNOWN)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("zram.ko.xz", lzma.compress(ko())[:-40], "is damaged: its xz data ends early"),
        ("zram.ko.zst", b"garbage", "is damaged"),
        ("zram.ko", b"garbage", "it is not an ELF file"),
    ],
)
def test_a_damaged_module_is_named(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    modules = tree(tmp_path, {name: data})
    with pytest.raises(SpecError, match=says) as caught:
        select(modules, UNKNOWN)
    assert name in str(caught.value)


def test_modinfo_of_a_cut_off_module_is_refused() -> None:
    with pytest.raises(SpecError, match="damaged"):
        modinfo(ko("a,b")[:-70])


def test_modinfo_keeps_every_value_of_a_key(tmp_path: Path) -> None:
    assert modinfo(ko("a,b"))["depends"] == ["a,b"]
    path = tmp_path / "x.ko"
    path.write_bytes(ko())
    assert modinfo(load(path))["license"] == ["GPL"]


def test_every_vital_module_has_an_option_to_name() -> None:
    vital = [want for want in WANTED if want.vital]
    assert vital
    assert all(isinstance(want, Wanted) and want.option.isupper() for want in WANTED)
