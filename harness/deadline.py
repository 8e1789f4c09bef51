# SPDX-License-Identifier: GPL-2.0
"""Points in time that are passed down, so that nested waits never add up."""

from __future__ import annotations

import time
from dataclasses import dataclass

from harness.errors import DeadlineExceeded


@dataclass(frozen=True)
class Deadline:
    """A moment on the monotonic clock.

    Made once, at the outermost wait, and handed to every wait below.
    """

    #: seconds on :func:`time.monotonic`
    at: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """The moment ``seconds`` from now."""
        return cls(time.monotonic() + seconds)

    @property
    def remaining(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining == 0.0

    def check(self, waiting_for: str) -> None:
        """Raise if the moment has passed.

        :param waiting_for: completes the sentence "gave up waiting for …".
        :raises DeadlineExceeded: if no time is left.
        """
        if self.passed:
            raise DeadlineExceeded(f"gave up waiting for {waiting_for}")
