# SPDX-License-Identifier: GPL-2.0
"""Where a kernel keeps what the audit reads: offsets, sizes, constants and addresses, from its DWARF.

Reading the debug information of a distribution's kernel takes seconds and some 350 MB of memory; what the audit needs
of it is a few hundred numbers. They are read once with drgn, and kept as JSON under the kernel's build ID.
"""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.arch import Architecture, of_elf_machine
from harness.errors import HarnessError, HostError
from harness.host.cache import Cache

#: raised when the tables below change
FORMAT = 2

#: struct: members that every kernel since 6.10 has, the first with folio._large_mapcount
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "page": ("flags", "mapping", "_mapcount", "_refcount"),
    "folio": ("mapping", "index", "_mapcount", "_flags_1", "_large_mapcount"),
    "task_struct": ("tasks", "comm", "pid", "mm", "real_parent", "signal", "thread_node"),
    "signal_struct": ("thread_head",),
    "mm_struct": ("pgd", "mm_mt", "mmap_lock"),
    "rw_semaphore": ("count",),
    "maple_tree": ("ma_root",),
    "maple_range_64": ("pivot", "slot"),
    "maple_arange_64": ("pivot", "slot"),
    "vm_area_struct": (
        "vm_start",
        "vm_end",
        "vm_mm",
        "vm_flags",
        "vm_pgoff",
        "anon_vma",
        "anon_vma_chain",
        "vm_ops",
        "vm_file",
    ),
    "anon_vma": ("root", "rwsem", "refcount", "num_children", "num_active_vmas", "parent", "rb_root"),
    "anon_vma_chain": ("vma", "anon_vma", "same_vma", "rb", "rb_subtree_last"),
    "rb_root_cached": ("rb_root", "rb_leftmost"),
    "rb_node": ("__rb_parent_color", "rb_left", "rb_right"),
}

#: struct: members that say by their presence how a kernel works; they differ by version and configuration
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "page": ("compound_head", "compound_info"),
    # the anonymous index of a private file mapping has a place of its own from 7.3 on
    "vm_area_struct": (
        "__vm_anon_pgoff_lo",
        "__vm_anon_pgoff_hi",
        "vm_policy",
        "anon_name",
        "vm_userfaultfd_ctx",
        # who reads a VMA without mmap_lock: counted there from 6.15 on, and in a semaphore of its own before
        "vm_refcnt",
        "vm_lock",
    ),
    "vma_lock": ("lock",),
    "mutex": ("owner",),
    "ksm_stable_node": ("hlist", "kpfn", "rmap_hlist_len"),
    # the walk searches a stored index where there is one (7.3), and the full range where not
    "ksm_rmap_item": ("rmap_list", "anon_vma", "mm", "address", "head", "hlist", "linear_page_index"),
    "ksm_mm_slot": ("slot", "rmap_list"),
    "mm_slot": ("mm_node", "mm"),
}

#: enumerators of the page flags
_FLAGS = ("PG_locked", "PG_head")

#: variables and functions: their address, 0 where there is none
_SYMBOLS = (
    "init_task",
    "efi_mm",
    "swapper_pg_dir",
    "init_top_pgt",
    "vmemmap_base",
    "ksm_mm_head",
    "ksm_thread_mutex",
    "memory_failure",
)

_MASK = (1 << 64) - 1


class DebugInfoError(HarnessError):
    """A vmlinux that cannot be used: no ELF file, no build ID, or no debug information."""


@dataclass(frozen=True)
class Layout:
    """The numbers of one kernel build."""

    #: hexadecimal, of its vmlinux
    build_id: str
    #: the name of its architecture
    arch: str
    #: "struct.member": bytes from the struct's start
    offsets: Mapping[str, int]
    #: "struct": bytes
    sizes: Mapping[str, int]
    #: enumerators
    flags: Mapping[str, int]
    #: link-time addresses, without the offset of address randomisation
    symbols: Mapping[str, int]
    #: elements of maple_range_64.slot and maple_arange_64.slot
    slots: tuple[int, int]
    #: the first swap type that is no swap file (MAX_SWAPFILES); 32 without CONFIG_SWAP
    swap_files: int

    def __getitem__(self, name: str) -> int:
        return self.offsets[name]

    def has(self, name: str) -> bool:
        """Whether this kernel has that member."""
        return name in self.offsets

    def to_json(self) -> str:
        """For keeping."""
        return json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """The inverse of :meth:`to_json`.

        :raises DebugInfoError: if it is of another format.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != FORMAT:
                raise ValueError("another format")
            first, second = values.pop("slots")
            return cls(slots=(int(first), int(second)), **values)
        except (ValueError, KeyError, TypeError) as error:
            raise DebugInfoError(f"what is kept of a kernel's debug information cannot be read: {error}") from error


def of(vmlinux: Path, cache: Cache) -> Layout:
    """The layout of a kernel, from the cache if its debug information was read before.

    :raises DebugInfoError: if the file is no kernel with debug information.
    :raises HostError: if drgn is needed and missing.
    """
    key = f"{build_id(vmlinux)}-{FORMAT}"

    def make(path: Path) -> None:
        cache.progress(f"reading the debug information in {vmlinux}")
        path.write_text(read(vmlinux).to_json())

    return Layout.from_json(cache.file("layouts", key, make).read_text())


def kept(wanted: str, cache: Cache) -> Layout | None:
    """The layout of the kernel with this build ID, if its debug information was read before."""
    path = cache.get("layouts", f"{wanted}-{FORMAT}")
    return Layout.from_json(path.read_text()) if path else None


def read(vmlinux: Path) -> Layout:
    """Read the debug information of a kernel; takes seconds.

    :raises DebugInfoError: if the file is no kernel with debug information.
    :raises HostError: if drgn is missing.
    """
    identity = build_id(vmlinux)
    architecture = _architecture(vmlinux)
    try:
        drgn: Any = importlib.import_module("drgn")  # an extra: type checkers need not find it
    except ImportError as error:
        raise HostError(
            "reading a kernel's debug information takes drgn, which is not installed here: "
            "install this project with the extra 'audit' (pip install -e '.[audit]')"
        ) from error
    program = drgn.Program()
    module = program.extra_module(str(vmlinux), create=True)
    module.address_range = (0, _MASK)
    try:
        module.try_file(str(vmlinux), force=True)
        return _collect(drgn, program, module, identity, architecture)
    except DebugInfoError:
        raise
    except LookupError as error:
        raise DebugInfoError(
            f"{vmlinux} has no debug information for the audit ({str(error)[:200]}): build the kernel with "
            "CONFIG_DEBUG_INFO_DWARF5, or take the vmlinux of the distribution's debug package"
        ) from error
    except Exception as error:  # whatever drgn and elfutils think of a damaged file
        raise DebugInfoError(f"{vmlinux} cannot be read as a kernel with debug information: {error}") from error


def _architecture(vmlinux: Path) -> Architecture:
    """The architecture of an ELF file.

    :raises DebugInfoError: if the audit cannot do anything with it.
    """
    with vmlinux.open("rb") as file:
        (machine,) = struct.unpack_from("<H", file.read(20), 18)
    found = of_elf_machine(machine)
    if found is None or found.page_tables is None:
        raise DebugInfoError(f"{vmlinux} cannot be audited: there is no audit on {found or f'ELF machine {machine}'}")
    return found


def _collect(drgn: Any, program: Any, module: Any, identity: str, architecture: Architecture) -> Layout:
    offsets: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for required, table in ((True, MEMBERS), (False, OPTIONAL)):
        for name, members in table.items():
            try:
                kind = program.type(f"struct {name}")
            except LookupError:
                if required:
                    raise
                continue
            sizes[name] = kind.size
            for member in members:
                if kind.has_member(member):
                    offsets[f"{name}.{member}"] = drgn.offsetof(kind, member)
                elif required:
                    raise DebugInfoError(
                        f"struct {name} of this kernel has no member {member}: it is older than Linux 6.10, the first "
                        "that can be audited, or newer than the audit"
                    )
    bias = module.debug_file_bias

    def address(name: str) -> int:
        try:
            return int(program.symbol(name).address - bias) & _MASK
        except LookupError:
            return 0

    def slots(name: str) -> int:
        return int(program.type(f"struct {name}").member("slot").type.length)

    try:
        swap_files = int(program.variable("swap_info").type_.length)
    except LookupError:
        swap_files = 32
    return Layout(
        build_id=identity,
        arch=architecture.name,
        offsets=offsets,
        sizes=sizes,
        flags={name: int(program.constant(name).value_()) for name in _FLAGS},
        symbols={name: address(name) for name in _SYMBOLS},
        slots=(slots("maple_range_64"), slots("maple_arange_64")),
        swap_files=swap_files,
    )


def build_id(vmlinux: Path) -> str:
    """The build ID of an ELF file, in hexadecimal.

    :raises DebugInfoError: if it is no ELF file of a 64-bit little-endian machine, or has none.
    """
    try:
        with vmlinux.open("rb") as file:
            header = file.read(64)
            if header[:6] != b"\x7fELF\x02\x01":
                raise DebugInfoError(f"{vmlinux} is no vmlinux: it is not a 64-bit little-endian ELF file")
            (sections,) = struct.unpack_from("<Q", header, 40)
            size, count = struct.unpack_from("<HH", header, 58)
            for index in range(count):
                file.seek(sections + index * size)
                entry = file.read(64)
                kind, offset, length = struct.unpack_from("<4xI16xQQ", entry)
                if kind == 7 and length < 1 << 20:  # SHT_NOTE
                    file.seek(offset)
                    for name, note, description in notes(file.read(length)):
                        if (name, note) == (b"GNU", 3):  # NT_GNU_BUILD_ID
                            return description.hex()
    except (OSError, struct.error) as error:
        raise DebugInfoError(f"{vmlinux} cannot be read as a vmlinux: {error}") from error
    raise DebugInfoError(f"{vmlinux} has no build ID: link the kernel with --build-id, which is its default")


def notes(data: bytes) -> list[tuple[bytes, int, bytes]]:
    """Name, type and content of each ELF note; what does not fit is left out."""
    found = []
    offset = 0
    while offset + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, offset)
        name_at = offset + 12
        at = name_at + (name_size + 3 & ~3)
        if at + size > len(data):
            break
        found.append((data[name_at : name_at + name_size].rstrip(b"\0"), kind, data[at : at + size]))
        offset = at + (size + 3 & ~3)
    return found
