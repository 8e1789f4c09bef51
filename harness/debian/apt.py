# SPDX-License-Identifier: GPL-2.0
"""The packages of a Debian mirror: which there are, and their files.

Each suite and architecture has a private apt root, see :mod:`harness.debian.apt_root`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from harness.arch import Architecture, host
from harness.debian.apt_root import REFRESH_AFTER, AptRoot, Package, cached_package
from harness.debian.mirror import Mirror, host_mirror
from harness.debian.suites import STABLE
from harness.errors import FetchError
from harness.host.cache import Cache, Progress, silent


@dataclass(frozen=True)
class Archive:
    """The packages of one Debian mirror.

    :param cache: holds indexes and packages.
    :param mirror_uri: see :func:`harness.debian.mirror.host_mirror`, which is called when the first index is needed.
    :param progress: told what is fetched, and which suite is left out.
    """

    cache: Cache
    mirror_uri: str = ""
    progress: Progress = silent

    @cached_property
    def mirror(self) -> Mirror:
        """The mirror and its keys.

        :raises HostError: if no mirror is configured, or its keys are not installed.
        """
        return host_mirror(self.mirror_uri)

    def packages(
        self, arch: Architecture, names: Iterable[str], *, strict: bool = False, max_age: float = REFRESH_AFTER
    ) -> list[Package]:
        """Every version of every kernel package in some suites.

        :param names: full code names of the suites. A suite whose index cannot be fetched is left out, and progress is
            told about it.
        :param strict: make it an error if the index of the first suite cannot be fetched.
        :param max_age: fetch an index again that is older than this many seconds.
        :raises FetchError: if no index can be fetched.
        """
        wanted = tuple(names)
        roots = [self._root(name, arch.debian) for name in wanted if self.mirror.base(name)]
        with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
            troubles = list(pool.map(lambda root: root.refresh(max_age, again=strict), roots))
        reasons = "; ".join(filter(None, troubles))
        if reasons and (all(troubles) or (strict and troubles[0])):
            raise FetchError(reasons)
        if reasons:
            self.progress(f"{reasons}; continuing without it")
        return [
            package for root, trouble in zip(roots, troubles, strict=True) if not trouble for package in root.kernels()
        ]

    def download(self, packages: Sequence[Package]) -> list[Path]:
        """The package files, in order, from the cache or the mirror.

        :raises FetchError: if one cannot be fetched, or differs from the digest in its index.
        :raises HostError: if the disk is full.
        """
        by_root: dict[tuple[str, str], list[Package]] = {}
        for package in packages:
            arch = host().debian if package.arch == "all" else package.arch
            by_root.setdefault((package.suite, arch), []).append(package)
        for (suite, arch), group in by_root.items():
            self._root(suite, arch).download([(each.name, each.version, each.arch) for each in group])
        found = [cached_package(self.cache, (each.name, each.version, each.arch)) for each in packages]
        for package, path in zip(packages, found, strict=True):
            if path is None or self.cache.digest(path) != package.sha256:
                raise FetchError(
                    f"{package.name} {package.version} does not match the digest in the index of {package.suite}: "
                    "try again later, or with another mirror"
                )
        return [path for path in found if path is not None]

    def install_set(
        self, names: Sequence[str], arch: Architecture, suite: str = STABLE, without: Iterable[str] = ()
    ) -> list[Path]:
        """The package files that installing ``names`` into an empty system takes, dependencies first.

        :param without: packages to leave out; nothing replaces them.
        :raises FetchError: if a package does not exist or cannot be fetched.
        """
        root = self._root(suite, arch.debian)
        if trouble := root.refresh(REFRESH_AFTER):
            raise FetchError(trouble)
        packages = root.closure(names, frozenset(without))
        root.download(packages)
        found = [cached_package(self.cache, package) for package in packages]
        return [path for path in found if path is not None]

    def _root(self, suite: str, arch: str) -> AptRoot:
        return AptRoot(self.cache, self.progress, self.mirror, suite, arch)
