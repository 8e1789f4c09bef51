# SPDX-License-Identifier: GPL-2.0
"""What of ours travels into a guest: the agent with pytest, and the tests."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import harness
from harness import paths
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
    """Pack the agent and pytest as a compressed tar archive for a board."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=6) as tar:
        for name, data in _agent_files():
            _add(tar, name, data)
    return out.getvalue()


#: The pytest.ini of the guest. The host's own configuration does not apply there.
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
