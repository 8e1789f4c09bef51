# SPDX-License-Identifier: GPL-2.0
"""Trees of forked processes that run functions on request.

::

    with Child() as child:                     # shares this process's memory copy-on-write
        child.call(mapping.check)              # any picklable callable: bound methods, module-level functions
        with child.fork() as grandchild:       # forked by the child, controlled from here
            grandchild.call(move, mapping, area.page(10))

No process is left behind: children die with the thread that forked them, and in the end of their ``with`` block.
Requests are pickled. Both ends are the same program in the same guest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import struct
import traceback
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, ParamSpec, Self, TypeVar

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.waiting import patience, wait_until
from harness.agent.processes import state_of

P = ParamSpec("P")
T = TypeVar("T")

#: Children that this process controls. Their sockets must be closed in new children, or the end of file never comes.
_handles: list[Child] = []
#: in a child, its end of the socket to the process that controls it
_commands: socket.socket | None = None


class ChildDied(RuntimeError):
    """A child ended instead of answering."""

    def __init__(self, pid: int, status: int | None, during: str) -> None:
        #: its process id
        self.pid = pid
        #: as :func:`os.waitpid` gives it; None where that is not known
        self.status = status
        self.during = during
        super().__init__(pid, status, during)

    @property
    def signal(self) -> signal.Signals | None:
        """The signal that killed it."""
        if self.status is None or not os.WIFSIGNALED(self.status):
            return None
        return signal.Signals(os.WTERMSIG(self.status))

    def __str__(self) -> str:
        if self.signal is not None:
            how = f"was killed by {self.signal.name}"
        elif self.status is None:
            how = "is gone"
        else:
            how = f"exited with status {os.waitstatus_to_exitcode(self.status)}"
        return f"child {self.pid} {how} during {self.during}"


# --- frames ------------------------------------------------------------------------------------------------------

_LENGTH = struct.Struct("=Q")


def _send(sock: socket.socket, message: object) -> None:
    data = pickle.dumps(message)
    sock.sendall(_LENGTH.pack(len(data)) + data)


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        got = sock.recv(length - len(data))
        if not got:
            raise EOFError
        data += got
    return bytes(data)


def _receive(sock: socket.socket) -> Any:
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    return pickle.loads(_exactly(sock, length))


# --- the child's side --------------------------------------------------------------------------------------------


def _fork(outlive: bool) -> tuple[int, socket.socket]:
    """Fork a process that runs requests; returns its id and this end of the socket to it."""
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    with warnings.catch_warnings():
        # The agent may have threads. The child has only this one, and takes no lock that another thread may hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        theirs.close()
        # Wait until the child is set up: a signal must not arrive earlier.
        try:
            _receive(ours)
        except (EOFError, ConnectionError):
            raise ChildDied(pid, _reap(pid, 10.0), "its start") from None
        return pid, ours
    try:
        ours.close()
        _serve(theirs, parent, outlive)
    except BaseException:
        traceback.print_exc()
        os._exit(70)  # EX_SOFTWARE


def _serve(sock: socket.socket, parent: int, outlive: bool) -> NoReturn:
    global _commands
    if not outlive:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
    faulthandler.disable()  # some tests want a child to be killed by a signal
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for handle in _handles:
        handle.socket.close()
    _handles.clear()
    if _commands is not None:
        _commands.close()
    _commands = sock
    _send(sock, "ready")
    while True:
        try:
            request = _receive(sock)
        except (EOFError, ConnectionError):
            os._exit(0)
        if request[0] == "fork":
            pid, theirs = _fork(request[1])
            _send(sock, ("forked", pid))
            socket.send_fds(sock, [b"f"], [theirs.fileno()])
            theirs.close()
        else:
            _send(sock, _answer(*request[1:]))


def _answer(function: Callable[..., object], args: tuple[object, ...], kwargs: dict[str, object]) -> object:
    try:
        value = function(*args, **kwargs)
        pickle.dumps(value)
    except pytest.skip.Exception as skip:
        return "skipped", str(skip)  # pytest's own exceptions cannot be pickled
    except BaseException as error:
        error.add_note(f"in process {os.getpid()}:\n" + "".join(traceback.format_exception(error)).rstrip())
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return "raised", RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return "raised", error
    return "value", value


def _reap(pid: int, seconds: float) -> int | None:
    """Wait for a child of this process; None if it is no child of this process (any more)."""
    status: int | None = None

    def gone() -> bool:
        nonlocal status
        try:
            reaped, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return True
        return reaped == pid

    wait_until(gone, f"the end of process {pid}", seconds)
    return status


# --- the commanding side -----------------------------------------------------------------------------------------


class Child:
    """A forked copy of this process that runs functions on request. A context manager that ends it."""

    def __init__(self, *, outlive_parent: bool = False) -> None:
        """Fork a child of this process.

        :param outlive_parent: do not kill it when its parent dies.
        """
        # Orphans become children of this process instead of init, so that it can reap them.
        syscalls.prctl(syscalls.PR_SET_CHILD_SUBREAPER, 1)
        pid, sock = _fork(outlive_parent)
        self._become(pid, sock, None)

    def _become(self, pid: int, sock: socket.socket, parent: Child | None) -> None:
        #: its process id
        self.pid = pid
        #: this end of the connection to it
        self.socket = sock
        #: the child that forked it; None if this process did
        self.parent = parent
        self.status: int | None = None
        self._ended = False
        self._running = ""
        self.children: list[Child] = []
        _handles.append(self)

    def fork(self, *, outlive_parent: bool = False) -> Child:
        """Have the child fork a child of its own.

        :param outlive_parent: do not kill the grandchild when the child dies.
        """
        self._begin("fork()", ("fork", outlive_parent))
        pid = self.result()
        _, fds, _, _ = socket.recv_fds(self.socket, 1, 1)
        grandchild = Child.__new__(Child)
        grandchild._become(pid, socket.socket(fileno=fds[0]), self)
        self.children.append(grandchild)
        return grandchild

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``function`` in the child and return its value. An error or skip that it raises is raised here too.

        :param function: picklable: a module-level function, or a method of a picklable object. Its arguments travel by
            value; addresses mean the same on both sides.
        :raises ChildDied: if the child dies instead of answering.
        :raises TimeoutError: if it does not answer in time; it must not be used any more.
        """
        self.start(function, *args, **kwargs)
        value: T = self.result()
        return value

    def start(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Begin :meth:`call` without waiting; :meth:`result` must follow."""
        self._begin(getattr(function, "__qualname__", repr(function)), ("call", function, args, kwargs))

    def _begin(self, what: str, message: object) -> None:
        if self._running:
            raise RuntimeError(f"child {self.pid} is still busy with {self._running}")
        self._running = what
        try:
            _send(self.socket, message)
        except ConnectionError:
            self._died()

    def result(self, seconds: float = 60.0) -> Any:
        """The value of what was started.

        :param seconds: how long an ordinary machine may take.
        :raises ChildDied: if the child dies instead of answering.
        :raises TimeoutError: if it does not answer in time; it must not be used any more.
        """
        limit = patience(seconds)
        self.socket.settimeout(limit)
        try:
            kind, value = _receive(self.socket)
        except (EOFError, ConnectionError):
            self._died()
        except TimeoutError:
            raise TimeoutError(f"child {self.pid} did not finish {self._running} within {limit:.0f} s") from None
        self._running = ""
        if kind == "raised":
            raise value
        if kind == "skipped":
            pytest.skip(value)
        return value

    def _died(self) -> NoReturn:
        during, self._running = self._running, ""
        raise ChildDied(self.pid, self.wait(), during)

    @property
    def alive(self) -> bool:
        """Whether it still answers signals and was not waited for."""
        return not self._ended and state_of(self.pid) not in ("", "Z", "X")

    def wait(self, seconds: float = 10.0) -> int | None:
        """Wait until it has ended, and reap it.

        :returns: the status as :func:`os.waitpid` gives it; None where that is not known.
        :raises TimeoutError: if it does not end in time.
        """
        if self._ended:
            return self.status
        if self.parent is None or not self.parent.alive:
            self.status = _reap(self.pid, seconds)
        elif self.parent._running:
            # Its parent cannot reap it now. It stays a zombie until the parent's close() makes it this process's child.
            wait_until(lambda: not self.alive, f"the end of process {self.pid}", seconds)
            return None
        else:
            try:
                self.status = self.parent.call(_reap, self.pid, seconds)
            except ChildDied:
                self.status = _reap(self.pid, seconds)
        self._ended = True
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> int | None:
        """Send a signal that ends it, and wait for that."""
        if not self._ended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
        return self.wait()

    def close(self) -> None:
        """End it and everything it forked through :meth:`fork`. Doing so twice is fine."""
        self.kill()
        # Its children are orphans now, so that this process can reap them.
        for child in self.children:
            child.close()
        self.socket.close()
        if self in _handles:
            _handles.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
