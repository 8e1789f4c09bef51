# SPDX-License-Identifier: GPL-2.0
"""``--keep``: the guest of the first failing test stays, and this is how a person gets at it.

pytest simply waits. There is nothing in the background that could be forgotten: the guest ends when the person says
so, or with pytest.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import paramiko
import pytest

from harness.deadline import Deadline
from harness.errors import HarnessError
from harness.guests import ssh
from harness.guests.guest import Guest
from harness.judging import console
from harness.machine.qmp import QmpFailed
from harness.machine.vm import Vm
from harness.pytest_plugin.runner import Runner

#: For QEMU's answers; the guest has no part in them.
_QEMU_SECONDS = 5.0


def check(config: pytest.Config) -> None:
    """Refuse where nobody sits who could use the guest.

    :raises pytest.UsageError: in that case.
    """
    if config.getoption("numprocesses", default=None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--keep waits for a person at this terminal: it does not go with -n")
    with _own_terminal(config):
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise pytest.UsageError("--keep waits for a person: it needs a terminal, and this run has none")


def wait(runner: Runner, guest: Guest, failure: str, config: pytest.Config) -> None:
    """Say what happened and how to attach; return when the person is done.

    :param failure: what the test said.
    """
    vm = guest.vm
    if not isinstance(vm, Vm):
        return  # a board stays anyway
    with _own_terminal(config):
        print(f"\n{failure}\n\n" + "\n".join(_ways(runner, vm)))
        transport: paramiko.Transport | None = None
        while _asked("\n[s] and Enter for a shell in the guest, Enter alone to end it: ") == "s":
            try:
                vm.check()
                transport = transport or ssh.connect(guest)
                ssh.run(transport, "", vm.check)
            except (HarnessError, paramiko.SSHException, EOFError) as error:
                print(f"no shell: {console.escape(str(error)) or type(error).__name__}")
        if transport is not None:
            transport.close()


def _ways(runner: Runner, vm: Vm) -> Iterator[str]:
    """Lines that say how to attach."""
    yield f"This guest is kept (QEMU is process {vm.child.pid}):"
    yield f"  console  {vm.console}"
    try:
        vm.check()
    except HarnessError as error:
        yield f"  state    {console.escape(str(error))}"
    if vm.child.status is not None:
        yield "  QEMU has ended: the console is all that is left."
        return
    yield f"  monitor  socat -,echo=0,icanon=0 UNIX-CONNECT:{vm.directory / 'monitor'}"
    try:
        gdb = vm.directory / "gdb"
        deadline = Deadline.after(_QEMU_SECONDS)
        answer = vm.qmp.execute(
            "human-monitor-command", deadline, command_line=f"gdbserver unix:{gdb},server=on,wait=off"
        )
        kernel, machine = runner.provisioned
        program = "gdb" if machine.accelerator.name == "kvm" else "gdb-multiarch"
        yield f"  gdb      {program} {kernel.vmlinux or ''} -ex 'target remote {gdb}'".replace("  -ex", " -ex")
        if not gdb.exists():
            yield f"           (QEMU said: {console.escape(str(answer)).strip()})"
    except (QmpFailed, HarnessError) as error:
        yield f"  gdb      cannot be had: {error}"


def _asked(prompt: str) -> str:
    """A line from the person; empty at the end of input or on Ctrl-C."""
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        return input(prompt).strip()
    return ""


@contextlib.contextmanager
def _own_terminal(config: pytest.Config) -> Iterator[None]:
    """The process's own stdin, stdout and stderr, without pytest's capturing."""
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is None:
        yield
        return
    capture.suspend(in_=True)
    try:
        yield
    finally:
        capture.resume()
