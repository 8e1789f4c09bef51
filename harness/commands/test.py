# SPDX-License-Identifier: GPL-2.0
"""``harness test``: pytest, for installations that put only the project's own commands on PATH (pipx)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest


def run(arguments: Sequence[str]) -> int:
    """Run pytest, and return its exit status.

    :param arguments: pytest's. The plug-in chooses the guest tests where they name a kernel and no file.
    """
    return int(pytest.main(list(arguments)))
