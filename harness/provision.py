# SPDX-License-Identifier: GPL-2.0
"""From a kernel to a machine that can boot it: fetch, assemble the initramfs, choose the accelerator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness import accelerator, deb, image, kernelimage, modules, qemu
from harness.apt import Archive
from harness.cache import Cache, Progress
from harness.errors import HarnessError
from harness.kernels import BootSpec, Kernel

if TYPE_CHECKING:
    from harness.audit.live import Auditor


@dataclass(frozen=True)
class Options:
    """What the user may choose about machines."""

    #: added to the kernel's command line
    append: str = ""
    #: MiB of guest memory
    memory: int = 640
    #: virtual CPUs
    cpus: int = 1
    #: guests' clocks count instructions
    icount: bool = False
    #: base URI of a Debian mirror; empty takes the host's own
    debian_mirror: str = ""


def provision(spec: BootSpec, options: Options, progress: Progress) -> tuple[Kernel, qemu.Machine]:
    """Fetch and assemble everything needed to boot ``spec``; quick when it is cached.

    :raises SpecError: if there is no such kernel.
    :raises FetchError: if something cannot be had.
    :raises HostError: if this host lacks a program, or space.
    """
    cache = Cache(progress=progress)
    archive = Archive(cache, options.debian_mirror, progress)
    kernel = spec.resolve(cache, archive)
    machine = qemu.Machine(
        arch=kernel.arch,
        accelerator=accelerator.choose(kernel.arch, icount=options.icount),
        kernel=kernel.image,
        initrd=_initrd(kernel, cache, archive),
        page_size=kernelimage.page_size(kernel.image),
        append=options.append,
        memory=options.memory,
        cpus=options.cpus,
        icount=options.icount,
    )
    return kernel, machine


def auditor(kernel: Kernel, options: Options, progress: Progress) -> Auditor:
    """What audits guests of a kernel; fetches its debug information if need be."""
    from harness.audit import debuginfo
    from harness.audit.live import Auditor

    try:
        archive = Archive(Cache(progress=progress), options.debian_mirror, progress)
        return Auditor(debuginfo.layout_of(kernel, archive, fetch=True))
    except HarnessError as error:
        return Auditor(str(error))


def _initrd(kernel: Kernel, cache: Cache, archive: Archive) -> Path:
    layers = [
        image.agent_layer(),
        image.modules_layer(modules.select(kernel.modules, kernel.config)),
        image.config_layer(kernel.config),
    ]
    userland = _userland(kernel, cache, archive)
    parts = (cache.digest(userland), *(hashlib.sha256(layer).hexdigest() for layer in layers))
    key = hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]
    return cache.file("initrds", key, lambda path: _write(path, userland.read_bytes() + b"".join(layers)))


def _userland(kernel: Kernel, cache: Cache, archive: Archive) -> Path:
    recipe = image.Recipe.load()
    debs = archive.install_set(recipe.packages, kernel.arch, recipe.suite, recipe.without)
    digests = [cache.digest(path) for path in debs]
    own = [image.RECIPE.read_bytes(), image.INIT.read_bytes(), Path(image.__file__).read_bytes()]
    key = hashlib.sha256(b"\0".join([*own, " ".join(digests).encode()])).hexdigest()[:32]

    def make(path: Path) -> None:
        archive.progress(f"assembling the guest's userland for {kernel.arch}")
        _write(path, image.userland(recipe, map(deb.members, debs)))

    return cache.file("userlands", f"{kernel.arch}-{key}", make)


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
