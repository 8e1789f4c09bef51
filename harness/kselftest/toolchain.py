# SPDX-License-Identifier: GPL-2.0
"""The C library that upstream's tests are linked with: Debian's, for the guest's architecture.

The packages are unpacked into a directory in the cache, so that a host needs no package of the other architecture, and
the same programs come out on every host.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from harness.arch import Architecture
from harness.debian import deb
from harness.debian.apt import Archive
from harness.host.cache import Cache

#: static libraries and headers: of C, and what programs of selftests/mm are linked with
_PACKAGES = ("libc6-dev", "linux-libc-dev", "libcap-dev", "libnuma-dev", "liburing-dev")

#: what they depend on and static programs do not need
_WITHOUT = (
    "gcc-14-base",
    "libc-dev-bin",
    "libc6",
    "libcap2",
    "libcrypt-dev",
    "libcrypt1",
    "libgcc-s1",
    "libnuma1",
    "liburing2",
    "rpcsvc-proto",
)

#: Where programs are linked to. Upstream's own build makes position independent programs, whose heap is far from low
#: addresses. The heap of others is at a random place within 1 GiB after the program (arch_randomize_brk() of x86 and
#: arm64, Linux 7.3). If that begins at 4 MiB, mremap_test finds it where it maps with MAP_FIXED_NOREPLACE. On x86-64
#: the address has to be below 2 GiB.
_ADDRESS = 1 << 30


def sysroot(arch: Architecture, cache: Cache, archive: Archive) -> Path:
    """The directory with headers and libraries for an architecture; its name changes with its contents.

    :raises FetchError: if the packages cannot be had.
    :raises SpecError: if one of them is damaged.
    :raises HostError: if this host has no apt or dpkg, or no Debian mirror.
    """
    debs = archive.install_set(_PACKAGES, arch, without=_WITHOUT)
    key = hashlib.sha256(" ".join(cache.digest(path) for path in debs).encode()).hexdigest()[:24]

    def unpack(target: Path) -> None:
        for path in debs:
            deb.unpack(path, target)

    return cache.tree("sysroots", f"{arch}={key}", unpack)


def flags(arch: Architecture, root: Path) -> list[str]:
    """Variables for the Makefiles of selftests, so that they link with these libraries alone."""
    # -B comes before the compiler's own directories, where a native compiler finds the host's libraries.
    return [
        f"USERCFLAGS=--sysroot={root} -B{root}/usr/lib/{arch.triple}/",
        # Nothing of the guest is needed at run time, and symbols would take memory there.
        f"USERLDFLAGS=-static -Wl,-Ttext-segment={_ADDRESS:#x} -s",
    ]
