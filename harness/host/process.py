# SPDX-License-Identifier: GPL-2.0
"""Child processes that cannot outlive us."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from harness.deadline import Deadline
from harness.errors import HostError

#: Becomes the command in its arguments if its parent is still the process named by its first.
_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] && exec "$@"'


def find_program(name: str, package: str) -> str:
    """The path of a program.

    :param package: the Debian package that ships it, for the message.
    :raises HostError: if it is not installed.
    """
    path = shutil.which(name)
    if path is None:
        raise HostError(f"{name} is not installed: install it with: apt-get install {package}")
    return path


class Child:
    """A process in a session of its own that the kernel kills when the thread that started it ends.

    The session keeps a terminal's Ctrl-C from reaching the child before we have judged what it was doing.
    ``setpriv`` sets PR_SET_PDEATHSIG in the child: a ``preexec_fn`` is unsafe once threads exist, and QEMU's own
    ``-run-with exit-with-parent=on`` came only with 10.2. The shell behind it ends where we died before it was set.

    :param output: a file that receives stdout and stderr.
    :param pass_fds: descriptors the child inherits under the same numbers.
    :raises HostError: if the program cannot be started.
    """

    def __init__(self, argv: Sequence[str], output: Path, pass_fds: Sequence[int] = ()) -> None:
        self.argv = tuple(argv)
        self.output = output
        setpriv = find_program("setpriv", "util-linux")
        log: IO[bytes]
        with output.open("wb") as log:
            self._process = subprocess.Popen(
                [setpriv, "--pdeathsig", "KILL", "--", "sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal, or None while it runs."""
        return self._process.poll()

    @property
    def command(self) -> str:
        """The command line, quoted so that it can be pasted into a shell."""
        return shlex.join(self.argv)

    def said(self) -> str:
        """What the process printed so far, at most the last 4 KiB."""
        with contextlib.suppress(OSError):
            return self.output.read_bytes()[-4096:].decode(errors="replace").strip()
        return ""

    def wait(self, deadline: Deadline) -> int | None:
        """Wait for the end; None if the deadline passes first."""
        try:
            return self._process.wait(deadline.remaining)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End the process and reap it. Harmless when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
