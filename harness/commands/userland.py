# SPDX-License-Identifier: GPL-2.0
"""``harness userland``: the guest's userland as a file, for hosts that have no apt to make it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from pathlib import Path

from harness import arch, options
from harness.debian.apt import Archive
from harness.errors import UsageError
from harness.host.cache import Cache, Progress
from harness.machine import userland


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "userland",
        help="make the guest's userland on a Debian machine, for hosts without apt",
        description="Writes the guest's userland to a file, and prints its digest and the packages in it. A host "
        "without apt takes the file with --userland=FILE. The list of packages also stands in the userland, in "
        f"/{userland.MANIFEST}.",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="where to write it")
    options.ARCH.declare(parser.add_argument, action="store", default=None)
    options.DEBIAN_MIRROR.declare(parser.add_argument)


def run(chosen: argparse.Namespace, progress: Progress) -> int:
    """Run the command.

    :raises UsageError: if the file cannot be written.
    :raises HarnessError: if the userland cannot be made.
    """
    wanted = arch.find(chosen.arch) if chosen.arch else arch.host()
    cache = Cache(progress=progress)
    made = userland.made(wanted, cache, Archive(cache, chosen.debian_mirror, progress))
    pending = chosen.output.with_name(f".{chosen.output.name}.new")
    try:
        shutil.copyfile(made, pending)
        os.replace(pending, chosen.output)
    except OSError as error:
        with contextlib.suppress(OSError):
            pending.unlink()
        raise UsageError(f"{chosen.output} cannot be written: {error.strerror}") from error
    manifest = userland.manifest_of(made)
    print(f"{chosen.output}: the userland of {wanted} guests, from Debian {manifest.suite}")
    print(f"sha256 {cache.digest(made)}")
    print(f"{len(manifest.packages)} packages:")
    for package in sorted(manifest.packages):
        print(f"  {package}")
    return 0
