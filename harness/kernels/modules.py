# SPDX-License-Identifier: GPL-2.0
"""Chooses the kernel modules that a guest needs, in the order in which they must be loaded.

The guest has no kmod. It passes uncompressed ``.ko`` files to ``init_module(2)`` one after the other. Dependencies are
read from the modules themselves (section ``.modinfo``), because packages and build trees have no ``modules.dep``:
``depmod`` writes it when a kernel is installed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.errors import SpecError
from harness.host.compression import DamagedError, decompress


@dataclass(frozen=True)
class Wanted:
    """A module that guests get if the kernel has it."""

    #: the name with underscores, as ``lsmod`` shows it
    name: str
    #: the option that builds it, without ``CONFIG_``
    option: str
    #: what the kernel lacks without this module, for the error message; None if guests work without it
    vital: str | None = None


#: The modules in load order. Dependencies of each are loaded before it. It is an error if a vital one is missing.
WANTED = (
    Wanted("virtio_pci", "VIRTIO_PCI", "virtio over PCI"),  # the bus of all virtio devices below
    Wanted("virtio_console", "VIRTIO_CONSOLE", "virtio console"),  # the agent talks to the host through it
    Wanted("virtio_rng", "HW_RANDOM_VIRTIO"),  # CPython cannot start without random numbers
    Wanted("qemu_fw_cfg", "FW_CFG_SYSFS"),  # gives QEMU the vmcoreinfo that is needed to read dumps
    Wanted("pvpanic", "PVPANIC"),  # the common part of the next two, which report a panic to the host
    Wanted("pvpanic_pci", "PVPANIC_PCI"),
    Wanted("pvpanic_mmio", "PVPANIC_MMIO"),  # also the driver of the ISA device on x86
    Wanted("lzo_rle", "CRYPTO_LZO"),  # zram's default compressor before 6.12, used through the crypto API
    Wanted("lz4", "CRYPTO_LZ4"),  # for zram with lz4 before 6.12
    Wanted("zram", "ZRAM"),  # swap in memory
    Wanted("hwpoison_inject", "HWPOISON_INJECT"),  # poisons and unpoisons a page frame
)


@dataclass(frozen=True)
class Module:
    """A module in the form that ``init_module(2)`` takes."""

    name: str
    #: the uncompressed ELF file
    data: bytes


@dataclass(frozen=True)
class ModuleTree:
    """The modules of one kernel.

    :param directory: ``lib/modules/<release>``, or a build tree.
    :param files: the file of each module, by the module's name with underscores.
    :param builtin: names of modules that are built into the image, from ``modules.builtin``.
    """

    directory: Path
    files: Mapping[str, Path]
    builtin: frozenset[str]

    @classmethod
    def of(cls, directory: Path) -> ModuleTree:
        """The modules below ``lib/modules/<release>``, or those that a build tree's ``modules.order`` lists."""
        order = directory / "modules.order"
        if (directory / "Kbuild").exists() or (directory / "include/config/kernel.release").exists():
            # modules.order lists .o files since 6.3, and .ko files before. Walking the whole tree would take seconds.
            listed = order.read_text().split() if order.exists() else []
            paths = [directory / Path(line).with_suffix(".ko") for line in listed]
        else:
            paths = [Path(top, name) for top, _, names in os.walk(directory) for name in names if ".ko" in name]
        return cls(directory, {_name(path): path for path in sorted(paths)}, _builtin(directory))


def select(tree: ModuleTree | None, config: Mapping[str, str], wanted: Sequence[Wanted] = WANTED) -> list[Module]:
    """Choose the wanted modules and everything they depend on. Each module comes after its dependencies.

    Modules that are built in or do not exist are left out. The same input gives the same list.

    :param tree: the kernel's modules; None if they are not available.
    :param config: the kernel's options, see :class:`harness.kernels.kernel.Kernel`; empty if unknown.
    :raises SpecError: if the kernel lacks a vital module, or a module cannot be read.
    """
    chosen: dict[str, Module] = {}
    for want in wanted:
        if want.name in (tree.builtin if tree else ()) or config.get(want.option) == "y":
            continue
        if tree and want.name in tree.files:
            _add(tree, want.name, chosen, frozenset())
        elif want.vital and config:
            raise SpecError(_lacking(want, want.vital, config.get(want.option) == "m"))
    return list(chosen.values())


def _lacking(want: Wanted, what: str, is_module: bool) -> str:
    option = f"CONFIG_{want.option}"
    if is_module:
        return (
            f"this kernel has {what} as a module, but its modules are not available: "
            f"build them (make modules), or set {option}=y"
        )
    return f"this kernel has no {what}, so the agent cannot talk to the host: set {option}=y (or =m) and build it again"


def _add(tree: ModuleTree, name: str, chosen: dict[str, Module], above: frozenset[str]) -> None:
    if name in chosen or name in above or name not in tree.files:
        return  # already chosen, a cycle of soft dependencies, built in, or missing: then insmod fails in the guest
    data = load(tree.files[name])
    info = modinfo(data)
    needs = [need for line in info.get("depends", []) for need in line.split(",") if need]
    for line in info.get("softdep", []):
        needs += line.partition("pre:")[2].partition("post:")[0].split()
    for need in needs:
        _add(tree, need.replace("-", "_"), chosen, above | {name})
    chosen[name] = Module(name, data)


def load(path: Path) -> bytes:
    """Read a module file and decompress it.

    :raises SpecError: if the file does not exist, is damaged, or is not a module.
    """
    try:
        data = path.read_bytes()
        if name := _SUFFIXES.get(path.suffix):
            data = decompress(name, data)
    except OSError as error:
        raise SpecError(f"cannot read the module {path}: {error.strerror}; build the modules (make modules)") from None
    except DamagedError as error:
        raise SpecError(f"the module {path} is damaged: {error}") from None
    if data[:4] != b"\x7fELF":
        raise SpecError(
            f"{path} is not a kernel module, because it is not an ELF file: build the modules (make modules)"
        )
    return data


_SUFFIXES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def modinfo(data: bytes) -> dict[str, list[str]]:
    """Read the ``key=value`` strings of a module's section ``.modinfo`` (include/linux/module.h), in order.

    :param data: an uncompressed 64-bit little-endian ELF file.
    :raises SpecError: if ``data`` is not such a file.
    """
    try:
        table = struct.unpack_from("<Q", data, 0x28)[0]
        size, count, names = struct.unpack_from("<HHH", data, 0x3A)
        headers = [struct.unpack_from("<IIQQQQ", data, table + index * size) for index in range(count)]
        strings = headers[names][4]
        for header in headers:
            start = strings + header[0]
            if data[start : start + 9] == b".modinfo\0":
                section = data[header[4] : header[4] + header[5]]
                break
        else:
            return {}
    except (struct.error, IndexError):
        raise SpecError(
            "a kernel module is damaged, its ELF section headers cannot be read: build the modules (make modules)"
        ) from None
    found: dict[str, list[str]] = {}
    for entry in section.decode("utf-8", "replace").split("\0"):
        key, equals, value = entry.partition("=")
        if equals:
            found.setdefault(key, []).append(value)
    return found


def _name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _builtin(directory: Path) -> frozenset[str]:
    try:
        lines = (directory / "modules.builtin").read_text().split()
    except OSError:
        return frozenset()
    return frozenset(_name(Path(line).with_suffix(".ko")) for line in lines)
