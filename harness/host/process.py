# SPDX-License-Identifier: GPL-2.0
"""Child processes that end when the harness ends."""

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

#: A shell script: runs the command in its arguments if its parent process has the ID in ``$0``.
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


def version_line(program: str, timeout: float | None = None) -> str:
    """The first line that a program prints for ``--version``.

    :param timeout: seconds to wait for it; None for no limit.
    """
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=timeout)
    return done.stdout.partition("\n")[0]


def killed_with_parent(command: Sequence[str], signal_name: str) -> list[str]:
    """A command line that runs ``command``, and sends it a signal when the thread that started it ends.

    ``setpriv`` sets PR_SET_PDEATHSIG in the child. Popen's ``preexec_fn`` could do the same, but is unsafe once there
    are threads.

    :param signal_name: without "SIG".
    :raises HostError: if setpriv is not installed.
    """
    return [find_program("setpriv", "util-linux"), "--pdeathsig", signal_name, "--", *command]


class Child:
    """A process in a session of its own, which the kernel kills when the thread that started it ends.

    Because of the session, Ctrl-C in a terminal does not reach the child before the harness has decided what the child
    was doing. QEMU's own option ``-run-with exit-with-parent=on`` exists only since 10.2. If the harness dies before
    PR_SET_PDEATHSIG is set, the shell that comes next notices and ends.

    :param output: a file that receives stdout and stderr.
    :param pass_fds: descriptors that the child inherits under the same numbers.
    :raises HostError: if the program cannot be started.
    """

    def __init__(self, argv: Sequence[str], output: Path, pass_fds: Sequence[int] = ()) -> None:
        self.argv = tuple(argv)
        self.output = output
        unless_orphaned = ["sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *argv]
        log: IO[bytes]
        with output.open("wb") as log:
            self._process = subprocess.Popen(
                killed_with_parent(unless_orphaned, "KILL"),
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
        """The command line, quoted for a shell."""
        return shlex.join(self.argv)

    def said(self) -> str:
        """The output so far, at most the last 4 KiB."""
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
        """Kill the process and wait for its end. Does nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()
