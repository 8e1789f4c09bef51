# SPDX-License-Identifier: GPL-2.0
"""``harness shell``: a shell, or one command, in the very environment the tests run in."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from harness.errors import UsageError
from harness.guests import ssh
from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.host.terminal import ProgressLine, colourful
from harness.kernels.kernel import BootSpec, Kernel
from harness.machine import provision
from harness.machine.qemu import Machine
from harness.options import MachineOptions


def shell(spec: BootSpec, options: MachineOptions, command: Sequence[str], progress: ProgressLine) -> int:
    """``harness shell``: a fresh guest, a shell or one command in it, and its exit status.

    :param command: one word is a line for the guest's shell; several are quoted, and arrive as they are.
    :raises UsageError: without a command and without a terminal.
    """
    if not command and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "there is no terminal for a shell: give a command, for example: harness shell --kernel=… uname -r"
        )
    line = command[0] if len(command) == 1 else shlex.join(command)
    kernel, machine = provision.provision(spec, options, progress)
    fleet = Fleet.with_library(machine, progress, options.mutant)
    guest, _ = fleet.fresh()
    try:
        progress("starting the SSH server in the guest")
        transport = ssh.connect(guest)
        try:
            progress.clear()
            if not line:
                sys.stderr.write(banner(kernel, machine, guest, fleet.origin))
            return ssh.run(transport, line, guest.carrier.check)
        finally:
            transport.close()
    finally:
        guest.close()
        fleet.close()


def banner(kernel: Kernel, machine: Machine, guest: Guest, origin: str) -> str:
    """What to know on arrival."""
    assert guest.vm is not None
    rows = (
        ("kernel", f"{kernel.release}, {kernel.arch}, {machine.memory} MiB, {machine.accelerator.name}, {origin}"),
        ("tests", "python3 -m pytest guest_tests/test_library.py -k page"),
        ("console", str(guest.vm.console)),
        ("monitor", f"socat -,echo=0,icanon=0 UNIX-CONNECT:{guest.vm.directory / 'monitor'}"),
        ("leave", "exit, or Ctrl-D: the guest ends, and all that is in it"),
    )
    bold, dim, plain = ("\033[1m", "\033[2m", "\033[0m") if colourful(sys.stderr) else ("", "", "")
    lines = [f"{dim}{name:>8}{plain}  {bold if name == 'kernel' else ''}{text}{plain}" for name, text in rows]
    return "\n".join(["", *lines, "", ""])
