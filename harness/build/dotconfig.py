# SPDX-License-Identifier: GPL-2.0
"""Reads the configuration of a kernel that exists. It is apart from kconfig, which only builds need."""

from __future__ import annotations

import re


def parse(text: str) -> dict[str, str]:
    """The options of a ``.config`` without ``CONFIG_``. Those that are "not set" are absent; strings have no quotes."""
    found = re.findall(r"^CONFIG_(\w+)=(.*)$", text, re.MULTILINE)
    return {name: value[1:-1] if value.startswith('"') else value for name, value in found}
