# SPDX-License-Identifier: GPL-2.0
"""A guest that plays a board. It is reached with the user's own SSH configuration, and no port is open.

``~/.ssh/config`` names a proxy that connects to a unix socket in a private directory. This process listens there, and
connects each client to ``nc`` in the guest through the guest's shell.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from harness.guests.fleet import Fleet
from harness.guests.guest import Guest
from harness.host.cache import silent
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec
from harness.machine import provision
from harness.options import MachineOptions

#: What the tests of shells and boards run on.
KERNEL = "debian:7.3"

_PROXY = """
import os, socket, sys, threading
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])
def up():
    try:
        while data := os.read(0, 65536): sock.sendall(data)
    finally:  # also on a reset, which is what we get where the other side hangs up with something left to read
        os._exit(0)  # whoever used this has hung up or died: nobody else would end it
threading.Thread(target=up, daemon=True).start()
while data := sock.recv(65536): os.write(1, data)
"""


@contextlib.contextmanager
def running(kernel: str = KERNEL) -> Iterator[Guest]:
    """A fresh guest, as ``harness shell`` takes it."""
    spec = grammar.parse(kernel)
    assert isinstance(spec, BootSpec)
    _, machine = provision.provision(spec, MachineOptions(), silent)
    fleet = Fleet.with_library(machine, silent)
    guest, _ = fleet.fresh()
    try:
        yield guest
    finally:
        guest.close()
        fleet.close()


def answer(transport: paramiko.Transport, command: str) -> str:
    """What a command prints in the guest."""
    with transport.open_session() as channel:
        channel.exec_command(command)
        return channel.makefile("rb").read().decode()


class Home:
    """A user's home directory that knows the guest as the machine ``board``."""

    def __init__(self, directory: Path, transport: paramiko.Transport) -> None:
        self.path = directory
        self._transport = transport
        self._ssh = directory / ".ssh"
        self._ssh.mkdir(mode=0o700)
        self._address = directory / "door"
        self._make_key()
        (directory / "proxy.py").write_text(_PROXY)
        proxy = f"{sys.executable} {directory / 'proxy.py'} {self._address}"
        (self._ssh / "config").write_text(f"Host board\n  ProxyCommand {proxy}\n")
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(self._address))
        self._door.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _make_key(self) -> None:
        key = Ed25519PrivateKey.generate()
        private = self._ssh / "id_ed25519"
        private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        private.chmod(0o600)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        answer(self._transport, f"echo '{public}' >>/root/.ssh/authorized_keys")

    def know_the_board(self) -> None:
        """Write the guest's true host key into the known hosts."""
        self.know(self._transport.get_remote_server_key())

    def know(self, key: paramiko.PKey) -> None:
        """Make ``key`` the only one that is known."""
        (self._ssh / "known_hosts").write_text(f"board {key.get_name()} {key.get_base64()}\n")

    def know_nobody(self) -> None:
        """Empty the known hosts."""
        (self._ssh / "known_hosts").write_text("")

    @contextlib.contextmanager
    def without_keys(self) -> Iterator[None]:
        """The user has no key for a while."""
        key, away = self._ssh / "id_ed25519", self._ssh / "elsewhere"
        key.rename(away)
        try:
            yield
        finally:
            away.rename(key)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._door.accept()
                channel = self._transport.open_session()
                channel.exec_command("exec nc 127.0.0.1 22")
                for work in (self._upload, self._download):
                    threading.Thread(target=work, args=(caller, channel), daemon=True).start()

    @staticmethod
    def _upload(caller: socket.socket, channel: paramiko.Channel) -> None:
        with contextlib.suppress(OSError, EOFError):  # the second where the guest has gone already
            try:
                while data := caller.recv(1 << 15):
                    channel.sendall(data)
            finally:
                channel.close()

    @staticmethod
    def _download(caller: socket.socket, channel: paramiko.Channel) -> None:
        with contextlib.suppress(OSError), caller:
            while data := channel.recv(1 << 15):
                caller.sendall(data)
            caller.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let nobody in any more."""
        self._door.close()
