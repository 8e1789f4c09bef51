# SPDX-License-Identifier: GPL-2.0
"""What is known of a kernel before it runs, and the base of the classes that find kernels."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.arch import Architecture
from harness.build import dotconfig
from harness.debian.apt import Archive
from harness.errors import SpecError, UsageError
from harness.host.cache import Cache
from harness.kernels import image_format
from harness.kernels.modules import ModuleTree

if TYPE_CHECKING:  # the builder is not loaded for kernels that are not built here
    from harness.build.builder import BuildProvenance

#: what --kernel accepts, for error messages
FORMS = (
    "give debian:VERSION, debian:SUITE, a tree, an image, a .deb, ssh://USER@HOST, git:PATH@REVISION, "
    "or a variant of kernel_configs/variants.toml"
)


@dataclass(frozen=True)
class Provenance:
    """Where a kernel comes from, for reports."""

    #: "debian", "tree", "image", "deb" or "build"
    source: str
    #: the name of the package, the path that the user gave, or the source that was built
    package: str
    #: the version of the package, or the release of the kernel
    version: str
    #: the digest of the package file, or of the boot image
    sha256: str
    #: packages that belong to the kernel but are not available, so that its modules or configuration are unknown
    missing: tuple[str, ...] = ()
    #: what the kernel was built from, if the harness built it
    build: BuildProvenance | None = None

    def __str__(self) -> str:
        if self.build:
            return f"built from {self.build}"
        without = f", without {', '.join(self.missing)}" if self.missing else ""
        return f"{self.package} {self.version} (sha256 {self.sha256[:16]}…){without}"


@dataclass(frozen=True)
class Kernel:
    """Everything that is known of a kernel before it runs."""

    spec: BootSpec
    arch: Architecture
    #: as ``uname -r`` shows it
    release: str
    #: a file in a format that QEMU boots
    boot_image: Path
    #: values by option, without ``CONFIG_``; empty if the configuration is unknown
    config: Mapping[str, str]
    #: None if the modules are not available
    modules: ModuleTree | None
    #: the ELF file with symbols; None if there is none
    vmlinux: Path | None
    provenance: Provenance

    @property
    def version(self) -> str:
        """The upstream version. A package's version tells it where the release does not: 6.1.0-56-amd64 is 6.1.192."""
        packaged = self.provenance.source in ("debian", "deb")
        found = re.match(r"\d+(\.\d+)+", self.provenance.version if packaged else self.release)
        return found[0] if found else self.release

    def has(self, option: str) -> bool:
        """Whether an option (with or without ``CONFIG_``) is built in or a module."""
        return self.config.get(option.removeprefix("CONFIG_"), "n") in ("y", "m")


@dataclass(frozen=True)
class Spec:
    """A parsed ``--kernel``.

    :param text: names the same kernel when it is given to ``--kernel`` again.
    :param label: a short name, unique in a run, with characters that are safe in a test ID.
    """

    text: str
    label: str
    #: whether the harness compiles it
    is_built: ClassVar[bool] = False

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class BootSpec(Spec, ABC):
    """A kernel that is booted in a virtual machine."""

    arch: Architecture

    @abstractmethod
    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """Find, fetch and unpack the kernel.

        :raises SpecError: if there is no such kernel.
        :raises FetchError: if it cannot be fetched.
        :raises HostError: if this host lacks a program, or disk space.
        """

    @abstractmethod
    def identify(self, cache: Cache, archive: Archive) -> str:
        """Say which kernel this is now, in words that change with its bytes. Fetches and builds nothing large.

        :raises SpecError: if there is no such kernel.
        :raises FetchError: if the archive's index cannot be had.
        :raises HostError: if this host lacks a program, or space.
        """

    def check_mutant(self, name: str) -> None:
        """Check that the kernel has a mutant that can be activated: see :mod:`harness.build.mutants`.

        :param name: the mutant, or "record".
        :raises UsageError: if it has not.
        """
        raise UsageError(f"{self} has no mutants: build one that has, for example --kernel=relocate-anon:mutants")


@dataclass(frozen=True)
class SshSpec(Spec):
    """A running machine that is reached over SSH."""

    user: str
    host: str
    port: int
    #: from ``--arch``; None if it was not given
    arch: Architecture | None


#: options that a kernel needs to start the agent, and the purpose of each; virtio is checked with the modules
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
    """Check that a kernel with this configuration can start the agent.

    :raises SpecError: if an option of :data:`REQUIRED` is off.
    """
    for option, purpose in REQUIRED.items():
        if config and config.get(option) != "y":
            raise SpecError(f"{spec} cannot {purpose}: set CONFIG_{option}=y and build it again")


def check_boot_image(spec: BootSpec, boot_image: Path) -> None:
    """Check that a boot image is for the architecture of its spec.

    :raises SpecError: if it is for another one.
    """
    check_arch(spec.text, image_format.identify(boot_image).arch, spec.arch)


def read_config(path: Path) -> dict[str, str]:
    """The options in a ``.config`` file; empty if there is no such file."""
    return dotconfig.parse(path.read_text(errors="replace")) if path.is_file() else {}


def as_label(text: str) -> str:
    """Text as a label, with characters that are safe in a test ID."""
    # Brackets, blanks and "::" have a meaning in test IDs.
    return re.sub(r"[^A-Za-z0-9.:_+~-]+", "-", text).replace("::", ":")


def check_arch(text: str, found: Architecture, wanted: Architecture | None) -> None:
    """Check that a kernel is for the architecture that ``--arch`` asks for.

    :param text: names the kernel in the message.
    :param wanted: None if any architecture is accepted.
    :raises SpecError: if it is for another one.
    """
    if wanted and found is not wanted:
        raise SpecError(f"{text} is a kernel for {found}, but --arch={wanted} was asked for")
