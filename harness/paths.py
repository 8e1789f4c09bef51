# SPDX-License-Identifier: GPL-2.0
"""The directories of the project and of the user (XDG base directories)."""

from __future__ import annotations

import os
from pathlib import Path

APP = "mremap-harness"

_PACKAGE = Path(__file__).resolve().parent

#: The directory that holds this package: the top of a checkout, or where pip installed the project.
PROJECT = _PACKAGE.parent

# A wheel holds these two below the package (see pyproject.toml), a checkout beside it.
_DATA = _PACKAGE / "data" if (_PACKAGE / "data").is_dir() else PROJECT

#: What defines a kernel: fragments, presets, patches, variants. Never written to.
KERNEL_CONFIGS = _DATA / "kernel_configs"

#: The recipe of the guest's userland, and its init. Never written to.
IMAGES = _DATA / "images"

#: The project's own guest tests, and the library for guest tests. Never written to.
GUEST_TESTS = PROJECT / "guest_tests"


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
