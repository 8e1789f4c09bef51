# SPDX-License-Identifier: GPL-2.0
"""Where files live: the XDG base directories, and short private directories for sockets."""

from __future__ import annotations

import os
from pathlib import Path

APP = "mremap-harness"

#: The checkout: holds guest_tests/, images/ and kernel_configs/ beside this package.
PROJECT = Path(__file__).resolve().parent.parent


def _base(variable: str, default: str) -> Path:
    # The XDG specification calls relative values invalid and asks to ignore them.
    value = os.environ.get(variable, "")
    return Path(value) if os.path.isabs(value) else Path.home() / default


def cache_dir() -> Path:
    """Kernels, images, templates: anything that can be made again. Safe to delete."""
    return _base("XDG_CACHE_HOME", ".cache") / APP


def state_dir() -> Path:
    """Evidence of failures, and what was learnt about this host."""
    return _base("XDG_STATE_HOME", ".local/state") / APP
