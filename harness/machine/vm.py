# SPDX-License-Identifier: GPL-2.0
"""Runs one QEMU process: starts it, connects to it, watches it, and ends it."""

from __future__ import annotations

import contextlib
import queue
import socket
from types import TracebackType
from typing import Any

from harness.deadline import Deadline
from harness.errors import GuestLost, LostCondition
from harness.host.process import Child
from harness.host.rundir import RunDirectory
from harness.machine import qemu
from harness.machine.qmp import Qmp, QmpFailed

#: Limit of the console log in bytes. A guest that writes more is considered broken. It is twice the size of the log
#: buffer (log_buf_len in harness.machine.qemu.PARAMS). An emulated serial port wrote 90 to 300 KiB per second.
CONSOLE_LIMIT = 2 << 20


class Vm:
    """One QEMU process, and sockets to it and to the ports of its guest.

    QEMU inherits one end of a socket pair for each connection, so nothing listens on the host. The constructor returns
    as soon as the process exists, and the caller can do other work while QEMU starts. :meth:`connect` waits for QEMU.

    :param machine: the machine to run.
    :param ram: files for the guest's memory, for templates and clones.
    :param incoming: wait for device state instead of booting.
    :raises HostError: if QEMU cannot be started.
    """

    def __init__(self, machine: qemu.Machine, *, ram: qemu.Ram | None = None, incoming: bool = False) -> None:
        self.machine = machine
        #: a private directory with the console log, QEMU's output, and the socket of the human monitor
        self._run_directory = RunDirectory()
        self.directory = self._run_directory.path
        self.console = self.directory / "console"
        pairs = [socket.socketpair() for _ in range(1 + len(qemu.PORTS))]
        ours, theirs = zip(*pairs, strict=True)
        fds = [sock.fileno() for sock in theirs]
        wiring = qemu.Wiring(self.console, self.directory / "monitor", fds[0], tuple(fds[1:]))
        try:
            argv = qemu.arguments(machine, wiring, ram=ram, incoming=incoming)
            self.child = Child(argv, self.directory / "qemu.log", pass_fds=fds)
        except BaseException:
            for sock in ours:
                sock.close()
            self._run_directory.remove()
            raise
        finally:
            for sock in theirs:
                sock.close()
        self._qmp_socket: socket.socket = ours[0]
        self.agent, self.heartbeat, self.shell = ours[1:]
        self._qmp: Qmp | None = None
        self._seen: list[dict[str, Any]] = []

    @property
    def virtual(self) -> Vm:
        """This machine; a board has none."""
        return self

    def connect(self, deadline: Deadline) -> None:
        """Wait until QEMU answers. The machine stays stopped.

        :raises GuestLost: if QEMU ended; the message has QEMU's output.
        """
        try:
            self._qmp = Qmp(self._qmp_socket, f"pid {self.child.pid}", deadline)
        except QmpFailed as error:
            self.child.wait(Deadline.after(1))
            raise GuestLost(LostCondition.QEMU_DIED, f"QEMU did not start: {self.child.said() or error}") from error

    @property
    def qmp(self) -> Qmp:
        """The QMP connection; available after :meth:`connect`."""
        if self._qmp is None:
            raise RuntimeError("connect() must be called before the first QMP command")
        return self._qmp

    def run(self, deadline: Deadline) -> None:
        """Start or resume the guest."""
        self.qmp.execute("cont", deadline)

    def stop(self, deadline: Deadline) -> None:
        """Stop all CPUs of the guest."""
        self.qmp.execute("stop", deadline)

    def console_bytes(self) -> bytes:
        """The console log so far, at most its first :data:`CONSOLE_LIMIT` bytes."""
        with contextlib.suppress(OSError), self.console.open("rb") as file:
            return file.read(CONSOLE_LIMIT)
        return b""

    def check(self) -> None:
        """Check whether the guest can still be used.

        :raises GuestLost: if it panicked, reset or powered off, flooded the console, or if QEMU ended.
        """
        with contextlib.suppress(queue.Empty):
            while self._qmp is not None:
                self._seen.append(self._qmp.events.get_nowait())
        for event in self._seen:
            if event["event"] == "GUEST_PANICKED":
                raise GuestLost(LostCondition.PANIC, "the kernel panicked (reported by pvpanic)")
            if event["event"] == "SHUTDOWN":
                reason = str(event["data"].get("reason", "unknown"))
                if b"Kernel panic - not syncing" in self.console_bytes()[-(256 << 10) :]:
                    raise GuestLost(LostCondition.PANIC, "the kernel panicked and reset the machine")
                condition = LostCondition.AGENT_DIED if self._agent_ended() else LostCondition.RESET
                raise GuestLost(condition, f"the machine ended by itself ({reason})")
        if self.child.status is not None:
            raise GuestLost(
                LostCondition.QEMU_DIED,
                f"QEMU ended with status {self.child.status}: {self.child.said() or 'silently'}",
            )
        if "KVM internal error" in self.child.said():
            # QEMU stops the guest and prints its registers, but does not end.
            raise GuestLost(LostCondition.QEMU_DIED, f"KVM cannot execute this guest: {self.child.said()[:200]}")
        with contextlib.suppress(OSError):
            if self.console.stat().st_size > CONSOLE_LIMIT:
                raise GuestLost(LostCondition.CONSOLE_FLOOD, f"the console grew beyond {CONSOLE_LIMIT >> 20} MiB")

    def _agent_ended(self) -> bool:
        # images/init prints this. A guest that prints it without reason only changes how its loss is named.
        return b"harness: agent ended" in self.console_bytes()[-4096:]

    def close(self, *, keep_directory: bool = False) -> None:
        """Kill QEMU, close all connections and remove the directory. Does nothing when it is called again.

        :param keep_directory: leave the directory to a later run to remove.
        """
        self.child.kill()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        for sock in (self._qmp_socket, self.agent, self.heartbeat, self.shell):
            sock.close()
        self._run_directory.remove(keep_files=keep_directory)

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
