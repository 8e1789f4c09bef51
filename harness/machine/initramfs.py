# SPDX-License-Identifier: GPL-2.0
"""Puts a guest's initramfs together: userland, agent, kernel modules, configuration.

Each part is a cpio archive. The kernel accepts several archives one after the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels import modules
from harness.kernels.kernel import Kernel
from harness.kernels.modules import Module
from harness.machine import cpio, payload, userland

#: Where the guest has upstream's tests.
UPSTREAM = "harness/kselftest"


def initramfs(
    kernel: Kernel,
    cache: Cache,
    archive: Archive,
    given: Path | None = None,
    upstream: Mapping[str, bytes] | None = None,
) -> Path:
    """The initramfs for a kernel, from the cache if it is there.

    :param given: a file with the userland, see :func:`harness.machine.userland.provided`.
    :param upstream: the files of upstream's tests, see :mod:`harness.kselftest.contents`.
    :raises UsageError: if that file cannot be used.
    :raises FetchError: if the userland cannot be had.
    :raises HostError: if this host cannot make the userland.
    """
    layers = [
        payload.agent_layer(),
        modules_layer(modules.select(kernel.modules, kernel.config)),
        config_layer(kernel.config),
        *([upstream_layer(upstream)] if upstream else []),
    ]
    base = userland.provided(kernel.arch, given, cache, archive)
    parts = (cache.digest(base), *(hashlib.sha256(layer).hexdigest() for layer in layers))
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return cache.file("initrds", key, lambda path: _write(path, base.read_bytes() + b"".join(layers)))


def modules_layer(modules: Iterable[Module]) -> bytes:
    """Pack kernel modules. ``images/init`` loads them in the order of their names, so the names are numbered."""
    return cpio.archive(
        cpio.file(f"modules/{number:02}-{module.name}.ko", module.data) for number, module in enumerate(modules)
    )


def config_layer(config: Mapping[str, str]) -> bytes:
    """Pack the kernel's configuration as a .config file. Tests that need an option read it.

    If the configuration is unknown there is no file, so that tests do not take an unknown option for one that is off.
    """
    text = "".join(f"CONFIG_{name}={value}\n" for name, value in sorted(config.items()))
    entries = [cpio.file("etc/harness/config", text.encode())] if config else []
    return cpio.archive([cpio.directory("etc/harness"), *entries])


def upstream_layer(files: Mapping[str, bytes]) -> bytes:
    """Pack upstream's tests."""
    return cpio.archive(cpio.file(f"{UPSTREAM}/{name}", data, executable=True) for name, data in files.items())


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
