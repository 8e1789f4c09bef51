# SPDX-License-Identifier: GPL-2.0
"""Plays a person at a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.deadline import Deadline

#: Seconds for one answer; guests are emulated, and other tests run beside.
_PATIENCE = 240.0


class Terminal:
    """A Python program on a pseudo-terminal.

    :param arguments: what follows ``python -m``.
    :param size: lines and columns.
    """

    def __init__(
        self,
        *arguments: str,
        cwd: Path,
        size: tuple[int, int] = (40, 100),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.seen = ""
        self._looked = 0
        pid, self._fd = pty.fork()
        if pid == 0:
            os.chdir(cwd)
            # Whoever runs us in the background may have had SIGINT ignored, which a process inherits.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            argv: Sequence[str] = [sys.executable, "-m", *arguments]
            os.execve(sys.executable, argv, {**os.environ, "TERM": "xterm", "NO_COLOR": "1", **(environment or {})})
        self._pid = pid
        self.resize(*size)

    def resize(self, lines: int, columns: int) -> None:
        """Give the window another size."""
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._fd, text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """Read on until ``pattern`` has appeared behind what was matched last."""
        deadline = Deadline.after(_PATIENCE)
        while (match := re.compile(pattern).search(self.seen, self._looked)) is None:
            if deadline.passed or not self._read():
                raise AssertionError(f"{pattern!r} never appeared in:\n{self.seen[self._looked :]}")
        self._looked = match.end()
        return match

    def status(self) -> int:
        """Wait for the end; the exit status."""
        deadline = Deadline.after(_PATIENCE)
        while self._read():
            deadline.check(f"the program to end; it said:\n{self.seen}")
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])

    def _read(self) -> bool:
        if select.select([self._fd], [], [], 1.0)[0]:
            try:
                data = os.read(self._fd, 1 << 14)
            except OSError:  # EIO: the program has ended
                return False
            self.seen += data.decode(errors="replace")
            return bool(data)
        return True

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)  # hangs up, which ends a program that still runs
