# SPDX-License-Identifier: GPL-2.0
"""The processes that a program forks. Each waits for orders of the first process and does nothing by itself."""

from __future__ import annotations

import os
import signal
import struct
from typing import NoReturn

from guest_tests.explorer.actions import Actions
from guest_tests.explorer.arena import Arena
from harness.programs.memory import Step

#: kind, first page, pages, first page of the place, pages afterwards, and how many bytes of data follow
_ORDER = struct.Struct("=6i")
_ANSWER = struct.Struct("=i")

#: orders that are no operations of a program
_LOOK = -1
_LOOK_AT_ALL = -2


class ChildDied(Exception):
    """A child ended in the middle of a program. The message says how."""


class Child:
    """One forked process, and the connection to it."""

    def __init__(self, pid: int, orders: int, answers: int) -> None:
        self.pid = pid
        self._orders = orders
        self._answers = answers

    def do(self, step: Step, tags: bytes) -> int:
        """Do one step there; returns 0 or an errno.

        :raises ChildDied: if it ends instead.
        """
        self._send(step.kind, step.start, step.pages, step.dst, step.new, tags)
        return self._number()

    def tags(self, start: int, end: int) -> tuple[bytes, bytes]:
        """As :meth:`Arena.tags`, there."""
        self._send(_LOOK, start, end, 0, 0)
        return self._exactly(end - start), self._exactly(end - start)

    def first_wrong(self, start: int, expected: bytes) -> int | None:
        """As :meth:`Arena.first_wrong`, there."""
        self._send(_LOOK_AT_ALL, start, 0, 0, 0, expected)
        found = self._number()
        return None if found < 0 else found

    def _send(self, kind: int, start: int, pages: int, dst: int, new: int, data: bytes = b"") -> None:
        try:
            os.write(self._orders, _ORDER.pack(kind, start, pages, dst, new, len(data)) + data)
        except BrokenPipeError:
            self._died()

    def _number(self) -> int:
        number: int = _ANSWER.unpack(self._exactly(_ANSWER.size))[0]
        return number

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = os.read(self._answers, count - len(data))
            if not more:
                self._died()
            data += more
        return data

    def _died(self) -> NoReturn:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        raise ChildDied(f"the child ended with {ending(status)}")

    def end(self) -> None:
        """End it, if it still runs, and wait until it is gone."""
        os.close(self._orders)
        os.close(self._answers)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


def ending(status: int) -> str:
    """How a process ended, as in ``signal 11``.

    :param status: of ``waitpid()``.
    """
    return f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"


def fork(arena: Arena, actions: Actions, others: list[Child]) -> Child:
    """Fork the calling process.

    :param others: children whose connections the new one must not keep.
    """
    their_orders, orders = os.pipe()
    answers, their_answers = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            for fd in (orders, answers, *(fd for each in others for fd in (each._orders, each._answers))):
                os.close(fd)
            actions.forget()
            _serve(arena, actions, their_orders, their_answers)
        finally:
            os._exit(1)
    os.close(their_orders)
    os.close(their_answers)
    return Child(pid, orders, answers)


def _serve(arena: Arena, actions: Actions, orders: int, answers: int) -> None:
    while header := os.read(orders, _ORDER.size):
        kind, start, pages, dst, new, length = _ORDER.unpack(header)
        data = os.read(orders, length) if length else b""
        if kind == _LOOK:
            os.write(answers, b"".join(arena.tags(start, pages)))
        elif kind == _LOOK_AT_ALL:
            found = arena.first_wrong(start, data)
            os.write(answers, _ANSWER.pack(-1 if found is None else found))
        else:
            step = Step(kind, 0, start, pages, dst, new, ())
            os.write(answers, _ANSWER.pack(actions.table[kind](step, data)))
