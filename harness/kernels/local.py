# SPDX-License-Identifier: GPL-2.0
"""Kernels on this host: build trees and boot image files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from harness import arch
from harness.arch import ARCHITECTURES, Architecture
from harness.debian.apt import Archive
from harness.errors import SpecError
from harness.host.cache import Cache, sha256
from harness.kernels import image_format
from harness.kernels.kernel import (
    FORMS,
    BootSpec,
    Kernel,
    Provenance,
    as_label,
    check_arch,
    check_boot_image,
    check_config,
    read_config,
)
from harness.kernels.modules import ModuleTree


@dataclass(frozen=True)
class TreeSpec(BootSpec):
    """A kernel build tree."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`. Does not run make."""
        boot_image = self.path / self.arch.tree_image
        return _from_files(self, cache, "tree", boot_image, self.path, self.path / ".config", ModuleTree.of(self.path))

    def identify(self, cache: Cache, archive: Archive) -> str:
        """See :meth:`BootSpec.identify`. Modules are built with the image, so that the image stands for them."""
        return sha256(self.path / self.arch.tree_image)


@dataclass(frozen=True)
class ImageSpec(BootSpec):
    """A boot image file. Its configuration and modules are looked for where build trees and packages have them."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`."""
        path = self.path.resolve()
        tree = Path(str(path).removesuffix(self.arch.tree_image))
        if tree != path and _is_tree(tree):
            return replace(TreeSpec(self.text, self.label, self.arch, tree).resolve(cache, archive), spec=self)
        release = image_format.read(path).release
        directories = [path.parent, path.parent.parent / "lib/modules" / (release or "-")]
        directories += [path.parent.parent / "usr" / "lib/modules" / (release or "-")]
        modules = next((each for each in directories if (each / "kernel").is_dir()), None)
        configs = [path.parent / f"config-{release}", *(each / "config" for each in directories)]
        config = next((each for each in configs if each.is_file()), None)
        return _from_files(self, cache, "image", path, path, config, ModuleTree.of(modules) if modules else None)

    def identify(self, cache: Cache, archive: Archive) -> str:
        """See :meth:`BootSpec.identify`."""
        return sha256(self.path)


def parse_tree(text: str, path: Path, wanted: Architecture | None) -> TreeSpec:
    """Parse the path of a build tree.

    :param wanted: from ``--arch``.
    :raises SpecError: if it is not a build tree, or holds no boot image for the architecture.
    """
    built = [each for each in ARCHITECTURES if (path / each.tree_image).is_file()]
    if wanted and wanted not in built:
        other = f"; it is built for {', '.join(map(str, built))}" if built else ""
        raise SpecError(f"{text} has no {wanted.tree_image}: build it first with make, or with --build{other}")
    if not built:
        if not _is_tree(path):
            raise SpecError(f"{text} is no kernel build tree: it has neither .config nor Kbuild; {FORMS}")
        raise SpecError(f"{text} has no {arch.host().tree_image}: build it first with make, or with --build")
    chosen = wanted or (arch.host() if arch.host() in built else built[0])
    return TreeSpec(text, as_label(f"{path.resolve().name}-{chosen}"), chosen, path.resolve())


def parse_image(text: str, path: Path, wanted: Architecture | None) -> ImageSpec:
    """Parse the path of a boot image.

    :param wanted: from ``--arch``.
    :raises SpecError: if it is not a boot image, or is for another architecture.
    """
    found = image_format.identify(path).arch
    check_arch(text, found, wanted)
    return ImageSpec(text, as_label(f"{path.name}-{found}"), found, path.resolve())


def _is_tree(path: Path) -> bool:
    return any((path / name).exists() for name in (".config", "Kbuild"))


def _from_files(
    spec: TreeSpec | ImageSpec,
    cache: Cache,
    source: str,
    boot_image: Path,
    shown: Path,
    config: Path | None,
    modules: ModuleTree | None,
) -> Kernel:
    check_boot_image(spec, boot_image)
    contents = image_format.read(boot_image)
    release_file = spec.path / "include/config/kernel.release"
    release = release_file.read_text().strip() if release_file.is_file() else contents.release
    if release is None:
        raise SpecError(f"{boot_image} does not contain its release: build it again, or give its build tree")
    options = (read_config(config) if config else {}) or contents.config
    check_config(spec, options)
    vmlinux = spec.path / "vmlinux"
    return Kernel(
        spec=spec,
        arch=spec.arch,
        release=release,
        boot_image=image_format.bootable(boot_image, cache),
        config=options,
        modules=modules,
        vmlinux=vmlinux if vmlinux.is_file() else None,
        provenance=Provenance(source, str(shown), release, sha256(boot_image)),
    )
