# SPDX-License-Identifier: GPL-2.0
"""Kernels before they run: what is known of one, and the kinds of name that lead to one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from harness.arch import Architecture
from harness.build import kconfig
from harness.build.builder import Recipe
from harness.debian.apt import Archive
from harness.errors import SpecError
from harness.host.cache import Cache
from harness.kernels import image_format
from harness.kernels.modules import ModuleTree

#: What --kernel takes, for messages.
FORMS = (
    "give debian:VERSION, debian:SUITE, a tree, an image, a .deb, ssh://USER@HOST, git:PATH@REVISION, "
    "or a variant of kernel_configs/variants.toml"
)


@dataclass(frozen=True)
class Provenance:
    """Where a kernel came from, for the report."""

    #: "debian", "tree", "image", "deb" or "build"
    source: str
    #: package name, the path that was given, or the source that was built
    package: str
    #: package version, or the kernel's release
    version: str
    #: of the package file, or of the image
    sha256: str
    #: packages that belong to it but could not be had: its modules or config are unknown
    missing: tuple[str, ...] = ()
    #: what it was built from, if we built it
    recipe: Recipe | None = None

    def __str__(self) -> str:
        if self.recipe:
            return f"built from {self.recipe}"
        without = f", without {', '.join(self.missing)}" if self.missing else ""
        return f"{self.package} {self.version} (sha256 {self.sha256[:16]}…){without}"


@dataclass(frozen=True)
class Kernel:
    """A kernel with all that is known of it before it runs."""

    spec: BootSpec
    arch: Architecture
    #: as ``uname -r`` will show it
    release: str
    #: a file that QEMU boots
    image: Path
    #: options without their prefix; empty if unknown
    config: Mapping[str, str]
    #: None if its modules are not at hand
    modules: ModuleTree | None
    #: the ELF file with symbols, if there is one
    vmlinux: Path | None
    provenance: Provenance

    def has(self, option: str) -> bool:
        """Whether an option (with or without ``CONFIG_``) is built in or a module."""
        return self.config.get(option.removeprefix("CONFIG_"), "n") in ("y", "m")


@dataclass(frozen=True)
class Spec:
    """A parsed ``--kernel``.

    :param text: as the user wrote it; giving it again names the same kernel.
    :param label: short, unique among the specs of a run, made of characters that are safe in a test id.
    """

    text: str
    label: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class BootSpec(Spec, ABC):
    """A kernel that is booted in a machine of ours."""

    arch: Architecture

    @abstractmethod
    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """Find, fetch and unpack the kernel.

        :raises SpecError: if there is no such kernel.
        :raises FetchError: if it cannot be had.
        :raises HostError: if this host lacks a program, or space.
        """


@dataclass(frozen=True)
class SshSpec(Spec):
    """A running machine that is reached by SSH."""

    user: str
    host: str
    port: int
    #: None until somebody asks the machine
    arch: Architecture | None


#: options without which no kernel reaches the agent, and what each is for; virtio is checked with the modules
REQUIRED = {
    "BLK_DEV_INITRD": "unpack the initramfs that holds the tests",
    "BINFMT_ELF": "run programs",
    "DEVTMPFS": "make device nodes",
    "PROC_FS": "mount /proc",
    "SYSFS": "mount /sys",
    "TMPFS": "mount a writable file system",
    "TTY": "show a console",
}


def check_config(spec: BootSpec, config: Mapping[str, str]) -> None:
    """Refuse a kernel whose configuration cannot start the agent.

    :raises SpecError: if an option of :data:`REQUIRED` is off.
    """
    for option, purpose in REQUIRED.items():
        if config and config.get(option) != "y":
            raise SpecError(f"{spec} cannot {purpose}: set CONFIG_{option}=y and build it again")


def checked(spec: BootSpec, image: Path) -> Path:
    """An image file, once it is known to be for the architecture of its spec.

    :raises SpecError: if it is not.
    """
    found = image_format.identify(image).arch
    if found is not spec.arch:
        raise SpecError(f"{spec} is a kernel for {found}, but --arch={spec.arch} was asked for")
    return image


def read_config(path: Path) -> dict[str, str]:
    """The options in a ``.config`` file; empty if there is no such file."""
    return kconfig.parse_config(path.read_text(errors="replace")) if path.is_file() else {}


def as_label(text: str) -> str:
    """Text as a label: of characters that are safe in a test id."""
    # Brackets, blanks and "::" have meanings in test ids.
    return re.sub(r"[^A-Za-z0-9.:_+~-]+", "-", text).replace("::", ":")


def check_arch(text: str, found: Architecture, wanted: Architecture | None) -> None:
    """Refuse a kernel that is for another architecture than ``--arch`` asks for.

    :raises SpecError: if it is.
    """
    if wanted and found is not wanted:
        raise SpecError(f"{text} is a kernel for {found}, but --arch={wanted} was asked for")
