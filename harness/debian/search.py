# SPDX-License-Identifier: GPL-2.0
"""Searches Debian's suites for kernel packages."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from harness.arch import Architecture
from harness.debian.apt import Archive
from harness.debian.apt_root import REFRESH_AFTER, RETRY_AFTER, Package
from harness.debian.suites import RELEASED, UNRELEASED
from harness.debian.version import version_key
from harness.errors import HarnessError


@dataclass(frozen=True)
class Found:
    """The result of a search."""

    #: the packages that fit, the newest first; empty if none fits
    fitting: tuple[Package, ...]
    #: all packages in the suites that ``fitting`` comes from; in all suites that were read if none fits
    listed: tuple[Package, ...]


def search(
    archive: Archive, arch: Architecture, fits: Callable[[Package], bool], suites: tuple[str, ...] = ()
) -> Found:
    """Look for a kernel package: in the released suites, and only if none fits there in the unreleased ones.

    Indexes up to a day old are read first. If no package in them fits, those older than an hour are fetched again.

    :param fits: whether a package is wanted.
    :param suites: search these instead, by their code names.
    :raises FetchError: if no index can be fetched; with ``suites``, if the index of the first cannot be fetched.
    """
    seen: dict[Package, None] = {}
    groups = [suites] if suites else [RELEASED, UNRELEASED]
    for group, max_age in itertools.product(groups, (REFRESH_AFTER, RETRY_AFTER)):
        try:
            listed = archive.packages(arch, group, strict=bool(suites), max_age=max_age)
        except HarnessError:
            if not seen:
                raise
            continue  # the unreleased suites cannot be read: the caller reports what the released ones have
        fitting = sorted(filter(fits, listed), key=lambda each: version_key(each.version), reverse=True)
        if fitting:
            return Found(tuple(fitting), tuple(listed))
        seen |= dict.fromkeys(listed)
    return Found((), tuple(seen))
