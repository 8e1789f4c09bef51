# SPDX-License-Identifier: GPL-2.0
"""A content cache on disk: made once, published whole, checked before use.

An entry is a directory ``<root>/<kind>/<key>/`` that holds the content and ``manifest.json``, the digest of every file
of it. It is built under a name that starts with a dot and renamed into place, so that a half entry is never seen.
Making is done under a lock of the entry's own: of two runs that want the same entry, one makes it and one waits.

Checking is cheap for the same reason as in git's index: a file whose inode, size, mtime and ctime are those of the
last full check is that file. Nobody but the kernel sets ctime, so bytes changed behind a restored mtime are noticed.
Everything else, and anything not hashed since the host booted or for a day, is hashed again; a mismatch makes the
entry again. That covers a power failure too, so nothing waits for the disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import paths
from harness.deadline import Deadline
from harness.errors import DeadlineExceeded, HostError

log = logging.getLogger(__name__)

#: told what takes long, one sentence without a full stop
Progress = Callable[[str], None]

#: an entry is hashed in full at least this often (seconds), whatever its ctime says: disks rot
REHASH_AFTER = 24 * 3600
#: a file changed so shortly before its check (nanoseconds) could change again within one tick of the file system's
#: clock; kernels tick every 1-10 ms
RACY_NS = 20_000_000

_MANIFEST = "manifest.json"
_PENDING = ".new-"
_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~@=-]{0,120}\Z")


def silent(_message: str) -> None:
    """A :data:`Progress` that tells nobody."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(
    path: Path, waiting_for: str, deadline: Deadline | None = None, progress: Progress = silent
) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is made if need be and never removed.

    The lock belongs to the open file: the kernel drops it when the holder ends, however it ends.

    :param waiting_for: completes "gave up waiting for …" and "waiting for …".
    :param deadline: when to give up; None waits for as long as somebody holds the lock.
    :raises DeadlineExceeded: if somebody else holds it past the deadline.
    """
    with host_trouble(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    progress(f"waiting for {waiting_for}")
                    told = True
                if deadline is not None and deadline.passed:
                    raise DeadlineExceeded(f"gave up waiting for {waiting_for}") from None
                time.sleep(0.05)
        yield


@contextmanager
def host_trouble(directory: Path) -> Iterator[None]:
    """Turn a full or read-only file system below ``directory`` into a sentence.

    :raises HostError: in place of the OSError.
    """
    try:
        yield
    except OSError as error:
        trouble = {
            errno.ENOSPC: "is on a full file system",
            errno.EDQUOT: "is beyond your disk quota",
            errno.EROFS: "is on a read-only file system",
            errno.EACCES: "is not yours to write",
        }.get(error.errno or 0)
        if trouble is None:
            raise
        raise HostError(disk_trouble(directory, trouble)) from error


def disk_trouble(directory: Path, trouble: str) -> str:
    """The sentence for a cache directory that cannot be written."""
    return (
        f"{directory} {trouble}: make room there, or set XDG_CACHE_HOME to a directory with space "
        "(kernels and images take some hundred MB)"
    )


@dataclass(frozen=True)
class Cache:
    """A directory of entries; any number of processes may share it.

    :param root: where it lives; made on first use. Safe to delete while nothing runs.
    :param progress: told when an entry is made, or waited for.
    """

    root: Path = field(default_factory=paths.cache_dir)
    progress: Progress = silent

    def file(
        self, kind: str, key: str, make: Callable[[Path], None], *, name: str = "data", deadline: Deadline | None = None
    ) -> Path:
        """The file cached under ``key``, made with ``make`` if it is not there or not intact.

        :param kind: a directory name that groups entries of one sort.
        :param key: anything that names the content; equal keys must mean equal content.
        :param make: writes the content to the path it is given, which does not exist yet.
        :param name: the file's name within its entry, for content whose name others read.
        :param deadline: how long to wait for another run that makes the same entry.
        :returns: a path to read from; treat it as read-only.
        :raises HostError: if the file system is full, or not writable.
        :raises DeadlineExceeded: if another run held the entry too long.
        """
        return self._entry(kind, key, make, name, deadline)

    def tree(self, kind: str, key: str, make: Callable[[Path], None], *, deadline: Deadline | None = None) -> Path:
        """Like :meth:`file` for a directory, which exists and is empty when ``make`` is called with it."""

        def make_tree(path: Path) -> None:
            path.mkdir()
            make(path)

        return self._entry(kind, key, make_tree, "data", deadline)

    def get(self, kind: str, key: str, *, name: str = "data") -> Path | None:
        """The intact entry under ``key``, or None: nothing is made."""
        entry = self._path(kind, key)
        return entry / name if _intact(entry) else None

    def digest(self, path: Path) -> str:
        """The recorded SHA-256 of a file that :meth:`file` returned, without reading it again."""
        files = json.loads((path.parent / _MANIFEST).read_text())["files"]
        return str(files[path.name]["sha256"])

    def _path(self, kind: str, key: str) -> Path:
        # Two different keys must not meet after cleaning, hence the digest for any key that is not clean already.
        if not _SAFE_KEY.match(key):
            digest = hashlib.sha256(key.encode()).hexdigest()[:16]
            key = re.sub(r"[^A-Za-z0-9._+~@=-]+", "_", key).lstrip(".")[-80:] + "=" + digest
        return self.root / kind / key

    def _entry(self, kind: str, key: str, make: Callable[[Path], None], name: str, deadline: Deadline | None) -> Path:
        entry = self._path(kind, key)
        if _intact(entry):
            return entry / name
        lock = self._lock(entry)
        with locked(lock, f"another run that makes {kind} {key}", deadline, self.progress), host_trouble(self.root):
            if _intact(entry):
                return entry / name
            entry.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(entry.parent)
            pending = entry.with_name(_PENDING + entry.name)
            _remove(pending)
            if entry.exists():
                log.warning("%s does not match its recorded digest: making it again", entry)
                self.progress(f"{kind} {key} is corrupted in the cache: making it again")
                # Moved away first, so that a removal that is cut short leaves no half entry.
                entry.rename(pending)
                _remove(pending)
            try:
                pending.mkdir()
                make(pending / name)
                _record(pending)
                pending.rename(entry)
            except BaseException:
                _remove(pending)
                raise
        return entry / name

    def _lock(self, entry: Path) -> Path:
        return self.root / "locks" / f"{entry.parent.name}-{entry.name}.lock"

    def _sweep(self, kind: Path) -> None:
        """Remove what killed runs left behind: a pending entry whose lock nobody holds."""
        for pending in kind.glob(_PENDING + "*"):
            lock = self._lock(pending.with_name(pending.name.removeprefix(_PENDING)))
            with lock.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # somebody is at work on it; or it is ours, and removed by our caller
                _remove(pending)


def _files(entry: Path) -> list[Path]:
    found = []
    for directory, _, names in os.walk(entry):
        found += [Path(directory, name) for name in names]
    return sorted(path for path in found if path.name != _MANIFEST or path.parent != entry)


def _stat(path: Path) -> list[int]:
    info = path.stat(follow_symlinks=False)
    return [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def _digest(path: Path) -> str:
    return hashlib.sha256(os.readlink(path).encode()).hexdigest() if path.is_symlink() else sha256(path)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _record(entry: Path) -> None:
    files = {str(path.relative_to(entry)): {"sha256": _digest(path), "stat": _stat(path)} for path in _files(entry)}
    _write_manifest(entry, files)


def _write_manifest(entry: Path, files: dict[str, Any]) -> None:
    # A name of our own: two readers may come to the same conclusion at the same time.
    new = entry / f".{_MANIFEST}.{os.getpid()}"
    new.write_text(json.dumps({"hashed": time.time_ns(), "boot": _boot_id(), "files": files}))
    new.rename(entry / _MANIFEST)


def _intact(entry: Path) -> bool:
    """Whether every file of ``entry`` is there with the bytes that were recorded."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_bytes())
        hashed, files = int(manifest["hashed"]), dict(manifest["files"])
        fresh = manifest["boot"] == _boot_id() and 0 <= time.time_ns() - hashed < REHASH_AFTER * 10**9
        again = False
        for name, recorded in files.items():
            path = entry / name
            stat = _stat(path)
            if not (fresh and stat == recorded["stat"] and hashed - stat[3] > RACY_NS):
                if stat[1] != recorded["stat"][1] or _digest(path) != recorded["sha256"]:
                    return False
                recorded["stat"] = stat
                again = True
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no entry, or a manifest that is not one
    if again:
        try:
            _write_manifest(entry, files)
        except OSError as error:  # a read-only cache is still a cache
            log.debug("cannot note the check of %s: %s", entry, error)
    return True


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
