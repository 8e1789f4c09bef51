# SPDX-License-Identifier: GPL-2.0
"""Finds the debug information of a kernel: in its build tree, or in the debug package of a Debian kernel.

A debug package has about 350 MB, and the audit needs a few hundred numbers from it. The cache keeps the package and
these numbers, but not the unpacked vmlinux of 400 MB.
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
    """The structure layout of a kernel; the cache keeps it.

    :param archive: the Debian archive, for debug packages.
    :param fetch: whether to fetch the debug package if the cache does not have it. The size is announced first.
    :raises DebugInfoError: if the kernel has no debug information, or ``fetch`` is False and it would be needed.
    :raises FetchError: if the debug package cannot be fetched.
    :raises HostError: if drgn is missing.
    """
    if kernel.arch.page_tables is None:
        raise DebugInfoError(f"there is no audit on {kernel.arch}: leave out --audit")
    cache = archive.cache
    if kernel.vmlinux is not None:
        return layout.of(kernel.vmlinux, cache)
    if kernel.provenance.source != "debian":
        raise DebugInfoError(
            f"{kernel.spec} has no vmlinux, which the audit needs to know the kernel's structures: give a build tree "
            "with CONFIG_DEBUG_INFO_DWARF5"
        )
    name, version = f"linux-image-{kernel.release}-dbg", kernel.provenance.version
    key = f"{name}_{version}_{kernel.arch.debian}-{layout.FORMAT}"
    known = cache.get("layouts", key)
    if known is None and not fetch:
        raise DebugInfoError(f"the debug information of {kernel.release} (about 350 MB) has not been fetched")

    def make(path: Path) -> None:
        archive.progress(f"fetching the debug information of {kernel.release}: about 350 MB, only once")
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
    """Unpack the vmlinux of a debug package, and nothing else; returns its path."""
    target = directory / "vmlinux"
    for member, content in deb.members(package):
        if content is not None and re.fullmatch(
            r"usr/lib/debug/(boot/vmlinux-.+|lib/modules/[^/]+/vmlinux)", member.name
        ):
            with target.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
            return target
    raise DebugInfoError(f"the debug package {package.name} has no vmlinux: this kernel cannot be audited")


def find(build_id: str, vmlinux: Path | None, cache: Cache) -> Layout:
    """The structure layout for a dump: of the given vmlinux, or one that the cache has.

    :param build_id: the build ID of the dump's kernel, in hexadecimal.
    :param vmlinux: None to look in the cache.
    :raises DebugInfoError: if the vmlinux has no debug information, or the cache has none for this build ID.
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
        f"the debug information of the dump's kernel (build ID {build_id}) is not in the cache: give --vmlinux"
    )
