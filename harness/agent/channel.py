# SPDX-License-Identifier: GPL-2.0
"""The agent's connection to the host: a virtio-serial port, or a pair of pipes on a board."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from pathlib import Path

from harness.agent import protocol


def open_port(name: str) -> int:
    """Open the virtio-serial port called ``name`` in non-blocking mode.

    The guest has no udev, so there is no /dev/virtio-ports, and the name is looked up in sysfs. A blocking read was
    seen to hang in a clone, whose host side differs from that of the template; polling was not.
    """
    for port in Path("/sys/class/virtio-ports").glob("*"):
        if (port / "name").read_text().strip() == name:
            return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio-serial port is called {name}: is virtio_console loaded?")


class Channel:
    """Sends and receives messages.

    :param reader: file descriptor to read from.
    :param writer: file descriptor to write to; None for ``reader``, as for a port.
    """

    def __init__(self, reader: int, writer: int | None = None) -> None:
        self._reader = reader
        self._writer = reader if writer is None else writer
        self._decoder = protocol.Decoder()
        self._ready: list[protocol.Message] = []

    @classmethod
    def over_stdio(cls) -> Channel:
        """Use stdin and stdout. For the rest of the process, stdin is empty and stdout is stderr."""
        reader, writer = os.dup(0), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        return cls(reader, writer)

    def send(self, message: protocol.Message) -> None:
        """Send one message. Waits if the host does not read."""
        data = memoryview(protocol.encode(message))
        while data:
            select.select([], [self._writer], [])
            try:
                data = data[os.write(self._writer, data) :]
            except BlockingIOError:
                time.sleep(0.005)

    def receive(self) -> protocol.Message:
        """Wait for the next message from the host, without a time limit.

        :raises EOFError: if the other end of the pipe is closed. A port has no such end of file.
        """
        while not self._ready:
            select.select([self._reader], [], [])
            try:
                data = os.read(self._reader, 1 << 16)
            except BlockingIOError:
                continue
            if data:
                self._ready += self._decoder.feed(data)
            elif self._writer != self._reader:
                raise EOFError
            else:
                time.sleep(0.005)  # no host is connected, as in a template that is not cloned yet
        return self._ready.pop(0)


def join_port_to_tcp(port: int, tcp_port: int) -> None:
    """Relay data between a virtio-serial port and a TCP connection on the loopback device, until either ends.

    A side is not read while data for the other side is waiting, so that memory use is bounded.

    :param port: from :func:`open_port`.
    """
    with socket.create_connection(("127.0.0.1", tcp_port)) as connection:
        connection.setblocking(False)
        server = connection.fileno()
        peer = {port: server, server: port}
        waiting = {port: b"", server: b""}  # data that could not be written yet, by descriptor
        while True:
            readable, writable, _ = select.select(
                [fd for fd in peer if not waiting[peer[fd]]], [fd for fd in peer if waiting[fd]], []
            )
            try:
                for fd in writable:
                    with contextlib.suppress(BlockingIOError):
                        waiting[fd] = waiting[fd][os.write(fd, waiting[fd]) :]
                for fd in readable:
                    with contextlib.suppress(BlockingIOError):
                        waiting[peer[fd]] = os.read(fd, 1 << 15)
                        if not waiting[peer[fd]]:
                            return  # the server or the host closed its end
            except ConnectionError:
                return
