# SPDX-License-Identifier: GPL-2.0
"""Private directories for the files of a running machine: its console log and its sockets.

Their names are short, because the path of a socket may have at most 107 bytes (unix(7)). A run that is killed leaves
its directories behind, and the next run removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

_PREFIX = "mremap-harness-"

#: A directory that nobody has locked is not removed for this many seconds: its owner may lock it next.
_GRACE = 60.0


class RunDirectory:
    """A directory of mode 0700 that is locked until :meth:`remove` is called or the process ends."""

    def __init__(self) -> None:
        _sweep_once(tempfile.gettempdir())
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # The lock shows that the owner is alive. A process ID would not: IDs are reused, and another container may
        # share this directory but has other IDs.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def remove(self, *, keep_files: bool = False) -> None:
        """Unlock and remove the directory. Does nothing when it is called again.

        :param keep_files: only unlock the directory; a later run removes it.
        """
        if self._lock < 0:
            return
        os.close(self._lock)
        self._lock = -1
        if not keep_files:
            shutil.rmtree(self.path, ignore_errors=True)


@cache
def _sweep_once(directory: str) -> None:
    sweep(Path(directory))


def sweep(directory: Path, grace: float = _GRACE) -> None:
    """Remove directories that killed runs of this user left in ``directory``.

    :param grace: a directory is kept if it changed in the last ``grace`` seconds.
    """
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # it belongs to another user, or another run removes it
            info = path.stat(follow_symlinks=False)
            if info.st_uid != os.geteuid() or time.time() - info.st_mtime < grace:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)
