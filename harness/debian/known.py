# SPDX-License-Identifier: GPL-2.0
"""The kernel packages that the package lists in the cache name. No network is used, no apt, and nothing is written."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass

from harness.debian.apt_root import Package
from harness.host.cache import Cache

#: The name of an apt root: see :attr:`harness.debian.apt_root.AptRoot.path`.
_ROOT = re.compile(r"([a-z-]+)-([a-z0-9]+)-[0-9a-f]{8}\Z")


@dataclass(frozen=True)
class Listed:
    """The package list of one suite and architecture."""

    suite: str
    #: Debian's name of the architecture
    arch: str
    packages: tuple[Package, ...]
    #: when the list was fetched, in seconds since the epoch
    fetched: float


def listed(cache: Cache) -> list[Listed]:
    """The lists in a cache. Those of several mirrors follow each other."""
    found = []
    for packages in sorted((cache.root / "apt").glob("*/packages.json")):
        name = _ROOT.match(packages.parent.name)
        # A list whose signature turned out to be wrong has no such file.
        with suppress(OSError, ValueError, KeyError, TypeError):
            fetched = (packages.parent / "refreshed").stat().st_mtime
            rows = tuple(Package(**each) for each in json.loads(packages.read_bytes())["value"])
            if name:
                found.append(Listed(name[1], name[2], rows, fetched))
    return found
