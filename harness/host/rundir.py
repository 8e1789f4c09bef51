# SPDX-License-Identifier: GPL-2.0
"""Private directories for what belongs to a running machine: its console log and sockets.

They have short names, because a socket's path may have no more than 107 bytes (unix(7)). A run that is killed leaves
its directories behind; whoever comes next removes them.
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

#: Seconds that a directory without an owner is left alone: its owner may be about to lock it.
_GRACE = 60.0


class RunDirectory:
    """A directory of mode 0700 that is ours until :meth:`remove`, or until this process ends in whatever way."""

    def __init__(self) -> None:
        _sweep_once(tempfile.gettempdir())
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # A lock tells the living from the dead where a process id would not: ids are used again, and another
        # container may share this directory but not our ids.
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def remove(self, *, keep_files: bool = False) -> None:
        """Give the directory up. Harmless when called again.

        :param keep_files: leave it to the next run to remove.
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
    """Remove what killed runs of this user left in ``directory``.

    :param grace: seconds since its last change for which a directory is left alone in any case.
    """
    for path in directory.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or another run is sweeping it
            info = path.stat(follow_symlinks=False)
            if info.st_uid != os.geteuid() or time.time() - info.st_mtime < grace:
                continue
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)
