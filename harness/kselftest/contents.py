# SPDX-License-Identifier: GPL-2.0
"""What of upstream's tests travels into a guest: the programs, and a table that describes the tests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels.kernel import Kernel
from harness.kselftest import catalog, programs, sources
from harness.kselftest.programs import Programs

#: The table, beside the programs.
TABLE = "tests.json"


def files(kernel: Kernel, tree: Path | None, cache: Cache, archive: Archive) -> dict[str, bytes]:
    """The files by name: all programs for a kernel, and :data:`TABLE`.

    :param tree: the source that the user chose; None for the kernel's own.
    :raises UsageError: if there is no source.
    :raises FetchError: if something cannot be fetched.
    :raises HostError: if this host lacks a program, or space.
    :raises BuildError: if the source cannot be used.
    """
    origin = sources.find(kernel, tree, archive)
    return packed(programs.compiled(origin, kernel.arch, catalog.programs(), cache, archive))


def packed(made: Programs) -> dict[str, bytes]:
    """The files by name, of programs that are compiled."""
    table = {
        "source": made.source,
        "missing": made.missing,
        "broken": made.broken,
        "tests": {name: asdict(test) for name, test in catalog.load().items()},
    }
    names = (name for name in catalog.programs() if (made.directory / name).exists())
    return {
        **{name: (made.directory / name).read_bytes() for name in names},
        TABLE: json.dumps(table, indent=1).encode(),
    }
