# SPDX-License-Identifier: GPL-2.0
"""A synchronous interface to the QEMU Machine Protocol (QMP).

The library ``qemu.qmp`` is asynchronous. One event loop in a daemon thread serves all machines of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
from collections.abc import Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import cache
from typing import Any, TypeVar

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from harness.deadline import Deadline
from harness.errors import DeadlineExceeded, HarnessError

_T = TypeVar("_T")


class QmpFailed(HarnessError):
    """QEMU refused a command, or the connection is lost."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="qmp", daemon=True).start()
    return loop


class Qmp:
    """A connection to one QEMU.

    :param sock: one end of a socket pair whose other end QEMU has; closed with the connection.
    :param name: the machine's name in log messages.
    :param deadline: for QEMU's greeting.
    :raises QmpFailed: if QEMU ends the connection.
    :raises DeadlineExceeded: if QEMU does not send its greeting in time.
    """

    def __init__(self, sock: socket.socket, name: str, deadline: Deadline) -> None:
        self._client = QMPClient(name)
        #: the events that QEMU sent, in order: ``{"event": …, "data": …}``
        self.events: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._collector: asyncio.Task[None] | None = None
        self._await(self._connect(sock), deadline, "QEMU's greeting")

    async def _connect(self, sock: socket.socket) -> None:
        listener = EventListener()
        self._client.register_listener(listener)
        await self._client.connect(sock)
        self._collector = asyncio.ensure_future(self._collect(listener))

    async def _collect(self, listener: EventListener) -> None:
        async for event in listener:
            self.events.put(dict(event))

    def execute(self, command: str, deadline: Deadline, **arguments: Any) -> Any:
        """Execute one command and return its result.

        :param arguments: the arguments of the command, with underscores instead of dashes in their names.
        :raises QmpFailed: if QEMU refuses, or ends the connection.
        :raises DeadlineExceeded: if QEMU does not answer in time.
        """
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._await(self._client.execute(command, dashed or None), deadline, f"QEMU to answer {command}")

    @property
    def version(self) -> str:
        """QEMU's version, as its greeting has it: ``7.2.19 (Debian 1:7.2+dfsg-7)``."""
        greeting = self._client.greeting
        if greeting is None:
            return "unknown"
        version: dict[str, Any] = dict(greeting.QMP.version)
        number = ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))
        return f"{number} ({version['package']})" if version["package"] else number

    def close(self) -> None:
        """Close the connection. Does nothing if it is lost."""
        with contextlib.suppress(HarnessError):  # QEMU may have ended
            self._await(self._disconnect(), Deadline.after(2), "QEMU to hang up")

    async def _disconnect(self) -> None:
        if self._collector is not None:
            self._collector.cancel()
        await self._client.disconnect()

    def _await(self, work: Coroutine[Any, Any, _T], deadline: Deadline, waiting_for: str) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, _loop())
        try:
            return future.result(deadline.remaining)
        except FutureTimeoutError as error:
            future.cancel()
            raise DeadlineExceeded(f"gave up waiting for {waiting_for}") from error
        except ExecuteError as error:
            raise QmpFailed(f"QEMU refused: {error}") from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpFailed(f"lost QEMU while waiting for {waiting_for}: {error}") from error
