# SPDX-License-Identifier: GPL-2.0
"""Finds the debug information of a kernel: its own vmlinux where it was built, a package for Debian's.

A debug package is some 350 MB, of which a few hundred numbers are needed: what stays of it is the package in the cache
and those numbers, not the 400 MB vmlinux.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from harness.audit import layout
from harness.audit.layout import DebugInfoError, Layout
from harness.debian import deb
from harness.debian.apt import Archive
from harness.debian.search import search
from harness.errors import FetchError, HarnessError
from harness.host.cache import Cache
from harness.kernels.kernel import Kernel


def layout_of(kernel: Kernel, archive: Archive, *, fetch: bool) -> Layout:
    """The layout of a kernel; quick once it was found.

    :param archive: where Debian's packages come from; its cache keeps the result.
    :param fetch: whether to fetch a debug package that is not there; its size is told before.
    :raises DebugInfoError: if the kernel has no debug information, or it was not to be fetched.
    :raises FetchError: if its debug package cannot be had.
    :raises HostError: if drgn is missing.
    """
    cache = archive.cache
    if kernel.vmlinux is not None:
        return layout.of(kernel.vmlinux, cache)
    if kernel.provenance.source != "debian":
        raise DebugInfoError(
            f"{kernel.spec} has no vmlinux beside it, which the audit reads the kernel's structures from: give a "
            "build tree, with CONFIG_DEBUG_INFO_DWARF5"
        )
    name, version = f"linux-image-{kernel.release}-dbg", kernel.provenance.version
    key = f"{name}_{version}_{kernel.arch.debian}-{layout.FORMAT}"
    known = cache.get("layouts", key)
    if known is None and not fetch:
        raise DebugInfoError(f"the debug information of {kernel.release} (about 350 MB) was not fetched yet")

    def make(path: Path) -> None:
        archive.progress(f"fetching the debug information of {kernel.release}: about 350 MB, once")
        package = _fetch(archive, kernel, name, version)
        archive.progress(f"reading the debug information of {kernel.release}")
        with tempfile.TemporaryDirectory(prefix="vmlinux-", dir=cache.root) as scratch:
            path.write_text(layout.read(_unpack(package, Path(scratch))).to_json())

    return Layout.from_json(cache.file("layouts", key, make).read_text())


def _fetch(archive: Archive, kernel: Kernel, name: str, version: str) -> Path:
    # The suite is not part of a kernel's provenance. Its debug package is in a suite that has the kernel's version.
    troubles = []
    try:
        found = search(archive, kernel.arch, lambda each: each.version == version)
        for suite in dict.fromkeys(each.suite for each in found.fitting):
            try:
                for path in archive.install_set([f"{name}={version}"], kernel.arch, suite):
                    if path.name.startswith(f"{name}_"):
                        return path
            except FetchError as error:
                troubles.append(str(error))
    except FetchError as error:
        troubles.append(str(error))
    reasons = "; ".join(troubles) or "no suite has it"
    raise FetchError(f"the debug information of {kernel.release} ({name} {version}) cannot be had: {reasons}")


def _unpack(package: Path, directory: Path) -> Path:
    """Write a package's vmlinux, and nothing else of it."""
    target = directory / "vmlinux"
    for member, content in deb.members(package):
        if content is not None and re.fullmatch(
            r"usr/lib/debug/(boot/vmlinux-.+|lib/modules/[^/]+/vmlinux)", member.name
        ):
            with target.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            return target
    raise DebugInfoError(f"{package.name} holds no vmlinux")


def find(build_id: str, vmlinux: Path | None, cache: Cache) -> Layout:
    """The layout for a dump: of the vmlinux that was given, or one that was read before.

    :raises DebugInfoError: if there is none.
    """
    if vmlinux is not None:
        return layout.of(vmlinux, cache)
    for entry in sorted((cache.root / "layouts").glob("*/data")):
        try:
            known = Layout.from_json(entry.read_text())
        except (HarnessError, OSError):
            continue
        if known.build_id == build_id:
            return known
    raise DebugInfoError(
        f"the debug information of the dump's kernel, build ID {build_id}, is not known: give --vmlinux"
    )
