# SPDX-License-Identifier: GPL-2.0
"""Reads Debian binary packages, as streams where that will do. Nothing of a package is executed."""

from __future__ import annotations

import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from harness.errors import SpecError
from harness.host.process import find_program


def control(deb: Path) -> dict[str, str]:
    """The control fields of a package, by name.

    :raises SpecError: if the file is not a Debian package.
    :raises HostError: if ``dpkg-deb`` is not installed.
    """
    command = [_dpkg_deb(), "--field", str(deb)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
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

    Names have no leading ``./``. A content must be read before the next member is asked for. Owners and modes are those
    in the archive and mean nothing on this host. A caller that writes files must check their names for ``..``.

    :raises SpecError: if the file is not a Debian package, or ends early.
    :raises HostError: if ``dpkg-deb`` is not installed.
    """
    command = [_dpkg_deb(), "--fsys-tarfile", str(deb)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe = cast(IO[bytes], process.stdout)
    try:
        with tarfile.open(fileobj=pipe, mode="r|") as archive:
            for member in archive:
                member.name = member.name.removeprefix("./")
                yield member, archive.extractfile(member) if member.isreg() else None
        while pipe.read(1 << 16):
            pass  # padding after the last member; without reading it, dpkg-deb would fail with a broken pipe
    except tarfile.TarError as error:
        process.kill()
        raise SpecError(f"{deb} is not a whole Debian package: {_reason(process.communicate()[1]) or error}") from error
    except GeneratorExit:
        process.kill()  # the caller needs no more members
        raise
    finally:
        _, stderr = process.communicate()
    if process.returncode:
        raise SpecError(f"{deb} is not a whole Debian package: {_reason(stderr)}")


def unpack(deb: Path, target: Path) -> None:
    """Write the files of a package into a directory. It is made if it does not exist.

    :raises SpecError: if the file is not a Debian package, or ends early.
    :raises HostError: if ``dpkg-deb`` is not installed.
    """
    command = [_dpkg_deb(), "--extract", str(deb), str(target)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        raise SpecError(f"{deb} is not a whole Debian package: {_reason(done.stderr)}")


def _dpkg_deb() -> str:
    return find_program("dpkg-deb", "dpkg")


def _reason(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[0].removeprefix("dpkg-deb: error: ") if lines else ""
