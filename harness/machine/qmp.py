# SPDX-License-Identifier: GPL-2.0
"""QEMU's machine protocol, without asyncio.

``qemu.qmp`` is asynchronous throughout. One event loop in one daemon thread serves every machine of the process; this
façade is all that the rest of the harness sees of it.
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
    """QEMU refused a command, or the connection is gone."""


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="qmp", daemon=True).start()
    return loop


class Qmp:
    """A connection to one QEMU.

    :param sock: our end of the socket pair whose other end QEMU holds; the connection owns it from now on.
    :param name: says which machine, in log lines.
    """

    def __init__(self, sock: socket.socket, name: str, deadline: Deadline) -> None:
        self._client = QMPClient(name)
        #: events in order of arrival, as QEMU sends them: ``{"event": …, "data": …}``
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
        """Run one command and return what it returns.

        Underscores in argument names stand for the dashes QMP uses.

        :raises QmpFailed: if QEMU refuses, or has gone.
        :raises DeadlineExceeded: if no answer comes in time.
        """
        dashed = {name.replace("_", "-"): value for name, value in arguments.items()}
        return self._await(self._client.execute(command, dashed or None), deadline, f"QEMU to answer {command}")

    def close(self) -> None:
        """Drop the connection; quiet if it has gone already."""
        with contextlib.suppress(HarnessError):  # the other side may have died: then there is nothing to close
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
