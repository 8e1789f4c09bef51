# SPDX-License-Identifier: GPL-2.0
"""What is written for the person at a terminal: colours, and one line that says what takes so long."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from typing import IO

#: Where no terminal shows it, a line is written after this many seconds of work, and then at most as often.
_SELDOM = 20.0


def colourful(stream: IO[str]) -> bool:
    """Whether the stream is a terminal, and the user did not turn off colours; see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class ProgressLine:
    """One line that is rewritten in place on a terminal; elsewhere an ordinary line now and then, if work is long.

    :param write: writes text, at once.
    :param width: gives the terminal's width in columns.
    :param in_place: whether a terminal shows what is written.
    """

    def __init__(self, write: Callable[[str], None], width: Callable[[], int], *, in_place: bool) -> None:
        self._write = write
        self._width = width
        self._in_place = in_place and os.environ.get("TERM") != "dumb"
        self._last = time.monotonic()
        #: whether a line is shown that :meth:`clear` has to take away
        self.shown = False

    @classmethod
    def on(cls, stream: IO[str], *, only_terminal: bool = False) -> ProgressLine:
        """The line of a command that writes to ``stream``.

        :param only_terminal: write nothing if the stream is no terminal, because it belongs to somebody else then.
        """

        def write(text: str) -> None:
            if stream.isatty() or not only_terminal:
                stream.write(text)
                stream.flush()

        return cls(write, lambda: shutil.get_terminal_size().columns, in_place=stream.isatty())

    def __call__(self, message: str) -> None:
        """Show one step: a sentence without a full stop."""
        message = f"harness: {message}"
        if self._in_place:
            # A line that reaches the last column would wrap, and could not be rewritten.
            room = max(20, self._width() - 1)
            shown = message if len(message) <= room else f"{message[: room - 1]}…"
            self._write(f"\r\033[K{shown}")
            self.shown = True
        elif time.monotonic() - self._last >= _SELDOM:
            self._write(f"{message}\n")
            self._last = time.monotonic()

    def clear(self) -> None:
        """Take the line away, so that somebody else may write. Harmless if none is shown."""
        if self.shown:
            self._write("\r\033[K")
            self.shown = False
