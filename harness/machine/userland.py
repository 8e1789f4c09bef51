# SPDX-License-Identifier: GPL-2.0
"""The guest's userland: a cpio archive made from Debian packages as ``images/userland.toml`` lists them.

The packages are read, never executed, so that a foreign architecture needs neither root nor emulation.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import stat
import tarfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness import paths
from harness.debian import deb
from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels.kernel import Kernel
from harness.machine import cpio

RECIPE = paths.PROJECT / "images" / "userland.toml"


INIT = paths.PROJECT / "images" / "init"


@dataclass(frozen=True)
class Recipe:
    """``images/userland.toml``, typed."""

    suite: str
    packages: tuple[str, ...]
    without: tuple[str, ...]
    leave_out: tuple[str, ...]
    symlinks: tuple[tuple[str, str], ...]
    files: tuple[tuple[str, str], ...]

    @classmethod
    def load(cls, path: Path = RECIPE) -> Recipe:
        """Read the recipe."""
        data = tomllib.loads(path.read_text())
        return cls(
            suite=data["suite"],
            packages=tuple(data["packages"]),
            without=tuple(data["without"]),
            leave_out=tuple(data["leave_out"]),
            symlinks=tuple(data["symlinks"].items()),
            files=tuple(data["files"].items()),
        )


def fetched(kernel: Kernel, cache: Cache, archive: Archive) -> Path:
    """The userland of a kernel's architecture, from the cache if it is there.

    :raises FetchError: if its packages cannot be had.
    """
    recipe = Recipe.load()
    debs = archive.install_set(recipe.packages, kernel.arch, recipe.suite, recipe.without)
    digests = [cache.digest(path) for path in debs]
    own = [RECIPE.read_bytes(), INIT.read_bytes(), Path(__file__).read_bytes()]
    key = hashlib.sha256(b"\0".join([*own, " ".join(digests).encode()])).hexdigest()[:32]

    def make(path: Path) -> None:
        archive.progress(f"assembling the guest's userland for {kernel.arch}")
        path.write_bytes(userland(recipe, map(deb.members, debs)))

    return cache.file("userlands", f"{kernel.arch}-{key}", make)


def userland(recipe: Recipe, packages: Iterable[Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]]]) -> bytes:
    """The userland as a cpio archive.

    :param packages: the members of each package, as :func:`harness.debian.deb.members` gives them.
    """
    left_out = re.compile("|".join(fnmatch.translate(pattern) for pattern in recipe.leave_out))
    merged = dict(recipe.symlinks)
    entries: dict[str, cpio.Entry] = {path: cpio.symlink(path, target) for path, target in recipe.symlinks}
    for members in packages:
        for info, content in members:
            path = _merge_usr(info.name, merged)
            if path and path not in entries and not left_out.match(path) and (entry := _entry(path, info, content)):
                entries[path] = entry
    entries.update({path: cpio.file(path, text.encode()) for path, text in recipe.files})
    entries["init"] = cpio.file("init", INIT.read_bytes(), executable=True)
    # The kernel opens this one for process 1 before anything is mounted.
    ordered = sorted(entries.values(), key=lambda entry: entry.path)
    return cpio.archive(ordered)


def _merge_usr(name: str, symlinks: dict[str, str]) -> str:
    path = os.path.normpath("/" + name).lstrip("/")  # from the root, where ".." leads nowhere
    first, _, rest = path.partition("/")
    if first in symlinks:  # a package that still ships /lib/… lands where the symlink points
        return f"{symlinks[first]}/{rest}" if rest else ""
    return path


def _entry(path: str, info: tarfile.TarInfo, content: IO[bytes] | None) -> cpio.Entry | None:
    if info.isdir():
        return cpio.directory(path)
    if info.issym():
        return cpio.symlink(path, info.linkname)
    if content is not None:
        return cpio.Entry(path, stat.S_IFREG | (info.mode & 0o755), content.read())
    return None  # hard links and device nodes: none of the packages has any
