# SPDX-License-Identifier: GPL-2.0
"""What the cache holds, how large it is, when it was last used, and its removal.

Two forms of directories are in the cache. Entries are those of :mod:`harness.host.cache`. A store has a lock file in
it, and is changed in place: the source of a kernel with its output directories, or the package lists of a suite.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness.host.cache import MANIFEST, PENDING, Cache, host_trouble

#: The kinds that are stores.
_STORES = ("apt", "sources")

#: The kind that ccache(1) keeps small by itself.
_CCACHE = "ccache"

#: Directories of the cache that hold nothing of a size.
_NOT_SHOWN = ("locks",)

#: Without these a store counts as new. They are moved away first, so that a removal that is cut short does no harm.
_FIRST = ("git", "refreshed")

#: Where a store's content is moved before it is removed.
_DOOMED = ".old"


@dataclass(frozen=True)
class Kept:
    """One thing that is kept.

    :param remove: removes it unless it was used at this time or later (seconds since the epoch), or a process uses it.
        Says whether it did. None if it is not ours to remove.
    """

    kind: str
    name: str
    #: in bytes, as the file system counts them
    size: int
    #: when it was last used, in seconds since the epoch
    used: float
    remove: Callable[[float], bool] | None


def kept(cache: Cache) -> list[Kept]:
    """All that is in a cache, kind by kind."""
    return [each for kind in sorted(_directories(cache.root)) for each in _of_kind(cache, kind)]


def disk_size(path: Path) -> int:
    """The space that a file or directory takes, in bytes. What vanishes meanwhile takes none."""
    total = 0
    with suppress(OSError):
        total += path.lstat().st_blocks * 512
    for directory, subdirectories, names in os.walk(path):
        for name in (*subdirectories, *names):
            with suppress(OSError):
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
    return total


@contextmanager
def free(*paths: Path) -> Iterator[bool]:
    """Hold exclusive locks on files or directories, if nobody has them; says whether they are held."""
    with ExitStack() as stack:
        for path in paths:
            try:
                lock = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
        yield True


def _of_kind(cache: Cache, kind: Path) -> Iterator[Kept]:
    if kind.name in _NOT_SHOWN:
        return
    if kind.name == _CCACHE:
        yield Kept(kind.name, kind.name, disk_size(kind), _newest(kind), None)
        return
    for path in sorted(_directories(kind)):
        if kind.name in _STORES:
            # An emptied store still has its locks. Whoever waits for one must not get another file of that name.
            if any(not _is_lock(each) for each in path.iterdir()):
                yield Kept(kind.name, path.name, disk_size(path), _newest(path), partial(_empty, cache.root, path))
        elif (path / MANIFEST).exists():
            yield Kept(kind.name, path.name, disk_size(path), _used(path), partial(_remove, cache, path))


def _remove(cache: Cache, entry: Path, before: float) -> bool:
    """Remove an entry."""
    lock = cache.lock_of(entry)
    with host_trouble(cache.root):
        lock.parent.mkdir(exist_ok=True)
        lock.touch()
        with free(lock, entry) as ours:
            if not ours or not entry.exists() or _used(entry) >= before:
                return False
            doomed = entry.with_name(PENDING + entry.name)
            shutil.rmtree(doomed, ignore_errors=True)  # a killed run may have left it
            entry.rename(doomed)
            shutil.rmtree(doomed)
            return True


def _empty(root: Path, store: Path, before: float) -> bool:
    """Remove all of a store except its locks."""
    with host_trouble(root), free(*(each for each in store.iterdir() if _is_lock(each))) as ours:
        if not ours or _newest(store) >= before:
            return False
        doomed = store / _DOOMED
        doomed.mkdir(exist_ok=True)
        children = [each for each in store.iterdir() if not _is_lock(each) and each != doomed]
        for each in sorted(children, key=lambda child: child.name not in _FIRST):
            each.rename(doomed / each.name)
        shutil.rmtree(doomed)
        return True


def _is_lock(path: Path) -> bool:
    return path.name == "lock" or path.name.startswith("lock-")


def _used(entry: Path) -> float:
    """When an entry was last used; see :meth:`harness.host.cache.Cache.get`."""
    with suppress(OSError):
        return (entry / MANIFEST).stat().st_mtime
    return 0.0


def _newest(directory: Path) -> float:
    """When something changed in a directory, or in one of its directories. The lock is touched when it is taken."""
    found = [directory, *directory.iterdir()]
    found += [each for child in _directories(directory) for each in child.iterdir()]
    times = [0.0]
    for each in found:
        with suppress(OSError):
            times.append(each.lstat().st_mtime)
    return max(times)


def _directories(path: Path) -> list[Path]:
    with suppress(OSError):
        return [each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")]
    return []
