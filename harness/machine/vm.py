# SPDX-License-Identifier: GPL-2.0
"""A running QEMU: started, wired, watched and ended."""

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

#: Bytes of console after which a guest is taken for a flood: twice the kernel's whole log (see PARAMS), and within
#: minutes' reach of a serial port under emulation, which was measured at 90 to 300 KiB a second.
CONSOLE_LIMIT = 2 << 20


class Vm:
    """One QEMU process and our ends of its wires.

    Nothing listens anywhere: QEMU inherits one end of a socket pair per wire. The constructor returns as soon as the
    process exists, so that its start-up overlaps with other work; :meth:`connect` waits for it.

    :param machine: what to run.
    :param ram: memory in files, for templates and clones.
    :param incoming: wait for device state instead of booting.
    :raises HostError: if QEMU cannot be started.
    """

    def __init__(self, machine: qemu.Machine, *, ram: qemu.Ram | None = None, incoming: bool = False) -> None:
        self.machine = machine
        #: private directory with the console log, QEMU's own output and the sockets for people
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
        """Wait until QEMU answers; the machine is still stopped.

        :raises GuestLost: if QEMU ended instead, with what it printed.
        """
        try:
            self._qmp = Qmp(self._qmp_socket, f"pid {self.child.pid}", deadline)
        except QmpFailed as error:
            self.child.wait(Deadline.after(1))
            raise GuestLost(LostCondition.QEMU_DIED, f"QEMU did not start: {self.child.said() or error}") from error

    @property
    def qmp(self) -> Qmp:
        """The machine-protocol connection; only after :meth:`connect`."""
        if self._qmp is None:
            raise RuntimeError("connect() comes before the first QMP command")
        return self._qmp

    def run(self, deadline: Deadline) -> None:
        """Let the guest execute."""
        self.qmp.execute("cont", deadline)

    def stop(self, deadline: Deadline) -> None:
        """Freeze the guest between two instructions."""
        self.qmp.execute("stop", deadline)

    def console_bytes(self) -> bytes:
        """The console so far, at most its first CONSOLE_LIMIT bytes."""
        with contextlib.suppress(OSError), self.console.open("rb") as file:
            return file.read(CONSOLE_LIMIT)
        return b""

    def check(self) -> None:
        """Look for signs that the guest cannot go on.

        :raises GuestLost: if there is one.
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
            # QEMU stops the guest, prints its registers, and goes on running.
            raise GuestLost(LostCondition.QEMU_DIED, f"KVM cannot execute this guest: {self.child.said()[:200]}")
        with contextlib.suppress(OSError):
            if self.console.stat().st_size > CONSOLE_LIMIT:
                raise GuestLost(LostCondition.CONSOLE_FLOOD, f"the console grew beyond {CONSOLE_LIMIT >> 20} MiB")

    def _agent_ended(self) -> bool:
        # Printed by images/init; the guest may lie about itself, but gains nothing by it.
        return b"harness: agent ended" in self.console_bytes()[-4096:]

    def close(self, *, keep_directory: bool = False) -> None:
        """End QEMU and remove what belongs to it. Harmless when called again."""
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
