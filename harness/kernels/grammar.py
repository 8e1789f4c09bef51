# SPDX-License-Identifier: GPL-2.0
"""Parses ``--kernel``.

::

    debian:                    the cloud kernel of Debian's stable release
    debian:6.12  debian:7.3.4  the newest packaged cloud kernel whose version begins with these components
    debian:trixie-backports    the newest cloud kernel of one suite
    ~/linux                    a build tree, or the O= directory of one
    path/to/bzImage            a boot image: bzImage, Image, Image.gz, EFI zboot, vmlinux with PVH
    path/to/linux-image-….deb  a package; the packages it depends on must be in the same directory
    ssh://root@board:22        a running machine; nothing is booted

The harness builds these in the cache; the tree or repository is not changed::

    relocate-anon  unpatched   a variant that kernel_configs/variants.toml defines
    linux-source-7.3           the newest source package of a series
    git:~/linux@v7.3           a revision
    ~/linux                    a source tree with its uncommitted changes, with --build, or with patches or presets
    …+fix.mbx  …+patches/      any of these with patches: an mbox, a patch, or a directory of patches; repeatable
    …+-                        with the series on standard input: see harness/build/posted.py
    …:debug:dwarf:64k          any of these with presets, and on arm64 with a page size; the default is --preset

:func:`parse` reads local files only, because tests are collected with it. :meth:`BootSpec.resolve` fetches and builds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from harness import arch
from harness.arch import Architecture
from harness.errors import SpecError
from harness.kernels.debian import parse_deb, parse_debian
from harness.kernels.kernel import FORMS, BootSpec, SshSpec, as_label
from harness.kernels.local import parse_image, parse_tree
from harness.options import BuildOptions

_DEFAULT_BUILD = BuildOptions()


def parse(text: str, wanted: Architecture | None = None, build: BuildOptions = _DEFAULT_BUILD) -> BootSpec | SshSpec:
    """Parse one ``--kernel``. Reads local files, and does not use the network.

    :param wanted: from ``--arch``; None for the architecture of the kernel, or that of the host if it has several.
    :param build: from ``--build`` and ``--preset``.
    :raises SpecError: if it does not name a kernel, or names one for another architecture.
    """
    text = text.strip()
    if text.startswith("debian:"):
        return parse_debian(text, wanted)
    if text.startswith("ssh://"):
        return _parse_ssh(text, wanted)
    # Not needed for the kernels above. It takes a twentieth of the time that one test takes in all.
    from harness.kernels import built

    if spec := built.parse_built(text, wanted or arch.host(), build):
        return spec
    path = Path(text).expanduser()
    if text and path.is_dir():
        return parse_tree(text, path, wanted)
    if path.is_file():
        return parse_deb(text, path, wanted) if path.suffix == ".deb" else parse_image(text, path, wanted)
    if not text or (":" in text and "/" not in text.partition(":")[0]):
        raise SpecError(f"unknown kernel {text!r}: {FORMS}")
    raise SpecError(f"there is no file or directory {path}: {FORMS}")


def parse_all(
    texts: Sequence[str], wanted: Architecture | None = None, build: BuildOptions = _DEFAULT_BUILD
) -> list[BootSpec | SshSpec]:
    """Parse every ``--kernel`` of a run. Repeated ones are dropped, and labels are made unique.

    :raises SpecError: see :func:`parse`; also if there are presets in ``build`` but no kernel is built.
    """
    specs: list[BootSpec | SshSpec] = []
    for spec in dict.fromkeys(parse(text, wanted, build) for text in texts):
        taken = {each.label for each in specs}
        number = 2
        label = spec.label
        while label in taken:
            label = f"{spec.label}-{number}"
            number += 1
        specs.append(replace(spec, label=label))
    if build.words and not any(each.is_built for each in specs):
        raise SpecError(f"--preset={':'.join(build.words)} has no effect: no kernel of this run is built here")
    return specs


def _parse_ssh(text: str, wanted: Architecture | None) -> SshSpec:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 22
    except ValueError as error:
        raise SpecError(f"{text!r} is no SSH address: {error}") from None
    if not host or parts.path.strip("/") or parts.query or parts.password:
        raise SpecError(f"{text!r} is no SSH address: give ssh://USER@HOST or ssh://USER@HOST:PORT (keys, no password)")
    label = f"ssh-{host}" if port == 22 else f"ssh-{host}-{port}"
    return SshSpec(text, as_label(label), parts.username or "root", host, port, wanted)
