# SPDX-License-Identifier: GPL-2.0
"""Deadlines, which are passed to nested waits so that their times do not add up."""

from __future__ import annotations

import time
from dataclasses import dataclass

from harness.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A point in time on the monotonic clock.

    The outermost wait creates it and passes it to the waits within.
    """

    #: seconds on :func:`time.monotonic`
    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The point in time ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the deadline is over."""
        return self.remaining == 0.0

    def check(self, waiting_for: str) -> None:
        """Raise if the deadline is over.

        :param waiting_for: completes the message "gave up waiting for …".
        :raises DeadlineExceeded: if the deadline is over.
        """
        if self.passed:
            raise DeadlineExceeded(f"gave up waiting for {waiting_for}")
