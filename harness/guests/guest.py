# SPDX-License-Identifier: GPL-2.0
"""Talks to the agent in a guest, and notices when the guest is lost."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import BootError, DeadlineExceeded, GuestLost, LostCondition, ProtocolError
from harness.host import safe_text
from harness.judging import console
from harness.machine.qmp import QmpFailed
from harness.machine.vm import Vm

_M = TypeVar("_M", bound=protocol.Message)

#: While the agent is silent, panics and dead processes are looked for at this interval, in seconds.
_TICK = 0.1

#: A guest may ask for this many audits between two reports of a test. No test needs as many.
_MOST_AUDITS = 10_000

#: The agent may send this many reports of one test: one for each of pytest's three phases, and one for each subtest.
_MOST_REPORTS = 1024


@dataclass(frozen=True)
class Patience:
    """Time limits in seconds, for one accelerator."""

    #: from power-on to the first answer of the agent
    boot: float
    #: for an answer that does not need a test to run
    answer: float
    #: between two heartbeats; the agent sends four per second
    silence: float
    #: for a test without a limit of its own
    test: float

    @classmethod
    def scaled(cls, slowdown: float) -> Patience:
        """The limits for a guest that is ``slowdown`` times slower than with hardware virtualisation."""
        return cls(boot=15 * slowdown, answer=8 * slowdown, silence=3 + slowdown, test=10 * slowdown)


class Process(Protocol):
    """The process that the agent depends on: QEMU, or the agent itself on a board."""

    def wait(self, deadline: Deadline) -> int | None:
        """Wait for its end, and return its exit status; None if the deadline passes first."""


class Carrier(Protocol):
    """The interface that :class:`Guest` needs of a virtual machine or a board.

    A virtual machine can do more: its memory can be audited, and it has a monitor and a connection for a shell.
    """

    #: the connection to the agent
    agent: socket.socket
    #: receives heartbeats; sending ``q`` asks for a traceback
    heartbeat: socket.socket

    @property
    def child(self) -> Process:
        """The process that the agent depends on."""

    @property
    def virtual(self) -> Vm | None:
        """The virtual machine; None if this is a real one."""

    def check(self) -> None:
        """Raise GuestLost if the machine cannot be used any more."""

    def console_bytes(self) -> bytes:
        """The kernel's log so far."""

    def close(self) -> None:
        """End the machine, or the agent on it."""


class Guest:
    """A machine with an agent.

    :param carrier: the machine; connected, and possibly not started yet.
    :param patience: the time limits, scaled by the speed of the machine.
    """

    def __init__(self, carrier: Carrier, patience: Patience) -> None:
        self.carrier = carrier
        self.patience = patience
        self.ready: protocol.Ready | None = None
        self._decoder = protocol.Decoder()
        self._inbox: list[protocol.Message] = []
        self._last_beat = time.monotonic()
        self._console_offset = 0

    @property
    def vm(self) -> Vm | None:
        """The virtual machine it runs in; None if it is a board."""
        return self.carrier.virtual

    def console_bytes(self) -> bytes:
        """The kernel's log so far."""
        return self.carrier.console_bytes()

    def pause(self) -> None:
        """Stop the processors of a virtual machine until :meth:`resume`. Does nothing to a board.

        Under emulation a guest that waits for its next test takes an eighth of a processor for its heartbeat and its
        timer.
        """
        if self.vm is not None:
            with contextlib.suppress(QmpFailed):  # if QEMU has ended, the next test finds out and says how
                self.vm.stop(Deadline.after(self.patience.answer))

    def resume(self) -> None:
        """Let a paused guest go on."""
        if self.vm is not None:
            with contextlib.suppress(QmpFailed):
                self.vm.run(Deadline.after(self.patience.answer))

    def close(self) -> None:
        """End the guest."""
        self.carrier.close()

    def hello(self, deadline: Deadline, mutant: str = "") -> protocol.Ready:
        """Wait for the agent. Send it the host's time and random data, and receive a description of the guest.

        :param mutant: a mutant to activate in the guest's kernel, or "record"; empty to activate none.
        :raises BootError: if the guest dies, does not answer before the deadline, or does not have the mutant.
        """
        self._send(protocol.Hello(time.time(), secrets.token_hex(64), mutant), deadline)
        try:
            self.ready = self._expect(protocol.Ready, deadline, watch_heartbeat=False)
        except GuestLost as lost:
            raise BootError(self._boot_failure(str(lost))) from lost
        except DeadlineExceeded as error:
            raise BootError(self._boot_failure("it was silent until the deadline")) from error
        if mutant and self.ready.mutant != mutant:
            raise BootError(f"the guest's kernel cannot activate the mutant {mutant}: build it again")
        return self.ready

    def collect(self, archive: bytes, args: list[str], deadline: Deadline) -> protocol.Collected:
        """Send the tests to the guest, and let it collect them."""
        self._send(protocol.Collect(base64.b64encode(archive).decode(), args), deadline)
        return self._expect(protocol.Collected, deadline)

    def run(
        self, run: protocol.Run, deadline: Deadline, audit: Callable[[protocol.Audit], protocol.Audited] | None = None
    ) -> Iterator[dict[str, Any] | protocol.Finished]:
        """Run one test. Yields its serialised reports as they arrive, and then Finished.

        :param audit: answers the test's requests to audit the guest's memory; their time extends the deadline.
        :raises GuestLost: if the guest dies, hangs, or has not finished the test at the deadline.
        """
        try:
            self._send(run, deadline)
            for _ in range(_MOST_REPORTS):
                message = self._next(deadline)
                for _ in range(_MOST_AUDITS):
                    if audit is None or not isinstance(message, protocol.Audit):
                        break
                    began = time.monotonic()
                    answer = audit(message)
                    deadline = Deadline(deadline.at + time.monotonic() - began)
                    self._send(answer, deadline)
                    message = self._next(deadline)
                if isinstance(message, protocol.Finished):
                    yield message
                    return
                yield _checked(message, protocol.Report).data
        except DeadlineExceeded:
            raise GuestLost(LostCondition.TEST_TIMEOUT, "the test did not end in time") from None
        raise ProtocolError(f"the agent sent more than {_MOST_REPORTS - 1} reports of one test")

    def call(self, function: str, data: dict[str, Any], deadline: Deadline) -> None:
        """Start a function of the tests in the guest; :meth:`tell` and :meth:`hear` exchange messages with it.

        :param function: module and name, as in ``guest_tests.explorer.serve:main``.
        """
        self._send(protocol.Call(function, data), deadline)

    def tell(self, data: dict[str, Any], deadline: Deadline) -> None:
        """Send a message to the function that was called."""
        self._send(protocol.Tell(data), deadline)

    def hear(self, deadline: Deadline) -> dict[str, Any]:
        """Wait for a message of the function that was called.

        :raises GuestLost: if the guest dies or hangs, or the function says nothing before the deadline.
        :raises ProtocolError: if the function has returned or failed.
        """
        try:
            message = self._next(deadline)
        except DeadlineExceeded:
            raise GuestLost(LostCondition.TEST_TIMEOUT, "the function in the guest says nothing") from None
        if isinstance(message, protocol.Returned):
            raise ProtocolError(f"the function in the guest has ended: {safe_text.escape(message.error)}".rstrip())
        return _checked(message, protocol.Say).data

    def ask_for_traceback(self) -> None:
        """Make the agent print its Python traceback to the console. The agent ends afterwards."""
        deadline = Deadline.after(self.patience.silence)
        with contextlib.suppress(OSError, GuestLost):
            self.carrier.heartbeat.send(b"q")
            while not deadline.passed:
                self.carrier.check()
                time.sleep(_TICK)

    def start_shell(self, authorized_key: str, deadline: Deadline) -> None:
        """Start the SSH server that is connected to the port for shells."""
        self._send(protocol.Shell(authorized_key), deadline)
        self._expect(protocol.ShellReady, deadline)

    def _send(self, message: protocol.Message, deadline: Deadline) -> None:
        data = memoryview(protocol.encode(message))
        self.carrier.agent.setblocking(False)
        while data:
            try:
                data = data[self.carrier.agent.send(data) :]
            except BlockingIOError:
                deadline.check("the guest to read a message")
                self.carrier.check()
                select.select([], [self.carrier.agent], [], _TICK)
            except OSError as error:
                self._connection_closed(error)

    def _connection_closed(self, error: OSError | None) -> None:
        # QEMU closes its sockets shortly before it can be waited for.
        self.carrier.child.wait(Deadline.after(2))
        self.carrier.check()
        raise GuestLost(LostCondition.QEMU_DIED, f"QEMU closed the connection to the agent: {error or 'end of file'}")

    def _expect(self, wanted: type[_M], deadline: Deadline, *, watch_heartbeat: bool = True) -> _M:
        return _checked(self._next(deadline, watch_heartbeat=watch_heartbeat), wanted)

    def _next(self, deadline: Deadline, *, watch_heartbeat: bool = True) -> protocol.Message:
        self._last_beat = time.monotonic()
        while not self._inbox:
            deadline.check("the agent")
            readable, _, _ = select.select([self.carrier.agent, self.carrier.heartbeat], [], [], _TICK)
            if self.carrier.heartbeat in readable and self._drain(self.carrier.heartbeat.fileno()):
                self._last_beat = time.monotonic()
            if self.carrier.agent in readable:
                self._receive()
                continue  # read all messages before checking whether the guest died
            self.carrier.check()
            silent = time.monotonic() - self._last_beat
            if watch_heartbeat and silent > self.patience.silence:
                message = f"no heartbeat for {silent:.0f} s: the guest does not schedule processes any more"
                raise GuestLost(LostCondition.HANG, message)
        return self._inbox.pop(0)

    def _receive(self) -> None:
        try:
            data = self.carrier.agent.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._connection_closed(error)
            return
        if not data:
            self._connection_closed(None)
        try:
            self._inbox += self._decoder.feed(data)
        except protocol.BadFrame as error:
            raise ProtocolError(f"the agent sent something that is not a message: {error}") from error

    @staticmethod
    def _drain(fd: int) -> bool:
        try:
            return bool(os.read(fd, 1 << 16))
        except OSError:
            return False

    def _boot_failure(self, why: str) -> str:
        text = safe_text.decode(self.carrier.console_bytes())
        complaints = console.splats(text)
        first = f"; {complaints[0].title}" if complaints else "" if text else "; the console is empty"
        shown = complaints[0].text if complaints else "\n".join(text[-2000:].splitlines()[-12:])
        return f"the guest never reached its agent: {why}{first}\n{safe_text.escape(shown)}".rstrip()


def _checked(message: protocol.Message, wanted: type[_M]) -> _M:
    if not isinstance(message, wanted):
        raise ProtocolError(f"the agent sent an unexpected message {message.kind!r}")
    return message
