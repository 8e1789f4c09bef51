# SPDX-License-Identifier: GPL-2.0
"""What ``--kernel`` can name, and how each kind of name becomes a kernel that QEMU boots.

::

    debian:                    the cloud kernel of Debian's stable release
    debian:6.12  debian:7.3.4  the newest packaged cloud kernel whose version begins so, by components
    debian:trixie-backports    the newest of one suite
    ~/linux                    a build tree, or the O= directory of one
    path/to/bzImage            an image: bzImage, Image, Image.gz, EFI zboot, vmlinux with PVH
    path/to/linux-image-….deb  a package; what it depends on must lie beside it
    ssh://root@board:22        a running machine, which is not booted by us

Some are built first, in the cache and never in the tree they come from::

    relocate-anon  unpatched   a variant that kernel_configs/variants.toml defines
    linux-source-7.3           the newest source package of a series
    git:~/linux@v7.3           a revision
    ~/linux                    a source tree with its uncommitted changes, with --build, or in one of the forms below
    …+fix.mbx  …+patches/      any of these with patches on top: an mbox, a patch, a directory of them; repeatable
    …:debug:dwarf:64k          … configured by presets, and on arm64 with a page size; the default is --preset

:func:`parse` looks at local files only, so that tests can be collected with it. :meth:`BootSpec.resolve` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from harness import arch
from harness.arch import Architecture
from harness.build import naming
from harness.build.naming import Building
from harness.errors import SpecError
from harness.kernels.built import BuildSpec
from harness.kernels.debian import parse_deb, parse_debian
from harness.kernels.kernel import FORMS, BootSpec, SshSpec, as_label
from harness.kernels.local import parse_image, parse_tree

_AS_IT_IS = Building()


def parse(text: str, wanted: Architecture | None = None, building: Building = _AS_IT_IS) -> BootSpec | SshSpec:
    """Understand one ``--kernel``; reads local files, never the network.

    :param wanted: from ``--arch``; None takes what the kernel is for, or else the host's architecture.
    :param building: about kernels that are built here.
    :raises SpecError: if it names nothing, or not a kernel, or one for another architecture.
    """
    text = text.strip()
    if text.startswith("debian:"):
        return parse_debian(text, wanted)
    if text.startswith("ssh://"):
        return _parse_ssh(text, wanted)
    chosen = wanted or arch.host()
    if found := naming.parse(text, chosen, building):
        return BuildSpec(found.text, as_label(f"{found.label}-{chosen}"), chosen, found)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return parse_tree(text, path, wanted)
    if path.is_file():
        return parse_deb(text, path, wanted) if path.suffix == ".deb" else parse_image(text, path, wanted)
    if not text or (":" in text and "/" not in text.partition(":")[0]):
        raise SpecError(f"unknown kernel {text!r}: {FORMS}")
    raise SpecError(f"there is no file or directory {path}: {FORMS}")


def parse_all(
    texts: Sequence[str], wanted: Architecture | None = None, building: Building = _AS_IT_IS
) -> list[BootSpec | SshSpec]:
    """Understand every ``--kernel`` of a run: repeated ones are taken once, and labels are made unique.

    :raises SpecError: see :func:`parse`; also if presets are asked for and nothing is built.
    """
    specs: list[BootSpec | SshSpec] = []
    for spec in dict.fromkeys(parse(text, wanted, building) for text in texts):
        taken = {each.label for each in specs}
        number = 2
        label = spec.label
        while label in taken:
            label = f"{spec.label}-{number}"
            number += 1
        specs.append(replace(spec, label=label))
    if building.words and not any(isinstance(each, BuildSpec) for each in specs):
        raise SpecError(f"--preset={':'.join(building.words)} has no effect: no kernel of this run is built here")
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
