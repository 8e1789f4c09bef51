# SPDX-License-Identifier: GPL-2.0
"""Opens a dump in whatever known format it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from harness.audit.kdump import KdumpImage
from harness.audit.memory import DumpError, ElfImage, Image


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image]:
    """Open a dump of any known format.

    :raises DumpError: if it cannot be read.
    """
    image = open_image(path)
    try:
        yield image
    finally:
        image.close()


def open_image(path: Path) -> Image:
    """Like :func:`opened`; to be closed.

    :raises DumpError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(8)
    except OSError as error:
        raise DumpError(f"{path} cannot be read: {error.strerror}") from error
    if magic[:4] == b"\x7fELF":
        return ElfImage(path)
    if magic in (b"KDUMP   ", b"makedump"):
        return KdumpImage(path)
    raise DumpError(f"{path} is no dump: neither ELF nor kdump's compressed format")
