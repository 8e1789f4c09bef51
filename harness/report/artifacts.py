# SPDX-License-Identifier: GPL-2.0
"""Writes the evidence of failures as files with stable names: one directory for each failed test.

::

    DIRECTORY/debian-6.12-x86_64/test_merge/test_a_move-plain/console.txt
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from harness import paths
from harness.errors import HostError, UsageError
from harness.host.cache import host_trouble
from harness.report import record
from harness.report.record import Item

#: Directories of runs that are kept below the user's state directory.
KEPT = 10

#: The file of each section, by the beginning of its title. Sections with the same file follow each other there.
_FILES = {
    "failure": "failure.txt",
    "kernel console": "console.txt",
    "machine": "machine.txt",
    "run it again": "again.txt",
    "memory": "memory.txt",
    "moves": "memory.txt",
    "audit": "audit.txt",
    "Captured": "output.txt",
}

#: A name that the audit gives its picture, see :meth:`harness.audit.live.Auditor.save_picture`.
_PICTURE = re.compile(r"^drawn in (.+\.html)$", re.M)


class Artifacts:
    """The directory of one run. It is made when the first test fails.

    :param directory: where to; None makes one below the user's state directory, and removes all but the last ten there.
    :raises UsageError: if the directory is not empty, or cannot be made.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._asked = directory
        #: where the files are; None while there are none
        self.path: Path | None = None
        self._lock = -1
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if any(directory.iterdir()):
                    raise UsageError(f"{directory} is not empty: give --artifacts a new directory")
            except OSError as error:
                raise UsageError(f"cannot write the artifacts to {directory}: {error.strerror}") from error

    def add(self, item: Item) -> None:
        """Write what there is of a test, if it failed.

        :raises HostError: if the disk is full, or not writable.
        """
        if not item.failed:
            return
        try:
            with host_trouble(self._asked or paths.state_dir()):
                self._write(item)
        except OSError as error:
            raise HostError(f"cannot write the artifacts of {item.test}: {error.strerror}") from error

    def close(self) -> None:
        """Let later runs remove the directory."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _write(self, item: Item) -> None:
        if self.path is None:
            self.path = self._asked or _new_directory()
            # The lock shows that the run is not over, as for the directories of machines (harness/host/rundir.py).
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        directory = self.path / place(item)
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in contents(item).items():
            (directory / name).write_text(text, encoding="utf-8")
        for picture in _PICTURE.findall("\n".join(text for _, text in item.sections))[-1:]:
            _copy_picture(Path(picture), directory / "memory.html")


def place(item: Item) -> Path:
    """The directory of a test below that of its run. It is the same in each run."""
    module, _, name = item.test.partition("::")
    # Labels are unique without their colons, which some systems do not allow in names.
    return Path(_name(item.label.replace(":", "-")), _name(module.rpartition("/")[2].removesuffix(".py")), _name(name))


def contents(item: Item) -> Mapping[str, str]:
    """The texts of a failed test by file name."""
    files: defaultdict[str, list[str]] = defaultdict(list)
    for title, text in item.sections:
        file = next((file for start, file in _FILES.items() if title.startswith(start)), "other.txt")
        files[file].append(f"{title}:\n\n{text}" if file in ("memory.txt", "output.txt", "other.txt") else text)
    texts = {name: "\n\n".join(parts).rstrip("\n") + "\n" for name, parts in files.items()}
    return {"result.json": record.item_line(item), **texts}


def _name(text: str) -> str:
    """A part of a path. If characters have to be replaced, a digest keeps different names different."""
    plain = text.replace("[", "-").replace("]", "")
    name = re.sub(r"[^A-Za-z0-9._+=~-]+", "-", plain).strip("-.")[:100]
    return name if name and name == plain else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _copy_picture(picture: Path, to: Path) -> None:
    """Copy a picture of the audit, if the section names a real one: guests take part in the text."""
    with contextlib.suppress(OSError):
        if picture.resolve().parent == (paths.state_dir() / "audits").resolve():
            shutil.copyfile(picture, to)


def _new_directory() -> Path:
    """A directory that no other run has, below the user's state directory."""
    parent = paths.state_dir() / "artifacts"
    parent.mkdir(parents=True, exist_ok=True)
    path = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    path.mkdir()
    for old in sorted(each for each in parent.iterdir() if each.is_dir())[:-KEPT]:
        _remove(old)
    return path


def _remove(directory: Path) -> None:
    """Remove the directory of an earlier run, unless that run is still going on."""
    with contextlib.suppress(OSError):
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)
