# SPDX-License-Identifier: GPL-2.0
"""What ``--kernel`` could name on this host, from what the cache has. No network is used."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from harness.arch import ARCHITECTURES, Architecture
from harness.debian.known import Listed, listed
from harness.debian.version import version_key
from harness.host import pruning
from harness.host.cache import Cache
from harness.kernels import debian


@dataclass(frozen=True)
class Version:
    """A version that ``debian:VERSION`` names."""

    text: str
    #: whether the list has all packages that the kernel consists of
    whole: bool


@dataclass(frozen=True)
class Cached:
    """A kernel that needs neither a network nor a compiler."""

    #: a ``--kernel`` for it, or what it was built from
    name: str
    #: empty if it is not known
    arch: str
    size: int
    #: when it was last used, in seconds since the epoch
    used: float


def versions(lists: Iterable[Listed], wanted: Architecture) -> dict[str, list[Version]]:
    """Debian's versions for an architecture by suite, the oldest first."""
    found: dict[str, dict[str, bool]] = {}
    for each in lists:
        if each.arch == wanted.debian:
            for package in each.packages:
                if version := debian.upstream(package, wanted):
                    suite = found.setdefault(each.suite, {})
                    suite[version] = suite.get(version, False) or debian.is_whole(package, each.packages)
    return {
        suite: [Version(text, whole) for text, whole in sorted(every.items(), key=lambda item: version_key(item[0]))]
        for suite, every in found.items()
    }


def sources(lists: Iterable[Listed]) -> list[str]:
    """The source packages that can be built."""
    names = {package.name for each in lists for package in each.packages if package.name.startswith("linux-source-")}
    return sorted(names, key=version_key)


def names(cache: Cache) -> list[str]:
    """Debian's kernels and source packages, as ``--kernel`` takes them."""
    lists = listed(cache)
    arches = {arch.debian: arch for arch in ARCHITECTURES}
    packages = [(package, arches[each.arch]) for each in lists if each.arch in arches for package in each.packages]
    versions = {debian.upstream(*each) for each in packages} - {""}
    return ["debian:", *(f"debian:{each}" for each in sorted(versions, key=version_key)), *sources(lists)]


def cached(cache: Cache) -> Iterator[Cached]:
    """The kernels in a cache."""
    for kept in pruning.kept(cache):
        if kept.kind == "kernels":
            name, arch = _packaged(kept.name)
        elif kept.kind == "builds":
            name, arch = _built(cache.root / kept.kind / kept.name)
        else:
            continue
        yield Cached(name, arch, kept.size, kept.used)


def _packaged(key: str) -> tuple[str, str]:
    """What is in an entry, from the name that :mod:`harness.kernels.debian` gives it."""
    found = re.match(r"linux-image-\S+-([a-z0-9]+)_(\d+(?:\.\d+)*)\S*_[0-9a-f]{16}\Z", key)
    if not found:
        return "a .deb file", ""
    return f"debian:{found[2]}", next((str(each) for each in ARCHITECTURES if each.debian == found[1]), found[1])


def _built(entry: Path) -> tuple[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        told = json.loads((entry / "data/provenance.json").read_bytes())
        count = told["patches"]
        patched = f" with {count} patch{'es' if count > 1 else ''}" if count else ""
        arch = next((str(each) for each in ARCHITECTURES if f"-{each}=" in entry.name), "")
        return f"{told['source']}{patched}, {told['configuration']}", arch
    return "a kernel of an older version of the harness", ""
