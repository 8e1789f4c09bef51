# SPDX-License-Identifier: GPL-2.0
"""The guest's userland: a cpio archive made from Debian packages as ``images/userland.toml`` lists them.

The packages are read, never executed, so that a foreign architecture needs neither root nor emulation. On a host
without apt the userland comes from a file that another host made (``harness userland``), or from the cache.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import tomllib
import urllib.parse
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from harness import paths
from harness.arch import ARCHITECTURES, Architecture
from harness.debian import deb
from harness.debian.apt import Archive
from harness.errors import HostError, UsageError
from harness.host.cache import Cache, sha256
from harness.machine import cpio

RECIPE = paths.IMAGES / "userland.toml"

#: The file in a userland that says what it was made from, as JSON: see :class:`Manifest`.
MANIFEST = "etc/harness/userland.json"

#: A program that every userland has; its ELF header tells the architecture.
_WITNESS = "usr/bin/busybox"

#: The group of cache entries that userlands are kept in.
_KIND = "userlands"


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

    @cached_property
    def digest(self) -> str:
        """Changes with what the recipe says, not with its comments."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What a userland was made from."""

    #: the architecture's name
    arch: str
    #: digest of the recipe
    recipe: str
    suite: str
    #: name, version and architecture of each package, as in ``busybox-static 1:1.37.0-6 amd64``
    packages: tuple[str, ...]

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """Read what :meth:`text` wrote.

        :raises ValueError: if it is something else.
        """
        fields: Any = json.loads(data)
        if not isinstance(fields, dict) or not isinstance(fields.get("packages"), list):
            raise ValueError("it lists no packages")
        arch, recipe, suite = (str(fields.get(name)) for name in ("arch", "recipe", "suite"))
        return cls(arch, recipe, suite, tuple(map(str, fields["packages"])))

    def text(self) -> str:
        """The manifest as it stands in the userland."""
        return json.dumps(asdict(self), indent=1) + "\n"


def provided(arch: Architecture, file: Path | None, cache: Cache, archive: Archive) -> Path:
    """The userland for an architecture: the file if one is given, else made here or found in the cache.

    :param file: a userland that ``harness userland`` made; it is copied into the cache.
    :raises UsageError: if the file cannot be used.
    :raises FetchError: if the packages cannot be had.
    :raises HostError: if this host cannot make a userland, and none is in the cache.
    """
    if file is not None:
        return _adopted(file, arch, cache)
    if lacking := lacking_programs():
        if (found := cached(arch, cache)) is not None:
            return found
        raise HostError(
            f"this host has no {' and no '.join(lacking)}, which the guest's userland is made with: make it on a "
            f"Debian machine with {how_to_make(arch)}, and give it here with --userland=FILE"
        )
    return made(arch, cache, archive)


def how_to_make(arch: Architecture) -> str:
    """The command that makes a userland for an architecture, for messages."""
    return f"`harness userland --output FILE --arch {arch}`"


def lacking_programs() -> list[str]:
    """The programs that making a userland takes and this host has not."""
    return [program for program in ("apt-get", "dpkg-deb") if shutil.which(program) is None]


def made(arch: Architecture, cache: Cache, archive: Archive) -> Path:
    """The userland for an architecture, made from today's packages unless it is in the cache.

    :raises FetchError: if the packages cannot be had.
    :raises HostError: if this host has no apt, or no Debian mirror.
    """
    recipe = Recipe.load()
    debs = archive.install_set(recipe.packages, arch, recipe.suite, recipe.without)
    parts = [Path(__file__).read_text(), *(cache.digest(path) for path in debs)]

    def make(path: Path) -> None:
        archive.progress(f"assembling the guest's userland for {arch}")
        manifest = Manifest(arch.name, recipe.digest, recipe.suite, tuple(map(_package, debs)))
        path.write_bytes(userland(recipe, map(deb.members, debs), manifest))

    return cache.file(_KIND, _prefix(arch) + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32], make)


def cached(arch: Architecture, cache: Cache) -> Path | None:
    """The newest userland for an architecture in the cache that today's recipe made, on this host or another."""
    entries = sorted((cache.root / _KIND).glob(f"{_prefix(arch)}*"), key=lambda path: path.stat().st_mtime)
    found = (cache.get(_KIND, entry.name) for entry in reversed(entries))
    return next((path for path in found if path is not None), None)


def manifest_of(path: Path) -> Manifest:
    """What a userland says of itself.

    :raises UsageError: if the file is no userland that ``harness userland`` made.
    """
    manifest, _ = _read(path)
    return manifest


def _adopted(file: Path, arch: Architecture, cache: Cache) -> Path:
    """A checked copy of the file in the cache, where later runs without apt find it."""
    try:
        digest = sha256(file)
    except OSError as error:
        raise UsageError(f"the userland {file} cannot be read: {error.strerror}") from error

    def copy(path: Path) -> None:
        _check(file, arch)
        shutil.copyfile(file, path)

    return cache.file(_KIND, _prefix(arch) + digest[:32], copy)


def _prefix(arch: Architecture) -> str:
    """How the keys of all userlands of today's recipe begin."""
    return f"{arch}-{Recipe.load().digest}-"


def _check(file: Path, arch: Architecture) -> None:
    manifest, machine = _read(file)
    if machine != arch.elf_machine or manifest.arch != arch.name:
        holds = next(
            (f"programs for {each}" for each in ARCHITECTURES if each.elf_machine == machine), "other programs"
        )
        raise UsageError(
            f"the userland {file} holds {holds}, and the kernel is for {arch}: make one with {how_to_make(arch)}"
        )
    if manifest.recipe != Recipe.load().digest:
        raise UsageError(
            f"the userland {file} was made by another version of mremap-harness: make it anew, with this version, "
            f"by {how_to_make(arch)}"
        )


def _read(file: Path) -> tuple[Manifest, int]:
    """The manifest of a userland, and the ``e_machine`` of a program in it."""
    try:
        wanted = {
            entry.path: entry.data for entry in cpio.entries(file.read_bytes()) if entry.path in (MANIFEST, _WITNESS)
        }
    except OSError as error:
        raise UsageError(f"the userland {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(
            f"the userland {file} is no whole cpio archive ({error}): make one on a Debian machine with "
            "`harness userland --output FILE`"
        ) from error
    program = wanted.get(_WITNESS, b"")
    try:
        manifest = Manifest.parse(wanted.get(MANIFEST, b""))
    except ValueError as error:
        raise UsageError(
            f"{file} is a cpio archive, but not a userland: make one on a Debian machine with "
            "`harness userland --output FILE`"
        ) from error
    return manifest, int.from_bytes(program[18:20], "little") if program.startswith(b"\x7fELF") else 0


def _package(path: Path) -> str:
    """Name, version and architecture of a package, from its file's name."""
    return " ".join(urllib.parse.unquote(path.stem).split("_"))


def userland(
    recipe: Recipe, packages: Iterable[Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]]], manifest: Manifest
) -> bytes:
    """The userland as a cpio archive.

    :param packages: the members of each package, as :func:`harness.debian.deb.members` gives them.
    :param manifest: what the userland is to say of itself.
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
    entries[MANIFEST] = cpio.file(MANIFEST, manifest.text().encode())
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
