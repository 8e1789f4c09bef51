# SPDX-License-Identifier: GPL-2.0
"""Where the sources of upstream's tests come from, for one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from harness import arch
from harness.build import series
from harness.build.series import Patch
from harness.build.source import PackageSource, Source, TreeSource
from harness.debian.apt import Archive
from harness.debian.search import search
from harness.debian.version import version_key
from harness.errors import UsageError
from harness.kernels.built import BuildSpec
from harness.kernels.kernel import Kernel
from harness.kernels.local import TreeSpec

#: the directory of the tests in a kernel source tree
DIRECTORY = "tools/testing/selftests/mm"

_PACKAGE = "linux-source-"


@dataclass(frozen=True)
class Origin:
    """A kernel source with patches."""

    source: Source
    patches: tuple[Patch, ...] = ()


def find(kernel: Kernel, tree: Path | None, archive: Archive) -> Origin:
    """The source of the tests for a kernel.

    That is the tree of ``--kselftest-tree``; else the source that the kernel is built from; else the package
    linux-source of its series, or of the next series that Debian has.

    :param tree: from the command line.
    :raises UsageError: if the tree has no tests, or Debian has no source.
    :raises FetchError: if no index of the archive can be read.
    """
    if tree is not None:
        if not (tree / DIRECTORY / "Makefile").is_file():
            raise UsageError(f"{tree} has no {DIRECTORY}/Makefile: give --kselftest-tree a kernel source tree")
        return Origin(TreeSource(tree.absolute()))
    spec = kernel.spec
    if isinstance(spec, BuildSpec):
        return Origin(spec.name.source, tuple(patch for path in spec.name.series for patch in series.load(path)))
    if isinstance(spec, TreeSpec):
        # An O= directory has a link to its source.
        for path in (spec.path, spec.path / "source"):
            if (path / DIRECTORY / "Makefile").is_file():
                return Origin(TreeSource(path.resolve()))
    return Origin(PackageSource(_package(kernel, archive)))


def _package(kernel: Kernel, archive: Archive) -> str:
    own = _PACKAGE + ".".join(kernel.version.split(".")[:2])
    have = {each.name for each in search(archive, arch.host(), lambda each: each.name == own).fitting}
    if own in have:
        return own
    listed = search(archive, arch.host(), lambda each: each.name.startswith(_PACKAGE)).fitting
    names = sorted({each.name for each in listed}, key=version_key)
    if not names:
        raise UsageError("Debian has no kernel source for upstream's tests: give --kselftest-tree=DIR")
    # A newer test skips what an older kernel lacks, as a rule; an older test may fail on what became different.
    chosen = next((name for name in names if version_key(name) > version_key(own)), names[-1])
    archive.progress(f"Debian has no {own}: taking upstream's tests from {chosen}")
    return chosen
