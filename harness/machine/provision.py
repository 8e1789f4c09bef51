# SPDX-License-Identifier: GPL-2.0
"""From a kernel to a machine that can boot it: fetch, assemble the initramfs, choose the accelerator."""

from __future__ import annotations

from harness.debian.apt import Archive
from harness.host.cache import Cache, Progress
from harness.kernels import image_format
from harness.kernels.kernel import BootSpec, Kernel
from harness.machine import accelerator, qemu
from harness.machine.initramfs import initramfs
from harness.options import MachineOptions


def provision(spec: BootSpec, options: MachineOptions, progress: Progress) -> tuple[Kernel, qemu.Machine]:
    """Fetch and assemble everything needed to boot ``spec``; quick when it is cached.

    :raises UsageError: if there is no such kernel, or the userland cannot be used.
    :raises FetchError: if something cannot be had.
    :raises HostError: if this host lacks a program, or space.
    :raises BuildError: if something has to be compiled for it, and cannot be.
    """
    if options.mutant:
        spec.check_mutant(options.mutant)
    cache = Cache(progress=progress)
    archive = Archive(cache, options.debian_mirror, progress)
    kernel = spec.resolve(cache, archive)
    upstream = None
    if options.kselftest:
        from harness.kselftest import contents  # takes the builder along

        upstream = contents.files(kernel, options.kselftest_tree, cache, archive)
    machine = qemu.Machine(
        arch=kernel.arch,
        accelerator=accelerator.choose(kernel.arch, icount=options.icount),
        kernel=kernel.boot_image,
        initrd=initramfs(kernel, cache, archive, options.userland, upstream),
        page_size=image_format.page_size(kernel.boot_image),
        append=options.append,
        memory=options.memory,
        cpus=options.cpus,
        icount=options.icount,
    )
    for path in (machine.kernel, machine.initrd, kernel.vmlinux):
        if path is not None:
            cache.hold(path)  # QEMU opens them for each guest, which may be hours later
    return kernel, machine
