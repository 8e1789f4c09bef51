# SPDX-License-Identifier: GPL-2.0
"""Keys of cells, made of everything that their results depend on. A cell with the same key need not run again."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

from harness import arch, paths
from harness.debian.apt import Archive
from harness.host.cache import Cache, sha256
from harness.host.process import find_program, version_line
from harness.machine import accelerator, payload
from harness.markers import MARKERS
from harness.matrix.definition import Cell

#: Rooms of the harness that do not change what a test results in.
_WITHOUT = ("harness/bisect/", "harness/matrix/", "harness/mutants/", "harness/commands/")

#: All cells of an architecture have the same QEMU.
_version_line = cache(version_line)


def identity(cell: Cell, cache: Cache, archive: Archive) -> dict[str, str]:
    """What the results of a cell depend on, in words, by name.

    :raises SpecError: if there is no such kernel.
    :raises HarnessError: if that cannot be found out, for example without network.
    """
    architecture = arch.find(cell.arch)
    return {
        "kernel": cell.spec.identify(cache, archive),
        "arguments": json.dumps(cell.arguments),
        "tests": tests_digest(),
        "harness": source_digest(),
        "python": f"{platform.python_version()}, pytest {metadata.version('pytest')}",
        "qemu": _version_line(find_program(architecture.qemu, architecture.qemu_package)),
        "accelerator": accelerator.choose(architecture, icount="--icount" in cell.arguments).name,
    }


def key(parts: Mapping[str, str]) -> str:
    """The key of a cell with this identity."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tests_digest() -> str:
    """Of the guest tests, as a guest gets them now."""
    return hashlib.sha256(payload.tests_archive(payload.LIBRARY, MARKERS)).hexdigest()


def source_digest() -> str:
    """Of the harness's files now, as far as results depend on it, and of the description of the guest's userland."""
    sources = [path for path in (paths.PROJECT / "harness").rglob("*") if path.suffix in (".py", ".S", ".toml")]
    images = [path for path in paths.IMAGES.rglob("*") if path.is_file()]
    return _digest(path for path in (*sources, *images) if not _relative(path).startswith(_WITHOUT))


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{_relative(path)}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _relative(path: Path) -> str:
    return path.relative_to(paths.PROJECT).as_posix()
