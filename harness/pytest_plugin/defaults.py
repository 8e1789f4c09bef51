# SPDX-License-Identifier: GPL-2.0
"""Defaults in pytest's configuration file, for options that are not on the command line."""

from __future__ import annotations

from typing import Literal

import pytest

from harness import options
from harness.options import Option

#: The options that have one. The key in the file is the name of the option.
_OPTIONS: tuple[tuple[Option, Literal["linelist", "string"]], ...] = (
    (options.KERNEL, "linelist"),
    (options.ARCH, "linelist"),
    (options.DEBIAN_MIRROR, "string"),
)

#: Whether the kernels of a run come from the file.
_FROM_FILE = pytest.StashKey[bool]()


def declare(parser: pytest.Parser) -> None:
    """Declare the keys."""
    for option, kind in _OPTIONS:
        parser.addini(_key(option), f"the default of {option.name}", type=kind, default=None)


def fill(config: pytest.Config) -> None:
    """Set the options that are not on the command line.

    :raises pytest.UsageError: if a value in the file has the wrong type.
    """
    kernels = bool(config.getoption("kernel"))
    for option, _ in _OPTIONS:
        key = _key(option)
        if config.getoption(key):
            continue
        try:
            value = config.getini(key)
        except TypeError as error:
            raise pytest.UsageError(str(error)) from error
        if value:
            setattr(config.option, key, value)
    config.stash[_FROM_FILE] = not kernels and bool(config.getoption("kernel"))


def kernels_from_file(config: pytest.Config) -> bool:
    """Whether the kernels of this run come from the file, so that nobody has asked for guests just now."""
    return config.stash.get(_FROM_FILE, False)


def _key(option: Option) -> str:
    return option.name.removeprefix("--").replace("-", "_")
