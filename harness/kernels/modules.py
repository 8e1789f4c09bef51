# SPDX-License-Identifier: GPL-2.0
"""Chooses the kernel modules a guest needs, in the order in which they load.

The guest has no kmod: it hands plain ``.ko`` bytes to ``init_module(2)`` one after the other. Dependencies are read
from the modules themselves (section ``.modinfo``), because ``modules.dep`` is made by ``depmod`` at installation, and
packages and build trees come without.
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
    """A module that guests are given if the kernel has it."""

    #: with underscores, as ``lsmod`` shows it
    name: str
    #: the option that builds it, without its prefix
    option: str
    #: completes "this kernel has no …" where nothing works without it, else None
    vital: str | None = None


#: In the order in which they are loaded, after what they depend on. Absent ones are passed over unless vital.
WANTED = (
    Wanted("virtio_pci", "VIRTIO_PCI", "virtio over PCI"),  # the bus of every device below
    Wanted("virtio_console", "VIRTIO_CONSOLE", "virtio console"),  # the agent's channel
    Wanted("virtio_rng", "HW_RANDOM_VIRTIO"),  # CPython dies without random numbers
    Wanted("qemu_fw_cfg", "FW_CFG_SYSFS"),  # writes vmcoreinfo, which dumps are read by
    Wanted("pvpanic", "PVPANIC"),  # core of the next two, which tell the host of a panic
    Wanted("pvpanic_pci", "PVPANIC_PCI"),
    Wanted("pvpanic_mmio", "PVPANIC_MMIO"),  # also drives the ISA device on x86
    Wanted("lzo_rle", "CRYPTO_LZO"),  # zram's default compressor before 6.12, by way of the crypto API
    Wanted("lz4", "CRYPTO_LZ4"),  # zram with lz4 before 6.12
    Wanted("zram", "ZRAM"),  # swap in memory
    Wanted("hwpoison_inject", "HWPOISON_INJECT"),  # poisons and unpoisons by PFN
)


@dataclass(frozen=True)
class Module:
    """A module ready for ``init_module(2)``."""

    name: str
    #: uncompressed
    data: bytes


@dataclass(frozen=True)
class ModuleTree:
    """The modules of one kernel, wherever they lie.

    :param directory: ``lib/modules/<release>``, or a build tree.
    :param files: each module's file by name (underscores).
    :param builtin: names of what would be modules but is in the image, from ``modules.builtin``.
    """

    directory: Path
    files: Mapping[str, Path]
    builtin: frozenset[str]

    @classmethod
    def of(cls, directory: Path) -> ModuleTree:
        """The modules below ``lib/modules/<release>``, or those that a build tree's ``modules.order`` lists."""
        order = directory / "modules.order"
        if (directory / "Kbuild").exists() or (directory / "include/config/kernel.release").exists():
            # Listed as .o from 6.3 and as .ko before; walking the whole tree would take seconds.
            listed = order.read_text().split() if order.exists() else []
            paths = [directory / Path(line).with_suffix(".ko") for line in listed]
        else:
            paths = [Path(top, name) for top, _, names in os.walk(directory) for name in names if ".ko" in name]
        return cls(directory, {_name(path): path for path in sorted(paths)}, _builtin(directory))


def select(tree: ModuleTree | None, config: Mapping[str, str], wanted: Sequence[Wanted] = WANTED) -> list[Module]:
    """The wanted modules and all they depend on, each after what it depends on.

    What is built in, or does not exist, is left out. The same input gives the same list.

    :param tree: None for a kernel whose modules are not at hand.
    :param config: the kernel's options, see :class:`harness.kernels.grammar.Kernel`; empty if unknown.
    :raises SpecError: if the kernel lacks something vital, or a module cannot be read.
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
            f"this kernel has {what} as a module, but its modules are not at hand: "
            f"build them (make modules), or set {option}=y"
        )
    return f"this kernel has no {what}, so no test can reach it: set {option}=y (or =m) and build it again"


def _add(tree: ModuleTree, name: str, chosen: dict[str, Module], above: frozenset[str]) -> None:
    if name in chosen or name in above or name not in tree.files:
        return  # had already; a cycle of soft dependencies; built in, or not there at all: the guest will tell
    data = load(tree.files[name])
    info = modinfo(data)
    needs = [need for line in info.get("depends", []) for need in line.split(",") if need]
    for line in info.get("softdep", []):
        needs += line.partition("pre:")[2].partition("post:")[0].split()
    for need in needs:
        _add(tree, need.replace("-", "_"), chosen, above | {name})
    chosen[name] = Module(name, data)


def load(path: Path) -> bytes:
    """The bytes of a module file, uncompressed.

    :raises SpecError: if it is not there, damaged, or no module.
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
        raise SpecError(f"{path} is no kernel module: it is not an ELF file")
    return data


_SUFFIXES = {".gz": "gzip", ".xz": "xz", ".zst": "zstd"}


def modinfo(data: bytes) -> dict[str, list[str]]:
    """The ``key=value`` strings of a module's section ``.modinfo`` (include/linux/module.h), in order.

    :param data: an uncompressed 64-bit little-endian ELF file.
    :raises SpecError: if it is none.
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
        raise SpecError("a kernel module is damaged: its ELF section headers are not where they should be") from None
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
