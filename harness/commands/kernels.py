# SPDX-License-Identifier: GPL-2.0
"""``harness kernels``: lists what ``--kernel`` could name on this host."""

from __future__ import annotations

import argparse
import contextlib
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from harness import options
from harness.commands.numbers import ago, size
from harness.host.terminal import ProgressLine

if TYPE_CHECKING:  # the other commands of harness need none of it
    from harness.arch import Architecture
    from harness.debian.known import Listed
    from harness.host.cache import Cache
    from harness.kernels.known import Version

#: Columns of the lists of versions.
_WIDTH = 100


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "kernels",
        help="list what --kernel could name here",
        description="Lists Debian's kernels in the package lists of the cache, what can be built, and the kernels that "
        "are cached. Uses no network, unless --update is given.",
        epilog="Exit status: 0, or 1 if a package list that --update asks for cannot be fetched.",
    )
    options.ARCH.declare(parser.add_argument, action="store", default=None, help="only kernels of this architecture")
    parser.add_argument("--update", action="store_true", help="fetch the package lists of the mirror first")


def run(chosen: argparse.Namespace, progress: ProgressLine) -> int:
    """Run the command; returns its exit status.

    :raises FetchError: if package lists cannot be fetched.
    """
    from harness import arch
    from harness.arch import ARCHITECTURES
    from harness.host.cache import Cache

    cache = Cache(progress=progress)
    wanted = [arch.find(chosen.arch)] if chosen.arch else list(ARCHITECTURES)
    if chosen.update:
        from harness.debian.apt import Archive
        from harness.debian.suites import RELEASED, UNRELEASED
        from harness.errors import HarnessError

        archive = Archive(cache, progress=progress)
        for each in [arch.find(chosen.arch) if chosen.arch else arch.host()]:
            archive.packages(each, RELEASED, max_age=0)
            with contextlib.suppress(HarnessError):  # its index expires on a mirror that stands still
                archive.packages(each, UNRELEASED, max_age=0)
        progress.clear()
    for line in lines(cache, wanted, time.time()):
        print(line)
    return 0


#: how many characters the column of names has
_NAMES: Final = 20


def lines(cache: Cache, wanted: Sequence[Architecture], now: float) -> Iterator[str]:
    """The whole list.

    :param wanted: the architectures whose kernels are listed.
    :param now: in seconds since the epoch.
    """
    from harness.build.variants import KernelConfigs
    from harness.debian.known import listed
    from harness.kernels import known

    lists = listed(cache)
    for arch in wanted:
        yield from _debian(known.versions(lists, arch), arch, [each for each in lists if each.arch == arch.debian], now)
    if not lists:
        yield "No package list is in the cache: harness kernels --update fetches those of the mirror"
        yield ""
    definitions = KernelConfigs.load()
    yield "To build: --kernel=NAME, NAME+PATCHES, NAME:PRESET"
    for variant in definitions.variants.values():
        yield f"  {variant.name:{_NAMES}}{variant.description}"
    for source in known.sources(lists):
        yield f"  {source:{_NAMES}}the source package of Debian"
    yield ""
    yield "Presets:"
    for preset in definitions.presets.values():
        default = " (default)" if preset.name == definitions.default_preset else ""
        yield f"  {preset.name:{_NAMES}}{preset.description}{default}"
    for arch in wanted:
        sizes = definitions.arches[arch.name].page_sizes
        if len(sizes) > 1:
            yield f"  {', '.join(sizes):{_NAMES}}the page size, on {arch}"
    found = [each for each in known.cached(cache) if not each.arch or each.arch in map(str, wanted)]
    yield ""
    yield "In the cache:" if found else "No kernel is in the cache."
    for kernel in sorted(found, key=lambda each: -each.used):
        yield f"  {size(kernel.size):>7}  {ago(now - kernel.used):15}{kernel.arch:8}{kernel.name}"


def _debian(
    suites: Mapping[str, Sequence[Version]], arch: Architecture, lists: Sequence[Listed], now: float
) -> Iterator[str]:
    if not suites:
        return
    fetched = ago(now - min(each.fetched for each in lists))
    yield f"Debian's kernels for {arch}: --kernel=debian:VERSION or debian:SUITE (lists fetched {fetched})"
    for suite, every in suites.items():
        text = " ".join(each.text if each.whole else f"{each.text}*" for each in every)
        yield from textwrap.wrap(text, _WIDTH, initial_indent=f"  {suite:19}", subsequent_indent=" " * 21)
    if not all(each.whole for every in suites.values() for each in every):
        yield "  * the list no longer has all packages of this kernel: it runs without its modules"
    yield ""
