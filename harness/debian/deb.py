# SPDX-License-Identifier: GPL-2.0
"""Reads Debian binary packages as streams: no root, nothing executed, nothing laid out on disk."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from harness.errors import HostError, SpecError


def control(deb: Path) -> dict[str, str]:
    """The control fields of a package, by name.

    :raises SpecError: if the file is no Debian package.
    :raises HostError: if ``dpkg-deb`` is missing.
    """
    done = _run(["dpkg-deb", "--field", str(deb)])
    if done.returncode:
        raise SpecError(f"{deb} is not a Debian package: {_reason(done.stderr)}")
    fields: dict[str, str] = {}
    name = ""
    for line in done.stdout.decode(errors="replace").splitlines():
        if line[:1] in (" ", "\t"):
            fields[name] += "\n" + line
        elif ":" in line:
            name, value = line.split(":", 1)
            fields[name] = value.strip()
    return fields


def members(deb: Path) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
    """The files of a package in archive order, each with its content if it is a regular file.

    Names come without the leading ``./``. The content must be read before the next member is asked for. Owners and
    modes are the archive's and mean nothing on this host; names are to be distrusted by whoever writes them.

    :raises SpecError: if the file is no Debian package, or ends early.
    :raises HostError: if ``dpkg-deb`` is missing.
    """
    process = _popen(["dpkg-deb", "--fsys-tarfile", str(deb)])
    pipe = cast(IO[bytes], process.stdout)
    try:
        with tarfile.open(fileobj=pipe, mode="r|") as archive:
            for member in archive:
                member.name = member.name.removeprefix("./")
                yield member, archive.extractfile(member) if member.isreg() else None
        while pipe.read(1 << 16):
            pass  # the padding behind the last member: closing early would kill dpkg-deb with a broken pipe
    except tarfile.TarError as error:
        process.kill()
        raise SpecError(f"{deb} is not a whole Debian package: {_reason(process.communicate()[1]) or error}") from error
    except GeneratorExit:
        process.kill()  # the reader has what it wants
        raise
    finally:
        _, stderr = process.communicate()
    if process.returncode:
        raise SpecError(f"{deb} is not a whole Debian package: {_reason(stderr)}")


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError:
        raise HostError(_MISSING) from None


def _popen(command: Sequence[str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError:
        raise HostError(_MISSING) from None


_MISSING = "this host has no dpkg-deb, which reads Debian packages: install the package dpkg"


def _reason(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("dpkg-deb: error: ") if lines else ""
