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

import hashlib
import itertools
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO
from urllib.parse import urlsplit

from harness import apt, arch, build, deb, formula, kconfig, kernelimage, series
from harness.apt import Archive, Package
from harness.arch import ARCHITECTURES, Architecture
from harness.build import Recipe
from harness.cache import Cache, sha256
from harness.errors import HarnessError, SpecError
from harness.formula import Building, Formula
from harness.modules import ModuleTree


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


@dataclass(frozen=True)
class DebianSpec(BootSpec):
    """A packaged kernel from Debian's archive: by version prefix or from named suites.

    :param version: components that the upstream version begins with; empty for any.
    :param suites: where to look; empty for every suite we know.
    """

    version: tuple[str, ...]
    suites: tuple[str, ...]
    flavour: str = "cloud"

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`; asks the network only if the cache cannot tell."""
        image, others = self._choose(archive)
        packages, missing = _closure(image, others)
        # From 6.19 on, linux-image-… only leads to the package that holds the image.
        holder = next((each for each in packages if each.name.startswith("linux-binary-")), image)
        contents = hashlib.sha256(" ".join(each.sha256 for each in packages).encode()).hexdigest()[:16]

        def unpack(target: Path) -> None:
            archive.progress(f"unpacking {image.name} {image.version}")
            _unpack(archive.download(packages), target)

        tree = cache.tree("kernels", f"{image.name}_{image.version}_{contents}", unpack)
        provenance = Provenance("debian", holder.name, holder.version, holder.sha256, missing)
        if missing:
            archive.progress(f"{self}: its mirror no longer lists {', '.join(missing)}; going on without")
        return _from_unpacked(self, tree, provenance)

    def _choose(self, archive: Archive) -> tuple[Package, list[Package]]:
        """The newest package that fits, and all that were looked at."""
        tiers = [self.suites] if self.suites else [apt.RELEASED, apt.UNRELEASED]
        seen: list[Package] = []
        for tier, age in itertools.product(tiers, (apt.REFRESH_AFTER, apt.RETRY_AFTER)):
            try:
                found = archive.packages(self.arch, tier, strict=bool(self.suites), max_age=age)
            except HarnessError:
                if not seen:
                    raise
                continue  # no unreleased suite can be had: say what the released ones have
            seen += [each for each in found if each not in seen]
            fitting = [each for each in found if self._fits(each)]
            if fitting:
                # Mirrors drop some parts of older kernels: a whole kernel comes before a newer one in pieces.
                order = [(not _closure(each, found)[1], apt.version_key(each.version)) for each in fitting]
                return fitting[order.index(max(order))], found
        raise SpecError(self._unknown(seen))

    def _is_kernel(self, package: Package) -> bool:
        return bool(re.fullmatch(rf"linux-image-\d.*-{self.flavour}-{self.arch.debian}", package.name))

    def _fits(self, package: Package) -> bool:
        components = tuple(re.split(r"[.~+-]", package.version.partition(":")[2] or package.version))
        return self._is_kernel(package) and components[: len(self.version)] == self.version

    def _unknown(self, seen: Sequence[Package]) -> str:
        versions = {each.version.rpartition("-")[0] for each in seen if self._is_kernel(each)}
        ordered = sorted(versions, key=apt.version_key)
        if not ordered:
            return f"there is no {self.flavour} kernel for {self.arch} in {', '.join(self.suites) or 'Debian'}"
        # The neighbours of where it would stand: what somebody mistyped is mostly among them.
        wanted = apt.version_key(".".join(self.version))
        place = sum(apt.version_key(each) < wanted for each in ordered)
        nearest = ordered[max(0, place - 3) : place + 3]
        return f"Debian has no kernel {'.'.join(self.version)} for {self.arch}: the nearest are {', '.join(nearest)}"


@dataclass(frozen=True)
class TreeSpec(BootSpec):
    """A kernel build tree."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`; builds nothing."""
        image = self.path / self.arch.tree_image
        return _from_files(self, cache, "tree", image, self.path, self.path / ".config", ModuleTree.of(self.path))


@dataclass(frozen=True)
class ImageSpec(BootSpec):
    """A kernel image file; what belongs to it is looked for where build trees and packages put it."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`."""
        path = self.path.resolve()
        tree = Path(str(path).removesuffix(self.arch.tree_image))
        if tree != path and _is_tree(tree):
            return replace(TreeSpec(self.text, self.label, self.arch, tree).resolve(cache, archive), spec=self)
        release = kernelimage.read(path).release
        directories = [path.parent, path.parent.parent / "lib/modules" / (release or "-")]
        directories += [path.parent.parent / "usr" / "lib/modules" / (release or "-")]
        modules = next((each for each in directories if (each / "kernel").is_dir()), None)
        configs = [path.parent / f"config-{release}", *(each / "config" for each in directories)]
        config = next((each for each in configs if each.is_file()), None)
        return _from_files(self, cache, "image", path, path, config, ModuleTree.of(modules) if modules else None)


@dataclass(frozen=True)
class DebSpec(BootSpec):
    """A kernel package file."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`."""
        debs = list(_with_neighbours(self.path))
        digests = [sha256(path) for path in debs]
        tree = cache.tree("kernels", "deb " + " ".join(digests), lambda target: _unpack(debs, target))
        fields = deb.control(self.path)
        provenance = Provenance("deb", fields.get("Package", str(self.path)), fields.get("Version", ""), digests[0])
        return _from_unpacked(self, tree, provenance)


@dataclass(frozen=True)
class BuildSpec(BootSpec):
    """A kernel that is built here."""

    formula: Formula

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`; takes minutes where it is not cached.

        :raises BuildError: if it cannot be built.
        """
        named = self.formula
        request = build.Request(
            arch=self.arch,
            source=named.source,
            patches=tuple(patch for path in named.series for patch in series.load(path)),
            flavour=str(named.flavour),
            wanted=kconfig.merge(named.flavour.settings()),
            label=self.label,
        )
        built = build.build(request, cache, archive)
        config = _read_config(built.config)
        _check_config(self, config)
        return Kernel(
            spec=self,
            arch=self.arch,
            release=built.release,
            image=kernelimage.bootable(built.image, cache),
            config=config,
            modules=None,  # no configuration of ours makes any
            vmlinux=built.vmlinux,
            provenance=Provenance(
                "build", built.recipe.source, built.release, sha256(built.image), recipe=built.recipe
            ),
        )


_AS_IT_IS = Building()


def parse(text: str, wanted: Architecture | None = None, building: Building = _AS_IT_IS) -> BootSpec | SshSpec:
    """Understand one ``--kernel``; reads local files, never the network.

    :param wanted: from ``--arch``; None takes what the kernel is for, or else the host's architecture.
    :param building: about kernels that are built here.
    :raises SpecError: if it names nothing, or not a kernel, or one for another architecture.
    """
    text = text.strip()
    if text.startswith("debian:"):
        return _parse_debian(text, wanted)
    if text.startswith("ssh://"):
        return _parse_ssh(text, wanted)
    chosen = wanted or arch.host()
    if found := formula.parse(text, chosen, building):
        return BuildSpec(found.text, _label(f"{found.label}-{chosen}"), chosen, found)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return _parse_tree(text, path, wanted)
    if path.is_file():
        return _parse_deb(text, path, wanted) if path.suffix == ".deb" else _parse_image(text, path, wanted)
    if not text or (":" in text and "/" not in text.partition(":")[0]):
        raise SpecError(f"unknown kernel {text!r}: {_FORMS}")
    raise SpecError(f"there is no file or directory {path}: {_FORMS}")


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


_FORMS = (
    "give debian:VERSION, debian:SUITE, a tree, an image, a .deb, ssh://USER@HOST, git:PATH@REVISION, "
    "or a variant of kernel_configs/variants.toml"
)


def _parse_debian(text: str, wanted: Architecture | None) -> DebianSpec:
    rest = text.removeprefix("debian:") or "stable"
    chosen = wanted or arch.host()
    label = _label(f"debian:{rest}-{chosen}")
    if re.fullmatch(r"\d+(\.\d+)*", rest):
        return DebianSpec(text, label, chosen, tuple(rest.split(".")), ())
    if rest[0].isdigit():
        raise SpecError(f"{text!r} is no kernel version: give numbers such as debian:6.12 or debian:6.12.117")
    return DebianSpec(text, label, chosen, (), apt.suites(rest))


def _parse_ssh(text: str, wanted: Architecture | None) -> SshSpec:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port or 22
    except ValueError as error:
        raise SpecError(f"{text!r} is no SSH address: {error}") from None
    if not host or parts.path.strip("/") or parts.query or parts.password:
        raise SpecError(f"{text!r} is no SSH address: give ssh://USER@HOST or ssh://USER@HOST:PORT (keys, no password)")
    label = f"ssh-{host}" if port == 22 else f"ssh-{host}-{port}"
    return SshSpec(text, _label(label), parts.username or "root", host, port, wanted)


def _parse_tree(text: str, path: Path, wanted: Architecture | None) -> TreeSpec:
    built = [each for each in ARCHITECTURES if (path / each.tree_image).is_file()]
    if wanted and wanted not in built:
        other = f"; it is built for {', '.join(map(str, built))}" if built else ""
        raise SpecError(f"{text} has no {wanted.tree_image}: build it first with make, or with --build{other}")
    if not built:
        if not _is_tree(path):
            raise SpecError(f"{text} is no kernel build tree: it has neither .config nor Kbuild; {_FORMS}")
        raise SpecError(f"{text} has no {arch.host().tree_image}: build it first with make, or with --build")
    chosen = wanted or (arch.host() if arch.host() in built else built[0])
    return TreeSpec(text, _label(f"{path.resolve().name}-{chosen}"), chosen, path.resolve())


def _parse_image(text: str, path: Path, wanted: Architecture | None) -> ImageSpec:
    found = kernelimage.identify(path).arch
    _check_arch(text, found, wanted)
    return ImageSpec(text, _label(f"{path.name}-{found}"), found, path.resolve())


def _parse_deb(text: str, path: Path, wanted: Architecture | None) -> DebSpec:
    fields = deb.control(path)
    name, built_for = fields.get("Package", ""), fields.get("Architecture", "")
    if not re.match(r"linux-(image|binary)-", name):
        raise SpecError(f"{text} is no kernel package but {name}: give a linux-image-… or linux-binary-… package")
    found = next((each for each in ARCHITECTURES if each.debian == built_for), None)
    if found is None:
        raise SpecError(f"{text} is a kernel for {built_for}, which is not supported")
    _check_arch(text, found, wanted)
    release = re.sub(r"^linux-(image|binary)-", "", name)
    return DebSpec(text, _label(f"{release}-{found}"), found, path.resolve())


def _check_arch(text: str, found: Architecture, wanted: Architecture | None) -> None:
    if wanted and found is not wanted:
        raise SpecError(f"{text} is a kernel for {found}, but --arch={wanted} was asked for")


def _label(text: str) -> str:
    # Brackets, blanks and "::" have meanings in test ids.
    return re.sub(r"[^A-Za-z0-9.:_+~-]+", "-", text).replace("::", ":")


def _is_tree(path: Path) -> bool:
    return any((path / name).exists() for name in (".config", "Kbuild"))


def _closure(image: Package, others: Sequence[Package]) -> tuple[list[Package], tuple[str, ...]]:
    """The packages a kernel is spread over, and the names of those that its suite no longer lists.

    Until 6.18 everything is in one package (its linux-base-… holds nothing we need); then the image, the modules, and
    the config are each in their own.
    """
    known = {(each.name, each.version): each for each in others if each.suite == image.suite}
    found = {image.name: image}
    missing: dict[str, None] = {}
    queue = [image]
    while queue:
        for name, version in re.findall(r"(linux-(?:binary|modules|base)-\d\S*) \(= ([^)]+)\)", queue.pop(0).depends):
            package = known.get((name, version))
            if package is None:
                missing[name] = None
            elif name not in found:
                found[name] = package
                queue.append(package)
    split = any(name.startswith("linux-modules-") for name in (*found, *missing))
    return list(found.values()), tuple(missing) if split else ()


def _with_neighbours(path: Path) -> Iterator[Path]:
    """A package file, and those it depends on if they lie beside it."""
    yield path
    release = re.sub(r"^linux-(image|binary)-", "", deb.control(path).get("Package", ""))
    for part in ("binary", "modules", "base"):
        for other in sorted(path.parent.glob(f"linux-{part}-{release}_*.deb")):
            if other != path:
                yield other
                break


def _unpack(debs: Sequence[Path], target: Path) -> None:
    """Lay out what we need of kernel packages: ``image``, ``config``, ``System.map``, ``lib/modules/<release>``."""
    for path in debs:
        for member, content in deb.members(path):
            place = _place(PurePosixPath(member.name))
            if place and content:
                _write(target / place, content)


def _place(name: PurePosixPath) -> str | None:
    parts = name.parts
    if not parts or ".." in parts or name.is_absolute():
        return None
    if parts[0] == "boot" and len(parts) == 2:
        for prefix, place in (("vmlinuz-", "image"), ("vmlinux-", "image"), ("config-", "config")):
            if parts[1].startswith(prefix):
                return place
        return "System.map" if parts[1].startswith("System.map-") else None
    inside = re.fullmatch(r"(?:usr/)?(lib/modules/[^/]+)/(.+)", str(name))
    if not inside or inside[2].startswith("dtb/"):
        return None
    return {"vmlinuz": "image", "config": "config", "System.map": "System.map"}.get(
        inside[2], f"{inside[1]}/{inside[2]}"
    )


def _write(path: Path, content: IO[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        shutil.copyfileobj(content, file)


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


def _check_config(spec: BootSpec, config: Mapping[str, str]) -> None:
    for option, purpose in REQUIRED.items():
        if config and config.get(option) != "y":
            raise SpecError(f"{spec} cannot {purpose}: set CONFIG_{option}=y and build it again")


def _from_unpacked(spec: BootSpec, tree: Path, provenance: Provenance) -> Kernel:
    image = tree / "image"
    if not image.exists():
        raise SpecError(f"{provenance.package} holds no kernel image: give the linux-image-… package that does")
    directories = list((tree / "lib/modules").glob("*"))
    modules = ModuleTree.of(directories[0]) if directories else None
    release = directories[0].name if directories else kernelimage.read(image).release or provenance.version
    config = _read_config(tree / "config")
    _check_config(spec, config)
    return Kernel(
        spec=spec,
        arch=spec.arch,
        release=release,
        image=_checked(spec, image),
        config=config,
        modules=modules,
        vmlinux=None,
        provenance=provenance,
    )


def _from_files(
    spec: TreeSpec | ImageSpec,
    cache: Cache,
    source: str,
    image: Path,
    shown: Path,
    config: Path | None,
    modules: ModuleTree | None,
) -> Kernel:
    _checked(spec, image)
    contents = kernelimage.read(image)
    release_file = spec.path / "include/config/kernel.release"
    release = release_file.read_text().strip() if release_file.is_file() else contents.release
    if release is None:
        raise SpecError(f"{image} does not say which release it is: build it again, or give its build tree")
    options = (_read_config(config) if config else {}) or contents.config
    _check_config(spec, options)
    vmlinux = spec.path / "vmlinux"
    return Kernel(
        spec=spec,
        arch=spec.arch,
        release=release,
        image=kernelimage.bootable(image, cache),
        config=options,
        modules=modules,
        vmlinux=vmlinux if vmlinux.is_file() else None,
        provenance=Provenance(source, str(shown), release, sha256(image)),
    )


def _checked(spec: BootSpec, image: Path) -> Path:
    found = kernelimage.identify(image).arch
    if found is not spec.arch:
        raise SpecError(f"{spec} is a kernel for {found}, but --arch={spec.arch} was asked for")
    return image


def _read_config(path: Path) -> dict[str, str]:
    return kernelimage.parse_config(path.read_text(errors="replace")) if path.is_file() else {}
