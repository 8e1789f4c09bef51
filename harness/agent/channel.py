# SPDX-License-Identifier: GPL-2.0
"""The guest's end of the wires: virtio-serial ports, or a pair of pipes on a board."""

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
    """Open the virtio-serial port called ``name``, without blocking mode.

    There is no udev here to make /dev/virtio-ports, so the name is looked up in sysfs. A blocking read was seen to
    stay stuck when a clone's host side changed under it; polling a non-blocking descriptor was not.
    """
    for port in Path("/sys/class/virtio-ports").glob("*"):
        if (port / "name").read_text().strip() == name:
            return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio-serial port is called {name}: is virtio_console loaded?")


class Channel:
    """Sends and receives messages.

    :param reader: descriptor to read from.
    :param writer: descriptor to write to; the same one for a port.
    """

    def __init__(self, reader: int, writer: int | None = None) -> None:
        self._reader = reader
        self._writer = reader if writer is None else writer
        self._decoder = protocol.Decoder()
        self._ready: list[protocol.Message] = []

    @classmethod
    def over_stdio(cls) -> Channel:
        """Use stdin and stdout, and give the rest of the process harmless ones."""
        reader, writer = os.dup(0), os.dup(1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        return cls(reader, writer)

    def send(self, message: protocol.Message) -> None:
        """Send one message, waiting while the host is slow to read."""
        data = memoryview(protocol.encode(message))
        while data:
            select.select([], [self._writer], [])
            try:
                data = data[os.write(self._writer, data) :]
            except BlockingIOError:
                time.sleep(0.005)

    def receive(self) -> protocol.Message:
        """The next message from the host; waits for ever.

        :raises EOFError: if a pipe's other end is closed. A port never ends: it is only ever quiet.
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
                time.sleep(0.005)  # the host's end is closed: a template between its maker and its clones
        return self._ready.pop(0)


def join_port_to_tcp(port: int, tcp_port: int) -> None:
    """Carry bytes between a virtio-serial port and a connection to the guest's own loopback, until either ends.

    Neither side is read while the other has not yet taken what was read before, so that nothing piles up here.

    :param port: from :func:`open_port`.
    """
    with socket.create_connection(("127.0.0.1", tcp_port)) as connection:
        connection.setblocking(False)
        server = connection.fileno()
        peer = {port: server, server: port}
        waiting = {port: b"", server: b""}  # what each is still to be given
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
                            return  # the server hung up, or the host closed its end
            except ConnectionError:
                return
