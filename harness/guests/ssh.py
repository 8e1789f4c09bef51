# SPDX-License-Identifier: GPL-2.0
"""SSH into a guest that has no network.

In the guest, dropbear listens on the loopback device, and the agent relays between it and a virtio-serial port. On the
host, paramiko uses the socket of that port. The guest has no network device, and nothing listens on the host. Each
guest has a key pair of its own, which is kept in memory only.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from typing import IO

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from harness.deadline import Deadline
from harness.errors import BootError, UsageError
from harness.guests.guest import Guest

#: Interval in seconds for checking whether the guest is alive and whether the size of the terminal changed.
_TICK = 0.25


#: The exit status if the guest ended during the session; the same as that of ssh(1).
LOST = 255


def connect(guest: Guest) -> paramiko.Transport:
    """Log in to a guest.

    :raises BootError: if its SSH server does not answer.
    :raises UsageError: if it is no virtual machine.
    """
    if guest.vm is None:
        raise UsageError("a board has an SSH server of its own: log in there with ssh")
    deadline = Deadline.after(guest.patience.answer)
    private = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    key = paramiko.Ed25519Key.from_private_key(io.StringIO(private.decode()))
    guest.start_shell(f"{key.get_name()} {key.get_base64()}", deadline)
    transport = paramiko.Transport(guest.vm.shell)
    # Key exchange takes long in an emulated guest, longer than paramiko's default limits.
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = deadline.remaining
    try:
        # The host key is not checked: only the guest can be at the other end of the socket.
        transport.start_client(timeout=deadline.remaining)
        transport.auth_publickey("root", key)
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        guest.vm.check()
        raise BootError(f"the guest's SSH server does not answer: {error or type(error).__name__}") from error
    return transport


def run(transport: paramiko.Transport, command: str, alive: Callable[[], None]) -> int:
    """Run a command in the guest with the stdin, stdout and stderr of this process.

    If stdin and stdout are a terminal, the command gets one of the same type and size.

    :param command: empty for a login shell.
    :param alive: called at intervals; raises an exception to give up.
    :returns: the exit status; 128 + N if signal N ended the command; LOST if the guest ended.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with transport.open_session() as channel:
        if interactive:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            channel.get_pty(os.environ.get("TERM", "vt100"), columns, lines)
        if command:
            # Only a login shell reads the profile by itself.
            channel.exec_command(f". /root/.profile; {command}")
        else:
            channel.invoke_shell()
        with _raw(sys.stdin.fileno()) if interactive else contextlib.nullcontext():
            _relay(channel, alive, interactive)
        channel.status_event.wait(2)
        return _status(channel)


def _status(channel: paramiko.Channel) -> int:
    # -1 is paramiko's value for an unknown status. Dropbear reports a signal by name only, which paramiko ignores.
    return channel.exit_status if channel.exit_status >= 0 else LOST


def _relay(channel: paramiko.Channel, alive: Callable[[], None], interactive: bool) -> None:
    """Relay data until the command has ended and all its output is written."""
    stdin = sys.stdin.fileno()
    sources: list[paramiko.Channel | int] = [channel, stdin]
    size = os.get_terminal_size(sys.stdout.fileno()) if interactive else None
    while True:
        readable, _, _ = select.select(sources, [], [], _TICK)
        if channel in readable:
            _forward(channel, sys.stdout.buffer, sys.stderr.buffer)
            if channel.eof_received and not channel.recv_ready() and not channel.recv_stderr_ready():
                return
        if stdin in readable:
            if data := os.read(stdin, 1 << 15):
                channel.sendall(data)
            else:
                channel.shutdown_write()
                sources.remove(stdin)
        if not readable:
            alive()
        if interactive and size != (now := os.get_terminal_size(sys.stdout.fileno())):
            channel.resize_pty(*now)
            size = now


def _forward(channel: paramiko.Channel, out: IO[bytes], err: IO[bytes]) -> None:
    while channel.recv_ready():
        out.write(channel.recv(1 << 15))
    while channel.recv_stderr_ready():
        err.write(channel.recv_stderr(1 << 15))
    out.flush()
    err.flush()


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
    """Set the terminal to raw mode: no echo, no line editing, no signals."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
