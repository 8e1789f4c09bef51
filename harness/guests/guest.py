# SPDX-License-Identifier: GPL-2.0
"""A guest that answers: the conversation with the agent, and the watch over it."""

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
from harness.machine.vm import Vm

_M = TypeVar("_M", bound=protocol.Message)

#: How often the watch looks for panics and dead processes while the agent is quiet, in seconds.
_TICK = 0.1

#: Audits between two reports of a test; more than it could need, and an end to a guest that asks for ever.
_MOST_AUDITS = 10_000

#: Reports that one test may send: one for each of pytest's three phases, and one for each subtest.
_MOST_REPORTS = 1024


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds, for one accelerator."""

    #: from power-on to the agent's first answer
    boot: float
    #: for an answer that needs no test code
    answer: float
    #: without a heartbeat, of which there are four a second
    silence: float
    #: for a test that names no time of its own
    test: float

    @classmethod
    def scaled(cls, slowdown: float) -> Patience:
        """Figures for a guest that is ``slowdown`` times slower than hardware virtualisation."""
        return cls(boot=15 * slowdown, answer=8 * slowdown, silence=3 + slowdown, test=10 * slowdown)


class Process(Protocol):
    """What carries the agent."""

    def wait(self, deadline: Deadline) -> int | None:
        """Wait for its end; None if the deadline passes first."""


class Carrier(Protocol):
    """What Guest needs of a machine: a virtual one, or a board.

    A virtual machine can do more: it has memory to audit, a monitor, and a wire for a shell.
    """

    #: to the agent
    agent: socket.socket
    #: brings heartbeats; a ``q`` sent there asks for a traceback
    heartbeat: socket.socket

    @property
    def child(self) -> Process:
        """What carries the agent."""

    @property
    def virtual(self) -> Vm | None:
        """The virtual machine; None if this is a real one."""

    def check(self) -> None:
        """Raise GuestLost if it cannot go on."""

    def console_bytes(self) -> bytes:
        """The kernel's log so far."""

    def close(self) -> None:
        """End it."""


class Guest:
    """A machine whose agent we talk to.

    :param carrier: connected; may still be stopped.
    :param patience: scaled by the machine's speed.
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

    def close(self) -> None:
        """End the guest."""
        self.carrier.close()

    def hello(self, deadline: Deadline) -> protocol.Ready:
        """Wait for the agent, give it our clock and fresh randomness, and learn who it is.

        :raises BootError: if the guest dies or stays silent before it answers.
        """
        self._send(protocol.Hello(time.time(), secrets.token_hex(64)), deadline)
        try:
            self.ready = self._expect(protocol.Ready, deadline, watch_heartbeat=False)
        except GuestLost as lost:
            raise BootError(self._never_reached(str(lost))) from lost
        except DeadlineExceeded as error:
            raise BootError(self._never_reached("it was silent until the deadline")) from error
        return self.ready

    def collect(self, archive: bytes, args: list[str], deadline: Deadline) -> protocol.Collected:
        """Give the guest its tests and let it collect them."""
        self._send(protocol.Collect(base64.b64encode(archive).decode(), args), deadline)
        return self._expect(protocol.Collected, deadline)

    def run(
        self, run: protocol.Run, deadline: Deadline, audit: Callable[[protocol.Audit], protocol.Audited] | None = None
    ) -> Iterator[dict[str, Any] | protocol.Finished]:
        """Run one test; yields its serialised reports as they come, then Finished.

        :param audit: answers the test's requests to audit the guest's memory, which do not count for the deadline.
        :raises GuestLost: if the guest dies, hangs, or is still at it when the deadline passes.
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

    def ask_for_traceback(self) -> None:
        """Make the agent print to the console where its Python code is. The guest ends with it."""
        deadline = Deadline.after(self.patience.silence)
        with contextlib.suppress(OSError, GuestLost):
            self.carrier.heartbeat.send(b"q")
            while not deadline.passed:
                self.carrier.check()
                time.sleep(_TICK)

    def start_shell(self, authorized_key: str, deadline: Deadline) -> None:
        """Start the SSH server behind the machine's shell wire."""
        self._send(protocol.Shell(authorized_key), deadline)
        self._expect(protocol.ShellReady, deadline)

    def _send(self, message: protocol.Message, deadline: Deadline) -> None:
        data = memoryview(protocol.encode(message))
        self.carrier.agent.setblocking(False)
        while data:
            try:
                data = data[self.carrier.agent.send(data) :]
            except BlockingIOError:
                deadline.check("the guest to read what we send")
                self.carrier.check()
                select.select([], [self.carrier.agent], [], _TICK)
            except OSError as error:
                self._gone(error)

    def _gone(self, error: OSError | None) -> None:
        # QEMU closes its sockets a moment before it can be reaped.
        self.carrier.child.wait(Deadline.after(2))
        self.carrier.check()
        raise GuestLost(LostCondition.QEMU_DIED, f"QEMU closed the agent's wire: {error or 'end of file'}")

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
                continue  # what a guest said before it died is heard first
            self.carrier.check()
            silent = time.monotonic() - self._last_beat
            if watch_heartbeat and silent > self.patience.silence:
                message = f"no heartbeat for {silent:.0f} s: nothing is scheduled in the guest"
                raise GuestLost(LostCondition.HANG, message)
        return self._inbox.pop(0)

    def _receive(self) -> None:
        try:
            data = self.carrier.agent.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(error)
            return
        if not data:
            self._gone(None)
        try:
            self._inbox += self._decoder.feed(data)
        except protocol.BadFrame as error:
            raise ProtocolError(f"the agent does not speak the protocol: {error}") from error

    @staticmethod
    def _drain(fd: int) -> bool:
        try:
            return bool(os.read(fd, 1 << 16))
        except OSError:
            return False

    def _never_reached(self, why: str) -> str:
        text = safe_text.decode(self.carrier.console_bytes())
        complaints = console.splats(text)
        first = f"; {complaints[0].title}" if complaints else "" if text else "; the console is empty"
        shown = complaints[0].text if complaints else "\n".join(text[-2000:].splitlines()[-12:])
        return f"the guest never reached its agent: {why}{first}\n{safe_text.escape(shown)}".rstrip()


def _checked(message: protocol.Message, wanted: type[_M]) -> _M:
    if not isinstance(message, wanted):
        raise ProtocolError(f"the agent said {message.kind!r} out of turn")
    return message
