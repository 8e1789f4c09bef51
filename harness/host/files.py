# SPDX-License-Identifier: GPL-2.0
"""Writes files that somebody else reads: results, reports, pages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from harness.errors import HostError, UsageError
from harness.host.cache import host_trouble


def check_writable(path: Path) -> None:
    """Check before long work that a file can be written after it.

    :raises UsageError: if it cannot.
    """
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a directory")
    check_creatable(path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UsageError(f"cannot write {path}: it is not yours to write")


def check_creatable(path: Path) -> None:
    """Check before long work that a file or directory can be made after it.

    :raises UsageError: if it cannot.
    """
    parent = path.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise UsageError(f"cannot write {path}: there is no such directory, or it is not yours to write")


def check_distinct(files: Mapping[str, Path]) -> None:
    """Check that no file would overwrite another one.

    :param files: by what each is called in the message.
    :raises UsageError: if two are the same file.
    """
    seen: dict[Path, str] = {}
    for name, path in files.items():
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise UsageError(f"{other} and {name} name the same file {path}: give each a file of its own")


def write(path: Path, text: str) -> None:
    """Write a file that is either the old one or the whole new one at any time. A pipe or a device is written to.

    :raises HostError: if the disk is full, or not writable.
    """
    try:
        with host_trouble(path.parent):
            _write(path, text)
    except OSError as error:
        raise HostError(f"cannot write {path}: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        new.rename(path)
    finally:
        new.unlink(missing_ok=True)
