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
from harness.host import safe_text
from harness.machine.qmp import QmpFailed
from harness.machine.vm import Vm
from harness.pytest_plugin.target import Target
from harness.pytest_plugin.testrun import Ran

#: For QEMU's answers; the guest has no part in them.
_QEMU_SECONDS = 5.0


class Keep:
    """The plug-in.

    :raises pytest.UsageError: where nobody sits who could use the guest.
    """

    def __init__(self, config: pytest.Config) -> None:
        _check(config)
        self._config = config

    def pytest_guest_test_finished(self, item: pytest.Item, target: Target, ran: Ran) -> None:
        """Wait for the person, if the guest was kept."""
        if ran.kept is None:
            return
        failures = [report.longreprtext for report in ran.judgement.reports if report.failed]
        _wait(target, ran.kept, "\n".join(failures), self._config)
        item.session.shouldfail = "--keep stops at the first test that fails"


def _check(config: pytest.Config) -> None:
    if config.getoption("numprocesses", default=None) or hasattr(config, "workerinput"):
        raise pytest.UsageError("--keep waits for a person at this terminal: it does not go with -n")
    with _own_terminal(config):
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise pytest.UsageError("--keep waits for a person: it needs a terminal, and this run has none")


def _wait(target: Target, guest: Guest, failure: str, config: pytest.Config) -> None:
    """Say what happened and how to attach; return when the person is done.

    :param failure: what the test said.
    """
    vm = guest.vm
    if vm is None:
        return  # a board stays anyway
    with _own_terminal(config):
        print(f"\n{failure}\n\n" + "\n".join(_ways(target, vm)))
        transport: paramiko.Transport | None = None
        while _asked("\n[s] and Enter for a shell in the guest, Enter alone to end it: ") == "s":
            try:
                vm.check()
                transport = transport or ssh.connect(guest)
                ssh.run(transport, "", vm.check)
            except (HarnessError, paramiko.SSHException, EOFError) as error:
                print(f"no shell: {safe_text.escape(str(error)) or type(error).__name__}")
        if transport is not None:
            transport.close()


def _ways(target: Target, vm: Vm) -> Iterator[str]:
    """Lines that say how to attach."""
    yield f"This guest is kept (QEMU is process {vm.child.pid}):"
    yield f"  console  {vm.console}"
    try:
        vm.check()
    except HarnessError as error:
        yield f"  state    {safe_text.escape(str(error))}"
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
        program = "gdb" if vm.machine.accelerator.name == "kvm" else "gdb-multiarch"
        vmlinux = target.kernel.vmlinux if target.kernel else None
        yield f"  gdb      {program} {vmlinux or ''} -ex 'target remote {gdb}'".replace("  -ex", " -ex")
        if not gdb.exists():
            yield f"           (QEMU said: {safe_text.escape(str(answer)).strip()})"
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
