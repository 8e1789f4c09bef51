# SPDX-License-Identifier: GPL-2.0
"""A content cache on disk. Each entry is made once, and its content is checked before each use.

An entry is a directory ``<root>/<kind>/<key>/``. It holds the content and ``manifest.json``, which has the digest of
every file. An entry is made under a name that starts with a dot and then renamed, so that no incomplete entry is ever
used. Each entry has a lock: if two runs want the same entry, one makes it and the other waits.

Most checks read no file, as in git's index: a file is unchanged if its inode, size, mtime and ctime are the same as at
the last full check. User space cannot set ctime, so changed bytes are noticed even if mtime was restored. A file is
hashed again if one of the four differs, if the host was booted since the last full check, or if that check is a day
old. If the digest differs, the entry is made again. This covers power failures as well, so there is no fsync.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import paths
from harness.errors import HostError

log = logging.getLogger(__name__)

#: called with a message about what takes long: one sentence without a full stop
Progress = Callable[[str], None]

#: an entry is hashed after this many seconds even if its ctime is the same, because disks fail
REHASH_AFTER = 24 * 3600
#: If a file changed less than this many nanoseconds before its check, it may change again without a new ctime: the
#: clock of file systems advances every 1 to 10 ms.
RACY_NS = 20_000_000

#: The file of an entry that lists the others. Its mtime says when the entry was last used.
MANIFEST = "manifest.json"
#: What the name of an entry begins with while it is made or removed.
PENDING = ".new-"
_SAFE_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~@=-]{0,120}\Z")
#: seconds between two messages of a run that waits for a lock
_TELL_EVERY = 1.0


def silent(_message: str) -> None:
    """A :data:`Progress` that drops all messages."""


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: Path, waiting_for: str, progress: Progress = silent) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path``, which is created if necessary and never removed.

    There is no deadline: the holder may build a kernel for a long time, and the kernel releases the lock when the
    holder ends, in whatever way.

    :param waiting_for: completes the message "waiting for …".
    :param progress: told once in a while as long as the lock is not free.
    """
    with host_trouble(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        began = tell = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                now = time.monotonic()
                if now >= tell:
                    # A log that is no terminal shows only messages that come after some time: see ProgressLine.
                    progress(f"waiting for {waiting_for}, {now - began:.0f} s so far")
                    tell = now + _TELL_EVERY
                time.sleep(0.05)
        with suppress(OSError):
            os.utime(file.fileno())  # shows when it was last used
        yield


@contextmanager
def host_trouble(directory: Path) -> Iterator[None]:
    """Replace the OSError of a full or read-only file system by a message that says what to do.

    :param directory: the directory that is written to, for the message.
    :raises HostError: instead of the OSError.
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
    """The message for a directory that cannot be written to.

    :param trouble: a verb phrase, such as "is on a full file system".
    """
    return (
        f"{directory} {trouble}: make room there, or set XDG_CACHE_HOME to a directory with space "
        "(kernels and userlands take some hundred MB)"
    )


@dataclass(frozen=True)
class Cache:
    """A directory of entries, which several processes may use at the same time.

    :param root: the directory; created on first use. It may be deleted while no process uses it.
    :param progress: told when another run makes an entry, and when an entry is damaged.
    """

    root: Path = field(default_factory=paths.cache_dir)
    progress: Progress = silent

    def file(self, kind: str, key: str, make: Callable[[Path], None], *, name: str = "data") -> Path:
        """The file that is cached under ``key``; made now if it is missing or damaged.

        :param kind: a directory name that groups entries.
        :param key: any text; equal keys must mean equal content.
        :param make: writes the content to the path that it is given, which does not exist.
        :param name: the name of the file in its entry.
        :returns: the path of the file, which must not be changed.
        :raises HostError: if the file system is full or cannot be written to.
        """
        return self._entry(kind, key, make, name)

    def tree(self, kind: str, key: str, make: Callable[[Path], None]) -> Path:
        """Like :meth:`file`, for a directory. ``make`` is given the path of an empty directory."""

        def make_tree(path: Path) -> None:
            path.mkdir()
            make(path)

        return self._entry(kind, key, make_tree, "data")

    def get(self, kind: str, key: str, *, name: str = "data") -> Path | None:
        """The file or directory that is cached under ``key``; None if it is missing or damaged."""
        entry = self._path(kind, key)
        return entry / name if _usable(entry) else None

    def digest(self, path: Path) -> str:
        """The SHA-256 of a file that :meth:`file` returned, from its manifest."""
        files = json.loads((path.parent / MANIFEST).read_text())["files"]
        return str(files[path.name]["sha256"])

    def _path(self, kind: str, key: str) -> Path:
        # Two keys may become equal when unsafe characters are replaced, so their digest is added.
        if not _SAFE_KEY.match(key):
            digest = hashlib.sha256(key.encode()).hexdigest()[:16]
            key = re.sub(r"[^A-Za-z0-9._+~@=-]+", "_", key).lstrip(".")[-80:] + "=" + digest
        return self.root / kind / key

    def _entry(self, kind: str, key: str, make: Callable[[Path], None], name: str) -> Path:
        entry = self._path(kind, key)
        if _usable(entry):
            return entry / name
        lock = self.lock_of(entry)
        with locked(lock, f"another run that makes {kind} {key}", self.progress), host_trouble(self.root):
            if _usable(entry):
                return entry / name
            entry.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(entry.parent)
            pending = entry.with_name(PENDING + entry.name)
            _remove(pending)
            if entry.exists():
                log.warning("%s does not match its recorded digest: making it again", entry)
                self.progress(f"{kind} {key} is corrupted in the cache: making it again")
                # Rename it first: if the removal is interrupted, no incomplete entry is left.
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

    def hold(self, path: Path) -> None:
        """Keep the entry that ``path`` is in until this process ends. Paths outside of the cache are left alone.

        :param path: what :meth:`file`, :meth:`tree` or :meth:`get` returned, or a path below it.
        :raises HostError: if it was removed meanwhile.
        """
        if not path.is_relative_to(self.root):
            return
        kind, key, *_ = path.relative_to(self.root).parts
        entry = self.root / kind / key
        if entry in _HELD:
            return
        try:
            lock = os.open(entry, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            _HELD[entry] = lock
            path.stat()  # while this waited for the lock, its owner may have removed the entry
        except FileNotFoundError:
            raise HostError(f"{entry} was removed while this run began: start it again") from None

    def lock_of(self, entry: Path) -> Path:
        """The file that is locked while an entry is made or removed."""
        return self.root / "locks" / f"{entry.parent.name}-{entry.name}.lock"

    def _sweep(self, kind: Path) -> None:
        """Remove entries that killed runs did not finish: those whose lock is free."""
        for pending in kind.glob(PENDING + "*"):
            lock = self.lock_of(pending.with_name(pending.name.removeprefix(PENDING)))
            with lock.open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another run makes it; or this run does, and the caller removes it
                _remove(pending)


#: Open directories of the entries that this process has locked.
_HELD: dict[Path, int] = {}


def _usable(entry: Path) -> bool:
    """Whether an entry is intact; notes that it is used now."""
    if not _intact(entry):
        return False
    with suppress(OSError):  # a cache that cannot be written to can still be used
        os.utime(entry / MANIFEST)
    return True


def _files(entry: Path) -> list[Path]:
    found = []
    for directory, _, names in os.walk(entry):
        found += [Path(directory, name) for name in names]
    return sorted(path for path in found if path.name != MANIFEST or path.parent != entry)


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
    # The name contains the process ID, because two processes may do this at the same time.
    new = entry / f".{MANIFEST}.{os.getpid()}"
    new.write_text(json.dumps({"hashed": time.time_ns(), "boot": _boot_id(), "files": files}))
    new.rename(entry / MANIFEST)


def _intact(entry: Path) -> bool:
    """Whether every file of ``entry`` exists and has the content that the manifest records."""
    try:
        manifest = json.loads((entry / MANIFEST).read_bytes())
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
        return False  # there is no entry, or its manifest is damaged
    if again:
        try:
            _write_manifest(entry, files)
        except OSError as error:  # a cache that cannot be written to can still be used
            log.debug("cannot note the check of %s: %s", entry, error)
    return True


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
