# SPDX-License-Identifier: GPL-2.0
"""The directories of the project and of the user (XDG base directories)."""

from __future__ import annotations

import os
from pathlib import Path

APP = "mremap-harness"

#: the checkout, which contains guest_tests/, images/ and kernel_configs/
PROJECT = Path(__file__).resolve().parent.parent


def _base(variable: str, default: str) -> Path:
    # The XDG specification says that relative paths are invalid and must be ignored.
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default


def cache_dir() -> Path:
    """The directory for kernels, userlands and templates. It can be deleted; everything in it is made again."""
    return _base("XDG_CACHE_HOME", ".cache") / APP


def state_dir() -> Path:
    """The directory for the evidence of failures, and for results of probing this host."""
    return _base("XDG_STATE_HOME", ".local/state") / APP
