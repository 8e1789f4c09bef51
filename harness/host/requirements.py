# SPDX-License-Identifier: GPL-2.0
"""What the project needs of the host, in one table: programs, headers and files, each with its Debian package.

``harness doctor`` reports it, kernel builds check it, and the Makefile installs from it. The Makefile does so before
there is a virtual environment, and runs this file as a script, with any Python 3 and the standard library alone::

    python3 -I harness/host/requirements.py --arch=arm64 guests build

prints the Debian packages that are missing. (``-I`` keeps Python from looking for its own modules in this directory.)
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PROGRAM, HEADER, FILE, MODULE = "program", "header", "file", "module"

#: making the virtual environment, running guests, compiling kernels, the harness's own tests, comparing with
#: virtme-ng, runs under load, and what is convenient to have
SETUP, GUESTS, BUILD, UNIT, BENCH, SOAK, EXTRAS = "setup", "guests", "build", "unit", "bench", "soak", "extras"

#: architectures under all names that users give them, as ``uname -m`` says them
MACHINES = {
    "x86_64": "x86_64",
    "x86-64": "x86_64",
    "amd64": "x86_64",
    "arm64": "aarch64",
    "aarch64": "aarch64",
    "riscv64": "riscv64",
}


@dataclass(frozen=True)
class Requirement:
    """One thing that only the system can provide."""

    name: str
    #: the Debian package that provides it
    package: str
    #: what it is for, as the end of "not installed: …"
    purpose: str
    #: one of SETUP, GUESTS, BUILD, UNIT, BENCH, SOAK and EXTRAS
    needed_for: str
    #: one of PROGRAM, HEADER (of C, for this host), FILE (a path) and MODULE (of this Python)
    kind: str = PROGRAM
    #: the machine it is needed for, as ``uname -m`` says it; empty for every one
    machine: str = ""
    #: only needed on hosts of another machine
    cross: bool = False
    #: what it is for works without it, but slower
    optional: bool = False

    def found(self) -> bool:
        """Whether this host has it."""
        if self.kind == PROGRAM:
            # Not every user has the administrator's programs on PATH.
            return shutil.which(self.name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is not None
        if self.kind == HEADER:
            return _compiles(self.name, shutil.which("gcc"))
        if self.kind == FILE:
            return Path(self.name).exists()
        return importlib.util.find_spec(self.name) is not None

    def applies(self, machine: str) -> bool:
        """Whether it is needed on this host, for a guest or kernel of ``machine`` (empty: of any)."""
        if self.cross:
            return self.machine == machine != platform.machine()
        return not self.machine or not machine or self.machine == machine


REQUIREMENTS = (
    Requirement("ensurepip", "python3-venv", "makes the virtual environment", SETUP, MODULE),
    Requirement("qemu-system-x86_64", "qemu-system-x86", "runs x86_64 guests", GUESTS, machine="x86_64"),
    Requirement("qemu-system-aarch64", "qemu-system-arm", "runs arm64 guests", GUESTS, machine="aarch64"),
    Requirement("setpriv", "util-linux", "ends QEMU when the harness ends", GUESTS),
    Requirement("apt-get", "apt", "fetches Debian's kernels, and the packages of the guest's userland", GUESTS),
    Requirement("dpkg-deb", "dpkg", "unpacks Debian packages", GUESTS),
    Requirement(
        "/usr/share/keyrings/debian-archive-keyring.gpg",
        "debian-archive-keyring",
        "checks the signatures of Debian's archive",
        GUESTS,
        FILE,
    ),
    Requirement("make", "make", "builds kernels", BUILD),
    Requirement("gcc", "gcc", "compiles kernels, and the programs that build them", BUILD),
    Requirement("ld", "binutils", "links kernels", BUILD),
    Requirement("bison", "bison", "generates parsers in kernel builds", BUILD),
    Requirement("flex", "flex", "generates scanners in kernel builds", BUILD),
    Requirement("bc", "bc", "computes constants in kernel builds", BUILD),
    Requirement("git", "git", "keeps kernel sources, and applies patches", BUILD),
    Requirement("stdio.h", "libc6-dev", "compiles the programs that build kernels", BUILD, HEADER),
    Requirement("gelf.h", "libelf-dev", "compiles objtool", BUILD, HEADER),
    Requirement("openssl/ssl.h", "libssl-dev", "compiles the programs that sign modules", BUILD, HEADER),
    Requirement(
        "x86_64-linux-gnu-gcc",
        "gcc-x86-64-linux-gnu",
        "compiles kernels for x86_64",
        BUILD,
        machine="x86_64",
        cross=True,
    ),
    Requirement(
        "x86_64-linux-gnu-ld",
        "binutils-x86-64-linux-gnu",
        "links kernels for x86_64",
        BUILD,
        machine="x86_64",
        cross=True,
    ),
    Requirement(
        "aarch64-linux-gnu-gcc",
        "gcc-aarch64-linux-gnu",
        "compiles kernels for arm64",
        BUILD,
        machine="aarch64",
        cross=True,
    ),
    Requirement(
        "aarch64-linux-gnu-ld",
        "binutils-aarch64-linux-gnu",
        "links kernels for arm64",
        BUILD,
        machine="aarch64",
        cross=True,
    ),
    Requirement(
        "riscv64-linux-gnu-gcc",
        "gcc-riscv64-linux-gnu",
        "compiles kernels for riscv64",
        BUILD,
        machine="riscv64",
        cross=True,
    ),
    Requirement(
        "riscv64-linux-gnu-ld",
        "binutils-riscv64-linux-gnu",
        "links kernels for riscv64",
        BUILD,
        machine="riscv64",
        cross=True,
    ),
    Requirement("ccache", "ccache", "makes later builds of similar kernels quick", BUILD, optional=True),
    Requirement("urcu.h", "liburcu-dev", "compiles the kernel's own tests of mm/vma.c", UNIT, HEADER),
    Requirement("depmod", "kmod", "lists kernel modules for virtme-ng", BENCH),
    Requirement("file", "file", "tells virtme-ng what kind of file a kernel is", BENCH),
    Requirement("stress-ng", "stress-ng", "makes the load of make soak", SOAK),
    Requirement("lz4", "lz4", "unpacks kernel images that are compressed with lz4", EXTRAS),
    Requirement("socat", "socat", "talks to a guest's monitor by hand", EXTRAS),
    Requirement("gdb", "gdb-multiarch", "debugs a guest that --keep has kept", EXTRAS),
)


@cache
def _compiles(header: str, gcc: str | None) -> bool:
    if gcc is None:
        return False
    command = [gcc, "-E", "-"]
    text = f"#include <{header}>\n"
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).returncode == 0


def needed(purposes: Iterable[str], machine: str = "") -> list[Requirement]:
    """The rows of the table that some purposes take on this host.

    :param machine: only for guests or kernels of this machine, as ``uname -m`` says it; empty for each that needs no
        cross compiler.
    """
    wanted = tuple(purposes)
    return [row for row in REQUIREMENTS if row.needed_for in wanted and row.applies(machine)]


def packages(rows: Iterable[Requirement]) -> list[str]:
    """The packages of some rows, each once."""
    return list(dict.fromkeys(row.package for row in rows))


def main() -> None:
    """Print the packages that are missing, on one line."""
    parser = argparse.ArgumentParser(description="Prints the Debian packages that are missing on this host.")
    parser.add_argument("--arch", default="", choices=("", *MACHINES), help="only what this architecture needs")
    parser.add_argument("purpose", nargs="+", choices=(SETUP, GUESTS, BUILD, UNIT, BENCH, SOAK, EXTRAS))
    options = parser.parse_args()
    rows = needed(options.purpose, MACHINES.get(options.arch, ""))
    print(*packages(row for row in rows if not row.found()))


if __name__ == "__main__":
    main()
