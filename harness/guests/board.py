# SPDX-License-Identifier: GPL-2.0
"""Boards: running machines that are reached over SSH, with ``--kernel=ssh://root@board``.

The user's SSH configuration is used: known hosts, the SSH agent, keys, and the host name, port, key files and proxy in
``~/.ssh/config``. The board needs only Python. The harness's agent, pytest and the tests are sent into a private
directory on the board. It is removed when the connection ends, see :mod:`harness.guests.board_keeper`.

A board always runs the same kernel: a fresh guest is only a new agent process. There are no heartbeats and no panic
events. If a board stops answering, a lost connection or a test that did not end is reported.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
import shlex
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any, NoReturn

import paramiko

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import BootError, GuestLost, HostError, LostCondition, ProtocolError
from harness.guests.guest import Guest, Patience
from harness.host.cache import Progress
from harness.host.process import killed_with_parent
from harness.kernels.kernel import SshSpec
from harness.machine import payload
from harness.machine.vm import CONSOLE_LIMIT

#: A board may be this many times slower than a PC, as an emulated guest is. A wrong value only delays reporting a hang.
_SLOWDOWN = 8.0

#: The exceptions of paramiko for a lost connection; it raises EOFError until it has noticed the loss itself.
_GONE = (OSError, EOFError)

_KEEPER = Path(__file__).with_name("board_keeper.py")


class _RefuseUnknown(paramiko.MissingHostKeyPolicy):
    """Refuses hosts whose key is not known."""

    def __init__(self, again: str) -> None:
        self._again = again

    def missing_host_key(self, client: paramiko.SSHClient, hostname: str, key: paramiko.PKey) -> NoReturn:
        """Called by paramiko for an unknown host key."""
        raise HostError(
            f"the host key of {hostname} is not among your known hosts ({key.get_name()} {key.fingerprint}): "
            f"if it is the right one, connect once with: {self._again}"
        )


def connect(spec: SshSpec, deadline: Deadline) -> paramiko.SSHClient:
    """Log in to a board with the user's keys.

    :raises HostError: if the board's host key is unknown or has changed, or if the board accepts no key of the user.
    :raises BootError: if it cannot be reached.
    """
    again = f"ssh -p {spec.port} {spec.user}@{spec.host}"
    client = paramiko.SSHClient()
    client.set_missing_host_key_policy(_RefuseUnknown(again))
    config = _user_config(spec)
    limit = max(1.0, deadline.remaining)
    try:
        client.load_system_host_keys()
        proxy = config.get("proxycommand", "none")
        client.connect(
            config["hostname"],
            int(config.get("port", spec.port)) if spec.port == 22 else spec.port,
            spec.user,
            key_filename=config.get("identityfile"),
            timeout=limit,
            banner_timeout=limit,
            auth_timeout=limit,
            sock=None if proxy == "none" else _through(proxy),
        )
    except HostError:
        client.close()
        raise
    except paramiko.BadHostKeyException as error:
        client.close()
        raise HostError(
            f"the host key of {spec.host} is not the one you know: either the board was set up anew, then remove the "
            f"old key with ssh-keygen -R, or somebody else answers: {error}"
        ) from error
    except (paramiko.SSHException, *_GONE) as error:
        client.close()
        # paramiko has no exception class for the case that there was no key to try.
        if isinstance(error, paramiko.AuthenticationException) or "No authentication methods" in str(error):
            why = f"{spec.host} accepts none of your keys for {spec.user}: make this work first: {again}"
            raise HostError(why) from error
        raise BootError(f"cannot reach {spec.host}, port {spec.port}: {error or type(error).__name__}") from error
    transport = client.get_transport()
    assert transport is not None
    transport.set_keepalive(5)  # a dead board is noticed when TCP gives up sending these
    return client


def _through(proxy: str) -> socket.socket:
    """A connection through the stdin and stdout of a command.

    The command is ended with this process. Otherwise it would keep stderr open, and a reader of that would wait for
    it. The signal is SIGTERM and not SIGHUP, which ssh(1) uses, because SIGHUP is ignored under nohup(1).
    """
    ours, theirs = socket.socketpair()
    command = killed_with_parent(["sh", "-c", f"exec {proxy}"], "TERM")
    with theirs:
        process = subprocess.Popen(command, stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True)
    threading.Thread(target=process.wait, name=f"proxy {process.pid}", daemon=True).start()
    return ours


def _user_config(spec: SshSpec) -> dict[str, Any]:
    path = Path("~/.ssh/config").expanduser()
    config = paramiko.SSHConfig()
    if path.exists():
        try:
            config = paramiko.SSHConfig.from_path(str(path))
        except (paramiko.ConfigParseError, OSError) as error:
            raise HostError(f"cannot read {path}: {error}") from error
    return dict(config.lookup(spec.host))


class Session:
    """A connection to one board, and the harness's directory on the board.

    :param client: logged in; closed with the session.
    :raises BootError: if the board has no Python that can run the agent.
    """

    def __init__(self, client: paramiko.SSHClient, name: str, deadline: Deadline) -> None:
        self.name = name
        self._client = client
        self._console = bytearray()
        self._changed = threading.Condition()
        self._token = ""
        transport = client.get_transport()
        assert transport is not None
        self.transport = transport
        self._keeper = transport.open_session(timeout=deadline.remaining)
        self._keeper.exec_command(f"exec python3 -c {shlex.quote(_KEEPER.read_text())}")
        archive = payload.agent_tar()
        with contextlib.suppress(*_GONE):  # if the keeper has ended, its message is read below
            self._keeper.sendall(struct.pack(">Q", len(archive)) + archive)
        about = self._announcement(deadline)
        #: the harness's directory on the board
        self.directory = str(about.get("directory"))
        #: whether the user may read the kernel's log
        self.log = bool(about.get("log"))
        if not about.get("filter"):
            self.close()
            raise BootError(f"{name} has Python {about.get('python')}: the agent needs 3.11.4 or later")
        threading.Thread(target=self._listen, name=f"log of {name}", daemon=True).start()

    def _announcement(self, deadline: Deadline) -> dict[str, Any]:
        line = b""
        self._keeper.settimeout(max(0.1, deadline.remaining))
        try:
            while not line.endswith(b"\n") and len(line) < 4096 and (byte := self._keeper.recv(1)):
                line += byte
            self._keeper.settimeout(None)
            about = json.loads(line)
        except (*_GONE, ValueError) as error:
            said = self._keeper.recv_stderr(4096).decode(errors="replace").strip() if line == b"" else repr(line)
            self._client.close()
            raise BootError(f"{self.name} cannot run Python programs: {said or 'no answer in time'}") from error
        if not isinstance(about, dict):
            raise ProtocolError(f"{self.name} sent something else than its directory")
        return about

    def _listen(self) -> None:
        """Separate the keeper's output into the kernel's log and answers to commands."""
        rest = b""
        while data := self._keeper.recv(1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            rest = rest[-(1 << 20) :]
            for line in lines:
                if line.startswith(b"\0sync "):
                    with self._changed:
                        self._token = line[6:].decode(errors="replace")
                        self._changed.notify_all()
                else:
                    self.add_to_console(line + b"\n")
        with self._changed:
            self.log = False  # the keeper has ended
            self._changed.notify_all()

    def add_to_console(self, data: bytes) -> None:
        """Append to the console log. Data above the limit is dropped, and :meth:`Board.check` reports it."""
        with self._changed:
            self._console += data[: CONSOLE_LIMIT + 1 - len(self._console)]

    def console_bytes(self) -> bytes:
        """The complete log of the kernel since the session began."""
        token = secrets.token_hex(8)
        self.send_command(f"sync {token}")
        with self._changed:
            self._changed.wait_for(lambda: self._token == token or not self.log, 5.0)
            return bytes(self._console)

    @property
    def console_size(self) -> int:
        """The size of the log in bytes."""
        return len(self._console)

    def send_command(self, command: str) -> None:
        """Send a command to the keeper. Does nothing if the keeper has ended."""
        with contextlib.suppress(*_GONE):
            self._keeper.sendall(command.encode() + b"\n")

    def close(self) -> None:
        """Let the keeper remove the directory, and close the connection."""
        with contextlib.suppress(*_GONE):
            self._keeper.shutdown_write()
            self._keeper.status_event.wait(5.0)
        self._client.close()


class _Agent:
    """The agent's process on the board, with those methods of :class:`harness.host.process.Child` that are needed."""

    def __init__(self, channel: paramiko.Channel) -> None:
        self._channel = channel

    @property
    def status(self) -> int | None:
        """The exit status; None while the process runs."""
        return self._channel.exit_status if self._channel.exit_status_ready() else None

    def wait(self, deadline: Deadline) -> int | None:
        """Wait for the end, and return the exit status; None if the deadline passes first."""
        self._channel.status_event.wait(deadline.remaining)
        return self.status


class Board:
    """An agent on a board, with the interface :class:`harness.guests.guest.Carrier`."""

    def __init__(self, session: Session, deadline: Deadline) -> None:
        self._session = session
        self._channel = session.transport.open_session(timeout=deadline.remaining)
        # Python keeps bytecode in the directory, so that the second agent starts several times faster.
        environment = f"HARNESS_PID_FILE=pid PYTHONPATH={shlex.quote(session.directory)} NO_COLOR=1"
        directory = shlex.quote(session.directory)
        self._channel.exec_command(f"cd {directory} && {environment} exec python3 -m harness.agent --stdio")
        self.child = _Agent(self._channel)
        # Guest needs sockets for select(): a paramiko channel does not tell when it can be written to.
        self.agent, self._far_agent = socket.socketpair()
        self.heartbeat, self._far_heartbeat = socket.socketpair()
        for work in (self._upload, self._download, self._forward_stderr, self._forward_abort):
            threading.Thread(target=work, name=f"{work.__name__} {session.name}", daemon=True).start()

    def _upload(self) -> None:
        with contextlib.suppress(*_GONE):
            while data := self._far_agent.recv(1 << 15):
                self._channel.sendall(data)
            self._channel.shutdown_write()

    def _download(self) -> None:
        with contextlib.suppress(*_GONE):
            while data := self._channel.recv(1 << 15):
                self._far_agent.sendall(data)
            self._far_agent.shutdown(socket.SHUT_WR)

    def _forward_stderr(self) -> None:
        """Add the agent's stderr to the console log."""
        while data := self._channel.recv_stderr(1 << 15):
            self._session.add_to_console(data)

    def _forward_abort(self) -> None:
        with contextlib.suppress(*_GONE):
            while self._far_heartbeat.recv(64):
                self._session.send_command("abort")

    @property
    def virtual(self) -> None:
        """A board is no virtual machine."""
        return None

    def console_bytes(self) -> bytes:
        """The kernel's log, if the user may read it, and the agent's stderr."""
        return self._session.console_bytes()

    def check(self) -> None:
        """Check whether the agent can still be used.

        :raises GuestLost: if the connection is lost, the agent ended, or the log grew too long.
        """
        name = self._session.name
        if not self._session.transport.is_active():
            message = f"the connection to {name} is lost: its kernel or the network may have failed"
            raise GuestLost(LostCondition.CONNECTION_LOST, message)
        if self._channel.closed or self._channel.exit_status_ready():
            raise GuestLost(LostCondition.AGENT_DIED, f"the agent on {name} ended with status {self.child.status}")
        if self._session.console_size > CONSOLE_LIMIT:
            raise GuestLost(LostCondition.CONSOLE_FLOOD, f"the log of {name} grew beyond {CONSOLE_LIMIT >> 20} MiB")

    def close(self) -> None:
        """End the agent. Does nothing when it is called again."""
        for sock in (self.agent, self.heartbeat):
            sock.close()
        if not self._channel.status_event.wait(0.5):
            self._session.send_command("kill")
            self._channel.status_event.wait(2.0)
        with contextlib.suppress(*_GONE):
            self._channel.close()
        for sock in (self._far_agent, self._far_heartbeat):
            sock.close()


class BoardFleet:
    """Gives out agents on one board; takes the place of :class:`harness.guests.fleet.Fleet`.

    :param tests: the tests' archive.
    :param args: pytest's command line on the board.
    """

    origin = "board"
    slowdown = _SLOWDOWN

    def __init__(self, spec: SshSpec, tests: bytes, args: list[str], progress: Progress) -> None:
        self.patience = Patience(**{**vars(Patience.scaled(_SLOWDOWN)), "silence": math.inf})
        self._spec = spec
        self._tests = tests
        self._args = args
        self._progress = progress
        self._session: Session | None = None
        self.obstacle = ""

    def fresh(self) -> tuple[Guest, protocol.Collected]:
        """A new agent on the board, and the tests it has collected.

        :raises HostError: if this host may not log in there.
        :raises BootError: if the board cannot be reached, or cannot run the agent.
        """
        deadline = Deadline.after(self.patience.boot)
        board = Board(self._connected(deadline), deadline)
        try:
            guest = Guest(board, self.patience)
            guest.hello(deadline)
            return guest, guest.collect(self._tests, self._args, Deadline.after(self.patience.boot))
        except BaseException:
            board.close()
            raise

    def _connected(self, deadline: Deadline) -> Session:
        if self._session is None or not self._session.transport.is_active():
            self._progress(f"connecting to {self._spec.host}")
            name = f"{self._spec.user}@{self._spec.host}"
            try:
                self._session = Session(connect(self._spec, deadline), name, deadline)
            except (paramiko.SSHException, *_GONE) as error:
                raise BootError(f"lost {name} while the agent was being sent: {error}") from error
        return self._session

    def facts(self, guest: Guest) -> list[str]:
        """What a report says of the machine."""
        ready = guest.ready
        assert ready is not None
        log = "is part of this report" if self._session and self._session.log else "may not be read by this user"
        return [
            f"board:   {self._spec.user}@{self._spec.host}, port {self._spec.port}, up {ready.uptime:.0f} s",
            f"log:     {log}",
            f"Python:  {ready.python}",
        ]

    def start_ahead(self) -> None:
        """Nothing to start: the board runs."""

    def close(self) -> None:
        """Remove what we left on the board, and hang up."""
        if self._session is not None:
            self._session.close()
            self._session = None
