# SPDX-License-Identifier: GPL-2.0
"""What of ours travels into a guest: init, the agent with pytest, and the tests."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import harness
from harness import paths
from harness.errors import UsageError
from harness.machine import cpio

#: The Python packages that the agent takes from the host's environment. They are pure Python. Both sides have the same
#: version, so that the host understands the reports that the guest writes.
SHARED_DISTRIBUTIONS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")


#: Files of pygments that are left out. pytest colours tracebacks with it and needs few of its lexers and styles.
_PYGMENTS_EXTRAS = re.compile(r"pygments/(lexers|formatters|styles)/(?!__init__|_mapping|python|diff|terminal)")


def _agent_files() -> Iterator[tuple[str, bytes]]:
    """Names and contents of the files that must be on PYTHONPATH in a guest: the agent and pytest."""
    package = Path(harness.__file__).parent
    yield "harness/__init__.py", (package / "__init__.py").read_bytes()
    for room in ("agent", "programs"):
        for path in sorted((package / room).glob("*.py")):
            yield f"harness/{room}/{path.name}", path.read_bytes()
    for name in SHARED_DISTRIBUTIONS:
        for file in metadata.files(name) or ():
            wanted = file.suffix == ".py" or file.name in ("METADATA", "entry_points.txt")
            if wanted and not _PYGMENTS_EXTRAS.match(str(file)):
                yield str(file), Path(str(file.locate())).read_bytes()


@cache
def agent_layer() -> bytes:
    """Init for the initramfs, and under /harness the agent and pytest."""
    init = cpio.file("init", (paths.IMAGES / "init").read_bytes(), executable=True)
    return cpio.archive([init, *(cpio.file(f"harness/{name}", data) for name, data in _agent_files())])


@cache
def agent_tar() -> bytes:
    """Pack the agent and pytest as a compressed tar archive for a board."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as tar:
        for name, data in _agent_files():
            _add(tar, name, data)
    return out.getvalue()


#: What pytest.ini says in the guest. The host's own configuration is about the host. Markers that only other projects
#: know are no errors here: whoever is strict about them has collected the tests on the host before.
PYTEST_INI = "[pytest]\npythonpath = .\nmarkers =\n"


#: The library for guest tests. It goes along with tests that live elsewhere.
LIBRARY = paths.GUEST_TESTS

#: pytest's command line in a guest for :data:`LIBRARY`, as the plug-in gives it when nothing else is asked for. Whoever
#: uses both shares one template with it.
LIBRARY_ARGS = ("guest_tests", "--tb=auto")

#: What all files of a directory of tests may hold together, in bytes. They travel in one message to the agent, and
#: each guest keeps them in its memory twice.
MAX_TESTS = 16 << 20

#: The file that gives tests which live elsewhere the fixtures and hooks of the library.
_CONFTEST = b'pytest_plugins = ["guest_tests.support.fixtures"]\n'


def check_tests(directory: Path) -> None:
    """Make sure that a directory of tests can travel.

    :raises UsageError: if it hides the library, holds too much, or cannot be read.
    """
    _tests(directory)


def tests_archive(directory: Path, markers: Iterable[str]) -> bytes:
    """The guest's tests as a tar archive that depends on nothing but their contents.

    :param directory: holds the tests; all its files travel, and land under its own name.
    :param markers: the harness's own markers.
    :raises UsageError: see :func:`check_tests`.
    """
    files = _tests(directory)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        ini = PYTEST_INI + "".join(f"    {marker}\n" for marker in markers)
        _add(tar, "pytest.ini", ini.encode())
        if not directory.samefile(LIBRARY):
            _add(tar, "conftest.py", _CONFTEST)
            files |= {name: path for name, path in _files(LIBRARY).items() if not path.match("test_*.py")}
        for name, path in sorted(files.items()):
            _add(tar, name, path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))
    return out.getvalue()


def _tests(directory: Path) -> dict[str, Path]:
    """The files of a directory of tests, by their names in the archive, if they can travel."""
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory: the ini option guest_tests names the one with the guest tests")
    if directory.name == LIBRARY.name and not directory.samefile(LIBRARY):
        raise UsageError(
            f"{directory} has the name of the library that guest tests import: "
            "rename the directory, and the option guest_tests with it"
        )
    files = _files(directory)
    if secret := next((path for path in files.values() if not os.access(path, os.R_OK)), None):
        raise UsageError(f"{secret} cannot be sent to a guest: this user may not read it")
    sizes = {path: path.stat().st_size for path in files.values()}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__, default=directory)
    if total > MAX_TESTS:
        raise UsageError(
            f"the files below {directory} hold {total / 2**20:.1f} MiB, and at most {MAX_TESTS / 2**20:.0f} MiB travel "
            f"to a guest: keep large files elsewhere (the largest is {largest.relative_to(directory)}, "
            f"{sizes[largest] / 2**20:.1f} MiB)"
        )
    return files


def _files(directory: Path) -> dict[str, Path]:
    """The files below a directory, by their names in the archive; without hidden directories and Python's caches."""
    found: dict[str, Path] = {}
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__" and not name.startswith(".")]
        for path in (Path(parent, name) for name in names):
            if path.is_file() and path.suffix != ".pyc":
                found[str(Path(directory.name) / path.relative_to(directory))] = path
    return found


def _add(tar: tarfile.TarFile, name: str, data: bytes, *, executable: bool = False) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o755 if executable else 0o644
    tar.addfile(info, io.BytesIO(data))
