# SPDX-License-Identifier: GPL-2.0
"""What can be tested of boards without one. The other tests of boards are in tests/integration."""

from __future__ import annotations

import subprocess
import sys

#: Opens a connection through a proxy that reads nothing, waits for its first word, and ends.
USER = """
from harness.guests.board import _through
assert _through("sh -c 'echo up; exec sleep 60'").recv(3) == b"up\\n"
"""


def test_a_proxy_that_does_not_notice_our_end_ends_with_us() -> None:
    """It would hold our stderr open: who reads that would wait for it."""
    subprocess.run([sys.executable, "-c", USER], stderr=subprocess.PIPE, check=True, timeout=30)
