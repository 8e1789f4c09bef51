# SPDX-License-Identifier: GPL-2.0
"""When a terminal may be given colours."""

from __future__ import annotations

import os
from typing import IO


def colourful(stream: IO[str]) -> bool:
    """Whether a person who wants colours reads this stream; see no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
