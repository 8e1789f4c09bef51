# SPDX-License-Identifier: GPL-2.0
"""The guest's userland and the archives that are laid over it.

The userland is a cpio archive made from Debian packages as ``images/userland.toml`` lists them: read, never
executed, so that a foreign architecture needs neither root nor emulation.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
import stat
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO

from harness import cpio, paths
from harness.modules import Module

RECIPE = paths.PROJECT / "images" / "userland.toml"
INIT = paths.PROJECT / "images" / "init"

#: What the agent needs from the host's environment: pure Python, and the same version on both sides, so that a
#: report written by the one is understood by the other.
SHARED_DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")

#: pytest imports pygments to colour tracebacks; of its hundreds of lexers and styles it needs these few.
_PYGMENTS_EXTRAS = re.compile(r"pygments/(lexers|formatters|styles)/(?!__init__|_mapping|python|diff|terminal)")


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


def userland(recipe: Recipe, packages: Iterable[Iterable[tuple[tarfile.TarInfo, IO[bytes] | None]]]) -> bytes:
    """The userland as a cpio archive.

    :param packages: the members of each package, as :func:`harness.deb.members` gives them.
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


def _agent_files() -> Iterator[tuple[str, bytes]]:
    """The agent and pytest: what must be on PYTHONPATH in a guest."""
    package = Path(__file__).parent
    yield "harness/__init__.py", (package / "__init__.py").read_bytes()
    for path in sorted((package / "agent").glob("*.py")):
        yield f"harness/agent/{path.name}", path.read_bytes()
    for name in SHARED_DISTRIBUTIONS:
        for file in metadata.files(name) or ():
            wanted = file.suffix == ".py" or file.name in ("METADATA", "entry_points.txt")
            if wanted and not _PYGMENTS_EXTRAS.match(str(file)):
                yield str(file), Path(str(file.locate())).read_bytes()


@cache
def agent_layer() -> bytes:
    """The agent and pytest for the initramfs, under /harness."""
    return cpio.archive(cpio.file(f"harness/{name}", data) for name, data in _agent_files())


@cache
def agent_tar() -> bytes:
    """The same for a machine that is no VM, as a compressed tar archive."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as tar:
        for name, data in _agent_files():
            _add(tar, name, data)
    return out.getvalue()


def modules_layer(modules: Iterable[Module]) -> bytes:
    """Kernel modules, named so that init loads them in this order."""
    return cpio.archive(
        cpio.file(f"modules/{number:02}-{module.name}.ko", module.data) for number, module in enumerate(modules)
    )


def config_layer(config: Mapping[str, str]) -> bytes:
    """The kernel's configuration, for tests that skip by option; in the form of a .config file.

    Without one there is only the directory: tests must not take "unknown" for "off".
    """
    text = "".join(f"CONFIG_{name}={value}\n" for name, value in sorted(config.items()))
    entries = [cpio.file("etc/harness/config", text.encode())] if config else []
    return cpio.archive([cpio.directory("etc/harness"), *entries])


#: What pytest.ini says in the guest. The host's own configuration is about the host.
PYTEST_INI = "[pytest]\naddopts = --strict-markers\npythonpath = .\nmarkers =\n"

#: The library for guest tests. It goes along with tests that live elsewhere.
LIBRARY = paths.PROJECT / "guest_tests"


def tests_archive(directory: Path, markers: Iterable[str]) -> bytes:
    """The guest's tests as a tar archive that depends on nothing but their contents.

    :param directory: holds the tests; lands under its own name.
    :param markers: the registered markers, for pytest's strict mode.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        ini = PYTEST_INI + "".join(f"    {marker}\n" for marker in markers)
        _add(tar, "pytest.ini", ini.encode())
        library = {name: path for name, path in _sources(LIBRARY).items() if not path.match("test_*.py")}
        for name, path in sorted({**library, **_sources(directory)}.items()):
            _add(tar, name, path.read_bytes())
    return out.getvalue()


def _sources(directory: Path) -> dict[str, Path]:
    """The Python files below a directory, by their names in the archive."""
    return {str(Path(directory.name) / path.relative_to(directory)): path for path in directory.rglob("*.py")}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
