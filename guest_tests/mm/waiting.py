# SPDX-License-Identifier: GPL-2.0
"""Bounded waits inside the guest, scaled to the speed of the machine.

An emulated guest may be twenty times slower than real hardware. So times are given for an ordinary machine and
multiplied by the measured :func:`slowness`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

#: seconds that the loop below takes on an ordinary machine of the 2020s
_REFERENCE = 0.001
#: the largest factor: the harness has a deadline for each test as well
_MOST = 6.0


@functools.cache
def slowness() -> float:
    """How much slower than an ordinary machine this one is: 1 to 6, measured once."""
    begin = time.perf_counter()
    for _ in range(25_000):
        pass
    return min(_MOST, max(1.0, (time.perf_counter() - begin) / _REFERENCE))


def patience(seconds: float = 10.0) -> float:
    """``seconds`` of an ordinary machine as seconds of this one."""
    return seconds * slowness()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Poll ``condition`` until it holds.

    :param what: completes the sentence "gave up waiting for …".
    :param seconds: how long an ordinary machine may take; scaled by :func:`slowness`.
    :raises TimeoutError: if it does not hold in time.
    """
    limit = patience(seconds)
    begin = time.monotonic()
    pause = 0.0005
    while not condition():
        if time.monotonic() - begin > limit:
            raise TimeoutError(f"gave up waiting for {what} after {limit:.0f} s")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
