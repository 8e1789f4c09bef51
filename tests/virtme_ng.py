# SPDX-License-Identifier: GPL-2.0
"""virtme-ng, the peer in the benchmark: what it needs to boot one of our kernels, and its command line.

virtme-ng boots a kernel on the host's own file system, which it exports by virtiofs or 9p. On Debian's kernels that
takes these things, all of which are made below the project's cache:

- The modules that it puts into its initramfs, uncompressed: the ``insmod`` there cannot read ``.ko.xz``. It looks for
  ``lib/modules/RELEASE`` in the parent directories of the kernel image, and for ``modules.dep`` there.
- A static busybox, for the same initramfs.
- The virtiofsd that is written in Rust. Debian's cloud kernels have no 9p. Debian 12 has no such package, only the
  daemon of QEMU 7.2, whose options differ; virtme-ng waits 3 s for that one and then falls back to 9p.

busybox and virtiofsd come from Debian's stable release. virtiofsd runs with the C library of that release, so it does
not matter which release the host has.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from harness import arch
from harness.debian import deb
from harness.debian.apt import Archive
from harness.errors import HostError
from harness.host.cache import Cache
from harness.kernels.kernel import Kernel
from harness.kernels.modules import Wanted, select
from harness.machine.accelerator import Accelerator

#: The check that virtme-ng runs: does mremap() move a page? The status of Python is that of the command.
CHECK = (
    "import ctypes,mmap;libc=ctypes.CDLL(None);m=mmap.mmap(-1,8192);"
    "a=ctypes.addressof(ctypes.c_char.from_buffer(m));libc.mremap.restype=ctypes.c_void_p;"
    "assert libc.mremap(ctypes.c_void_p(a),4096,8192,1);print('moved')"
)

#: What CHECK prints if it passes.
PASSED = "moved"

#: Modules that virtme-ng loads from its initramfs where they are not built in.
_MODULES = (
    Wanted("virtio_pci", "VIRTIO_PCI"),
    Wanted("virtio_mmio", "VIRTIO_MMIO"),
    Wanted("virtio_console", "VIRTIO_CONSOLE"),
    Wanted("overlay", "OVERLAY_FS"),
    Wanted("virtiofs", "VIRTIO_FS"),
    Wanted("9p", "9P_FS"),
    Wanted("9pnet_virtio", "NET_9P_VIRTIO"),
)

_MODULE_LISTS = ("modules.order", "modules.builtin", "modules.builtin.modinfo")

#: Starts virtiofsd with the C library beside it, wherever the directory lies.
_START = """#!/bin/sh
lib=${0%/*}/lib
exec "$lib"/ld-linux-*.so.* --library-path "$lib" "$lib/virtiofsd" "$@"
"""


@dataclass(frozen=True)
class Peer:
    """virtme-ng, ready to run CHECK on one kernel."""

    #: program and version
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]


def prepare(kernel: Kernel, accelerator: Accelerator, cache: Cache, archive: Archive) -> Peer:
    """Make everything virtme-ng needs to run CHECK on ``kernel``.

    :raises HostError: if virtme-ng cannot run here or on this kernel; says what to install.
    :raises FetchError: if a package cannot be had.
    """
    if kernel.arch is not arch.host():
        raise HostError(f"virtme-ng boots kernels on this host's own userland, which is not for {kernel.arch}")
    venv = Path(sys.executable).parent
    path = f"{venv}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    vng = _program("vng", "make bench, or: pip install --editable '.[bench]'", path)
    _program("virtme-run", "make bench, or: pip install --editable '.[bench]'", path)
    _program("modprobe", "apt-get install kmod", path)
    _program("file", "apt-get install file", path)
    shared = shared_by(kernel)
    tools = _tools(cache, archive)
    image = _kernel_tree(kernel, _program("depmod", "apt-get install kmod", path), cache) / "vmlinuz"
    options = ["--disable-kvm"] if accelerator.name == "tcg" else []
    options += ["--force-9p"] if shared == "9p" else []
    # virtme-ng joins the arguments behind "--" to a line for the guest's shell.
    check = shlex.join(["python3", "-c", CHECK])
    argv = (vng, *options, "--busybox", str(tools / "busybox"), "-r", str(image), "--", check)
    # A home of its own keeps the user's configuration of virtme-ng out, and its cache inside ours.
    home = cache.root / "peer-home"
    home.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ) | {"PATH": f"{tools}:{path}", "HOME": str(home)}
    return Peer(f"virtme-ng {metadata.version('virtme-ng')} ({shared})", argv, env)


def _program(name: str, how: str, path: str) -> str:
    found = shutil.which(name, path=path)
    if found is None:
        raise HostError(f"{name} is not installed: get it with: {how}")
    return found


def shared_by(kernel: Kernel) -> str:
    """How the guest reaches the host's file system, "virtiofs" or "9p". virtiofs is taken if the config is unknown."""
    if kernel.has("VIRTIO_FS") or not kernel.config:
        return "virtiofs"
    if kernel.has("9P_FS") and kernel.has("NET_9P_VIRTIO"):
        return "9p"
    raise HostError(
        "virtme-ng cannot boot this kernel: it has neither virtiofs nor 9p; set CONFIG_VIRTIO_FS=y and build it again"
    )


def _tools(cache: Cache, archive: Archive) -> Path:
    """A directory with the programs ``virtiofsd`` and ``busybox``."""
    # uidmap is for running virtiofsd in a user namespace, which virtme-ng does not do.
    debs = archive.install_set(("virtiofsd", "busybox-static"), arch.host(), without=("uidmap",))
    key = _digest(*(cache.digest(path).encode() for path in debs))

    def make(directory: Path) -> None:
        lib = directory / "lib"
        lib.mkdir()
        for package in debs:
            for info, content in deb.members(package):
                name = Path(info.name).name
                if info.name == "usr/bin/busybox":
                    target = directory / name
                elif info.name == "usr/libexec/virtiofsd" or (".so" in name and "/gconv/" not in info.name):
                    target = lib / name
                else:
                    continue
                if content is not None:
                    target.write_bytes(content.read())
                    target.chmod(0o755)
                elif info.issym() and "/" not in info.linkname:
                    target.symlink_to(info.linkname)
        if missing := [path.name for path in (directory / "busybox", lib / "virtiofsd") if not path.exists()]:
            raise HostError(f"Debian's packages have no {' and no '.join(missing)} where they used to have it")
        (directory / "virtiofsd").write_text(_START)
        (directory / "virtiofsd").chmod(0o755)

    return cache.tree("peer", f"tools-{key}", make)


def _kernel_tree(kernel: Kernel, depmod: str, cache: Cache) -> Path:
    """A directory with a kernel as ``vmlinuz``, and its modules where virtme-ng and kmod look for them."""
    modules = select(kernel.modules, kernel.config, _MODULES)
    lists = [kernel.modules.directory / name for name in _MODULE_LISTS] if kernel.modules else []
    lists = [path for path in lists if path.exists()]
    parts = [
        kernel.boot_image.read_bytes(),
        *(path.read_bytes() for path in lists),
        *(module.data for module in modules),
    ]

    def make(directory: Path) -> None:
        shutil.copy(kernel.boot_image, directory / "vmlinuz")
        installed = directory / "lib/modules" / kernel.release
        installed.mkdir(parents=True)
        # Some builds of kmod look below /lib, others below /usr/lib.
        (directory / "usr").symlink_to(".")
        for path in lists:
            shutil.copy(path, installed)
        for module in modules:
            (installed / f"{module.name}.ko").write_bytes(module.data)
        done = subprocess.run(
            [depmod, "-b", str(directory), kernel.release], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HostError(f"depmod cannot index the modules of {kernel.release}: {done.stderr.strip()}")

    return cache.tree("peer", f"{kernel.release}-{_digest(*parts)}", make)


def _digest(*parts: bytes) -> str:
    """A key for what this module makes of ``parts``; another version of the module makes it again."""
    parts = (Path(__file__).read_bytes(), *parts)
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
