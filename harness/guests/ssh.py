# SPDX-License-Identifier: GPL-2.0
"""SSH into a guest, without a network.

The agent joins the guest's own loopback, where dropbear listens, to a virtio-serial port, and paramiko speaks over the
socket at our end of that port. The guest has no network device and nothing listens on the host. The key pair is made
for one guest and lives in memory only.
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

#: How often we look whether the guest lives and the window has another size, in seconds.
_TICK = 0.25


#: Exit status when the guest ended under the shell; what ssh itself uses.
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
    # Key exchange is slow in an emulated guest; paramiko's own limits are for networks.
    transport.banner_timeout = transport.handshake_timeout = transport.auth_timeout = deadline.remaining
    try:
        # No host key is checked: the other end of this wire can only be the guest we started.
        transport.start_client(timeout=deadline.remaining)
        transport.auth_publickey("root", key)
    except (paramiko.SSHException, EOFError, OSError) as error:
        transport.close()
        guest.vm.check()
        raise BootError(f"the guest's SSH server does not answer: {error or type(error).__name__}") from error
    return transport


def run(transport: paramiko.Transport, command: str, alive: Callable[[], None]) -> int:
    """Run a command, or a login shell if it is empty, with our own stdin, stdout and stderr.

    With a terminal on both sides the guest gets one too: raw, of the same size and kind.

    :param alive: called now and then; raises to give up.
    :returns: its exit status; 128 + N if signal N ended it, LOST if it ended without saying how.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with transport.open_session() as channel:
        if interactive:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
            channel.get_pty(os.environ.get("TERM", "vt100"), columns, lines)
        if command:
            # What is no login shell reads no profile.
            channel.exec_command(f". /root/.profile; {command}")
        else:
            channel.invoke_shell()
        with _raw(sys.stdin.fileno()) if interactive else contextlib.nullcontext():
            _relay(channel, alive, interactive)
        channel.status_event.wait(2)
        return _status(channel)


def _status(channel: paramiko.Channel) -> int:
    # paramiko keeps -1 for "not said"; dropbear reports death by a signal by its name only, which paramiko drops.
    return channel.exit_status if channel.exit_status >= 0 else LOST


def _relay(channel: paramiko.Channel, alive: Callable[[], None], interactive: bool) -> None:
    """Carry bytes until the remote side has ended and all it said is written."""
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
    """The terminal without echo, line editing and signals, for a while."""
    before = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
