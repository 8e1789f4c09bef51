# SPDX-License-Identifier: GPL-2.0
"""Runs apt's programs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.errors import HostError
from harness.host.process import killed_with_parent


def run(command: Sequence[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of apt's programs to its end; a failure shows in the exit status only.

    If the harness is killed, apt is killed too: the harness's lock on the apt root ends with the harness, and the next
    run would meet apt's own lock, which apt does not wait for.

    :param environment: variables in addition to the host's own.
    :raises HostError: if the program is not installed.
    """
    if shutil.which(command[0]) is None:
        raise HostError(
            f"this host has no {command[0]}, which Debian packages are fetched with: use a Debian or Ubuntu host, "
            "or give the kernel as a file, and the guest's userland with --userland=FILE"
        )
    return subprocess.run(
        killed_with_parent(command, "KILL"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C.UTF-8", **environment},
        cwd=cwd,
        check=False,
    )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Apt's first error message, without the prefix that apt gives it; its first warning if there is no error."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("E: ", "W: "))]
    errors = sorted(lines, key=lambda line: not line.startswith("E: "))
    return re.sub(r"\s+", " ", errors[0][3:]).strip() if errors else f"apt ended with status {done.returncode}"
