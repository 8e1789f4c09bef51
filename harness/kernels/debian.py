# SPDX-License-Identifier: GPL-2.0
"""Kernels in Debian packages: from Debian's archive, or from a package file."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from harness import arch
from harness.arch import ARCHITECTURES, Architecture
from harness.debian import deb
from harness.debian.apt import Archive
from harness.debian.apt_root import Package
from harness.debian.search import search
from harness.debian.suites import RELEASED, UNRELEASED, suites
from harness.debian.version import version_key
from harness.errors import HarnessError, SpecError
from harness.host.cache import Cache, sha256
from harness.kernels import image_format
from harness.kernels.kernel import (
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
class DebianSpec(BootSpec):
    """A kernel from Debian's archive.

    :param version: the first components of the upstream version; empty for any version.
    :param suites: the suites to search; empty for all.
    """

    version: tuple[str, ...]
    suites: tuple[str, ...]

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`. Uses the network only if the cache has no recent index or not the packages."""
        package, listed = self._choose(archive)
        packages, missing = _closure(package, listed)
        # Since 6.19, linux-image-… only depends on the package that holds the boot image.
        holder = next((each for each in packages if each.name.startswith("linux-binary-")), package)

        def unpack(target: Path) -> None:
            archive.progress(f"unpacking {package.name} {package.version}")
            _unpack(archive.download(packages), target)

        tree = cache.tree("kernels", _cache_key(package, packages), unpack)
        provenance = Provenance("debian", holder.name, holder.version, holder.sha256, missing)
        if missing:
            archive.progress(f"{self}: its mirror no longer lists {', '.join(missing)}; continuing without them")
        return _from_unpacked(self, tree, provenance)

    def identify(self, cache: Cache, archive: Archive) -> str:
        """See :meth:`BootSpec.identify`. Reads the archive's index only."""
        package, listed = self._choose(archive)
        return _cache_key(package, _closure(package, listed)[0])

    def _choose(self, archive: Archive) -> tuple[Package, Sequence[Package]]:
        """The newest package that fits, and the packages of the suites it comes from."""
        found = search(archive, self.arch, self._fits, self.suites)
        if not found.fitting:
            raise SpecError(self._unknown(found.listed))
        # Mirrors remove parts of older kernels: a complete kernel is better than a newer one with parts missing.
        complete = (each for each in found.fitting if not _closure(each, found.listed)[1])
        return next(complete, found.fitting[0]), found.listed

    def _fits(self, package: Package) -> bool:
        components = tuple(re.split(r"[.~+-]", package.version.partition(":")[2] or package.version))
        return _is_kernel(package, self.arch) and components[: len(self.version)] == self.version

    def _unknown(self, seen: Sequence[Package]) -> str:
        versions = {each.version.rpartition("-")[0] for each in seen if _is_kernel(each, self.arch)}
        ordered = sorted(versions, key=version_key)
        if not ordered:
            name = f"linux-image-VERSION-{self.arch.debian_flavour}"
            return f"there is no kernel {name} in {', '.join(self.suites) or 'Debian'}"
        # A mistyped version is mostly close to the intended one.
        wanted = version_key(".".join(self.version))
        place = sum(version_key(each) < wanted for each in ordered)
        nearest = ordered[max(0, place - 3) : place + 3]
        return f"Debian has no kernel {'.'.join(self.version)} for {self.arch}: the nearest are {', '.join(nearest)}"


@dataclass(frozen=True)
class DebSpec(BootSpec):
    """A kernel from a package file."""

    path: Path

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`."""
        debs = list(_with_neighbours(self.path))
        digests = [sha256(path) for path in debs]
        tree = cache.tree("kernels", "deb " + " ".join(digests), lambda target: _unpack(debs, target))
        fields = deb.control(self.path)
        provenance = Provenance("deb", fields.get("Package", str(self.path)), fields.get("Version", ""), digests[0])
        return _from_unpacked(self, tree, provenance)

    def identify(self, cache: Cache, archive: Archive) -> str:
        """See :meth:`BootSpec.identify`."""
        return " ".join(sha256(path) for path in _with_neighbours(self.path))


def parse_debian(text: str, wanted: Architecture | None) -> DebianSpec:
    """Parse ``debian:VERSION`` and ``debian:SUITE``.

    :param wanted: from ``--arch``.
    :raises SpecError: if it is neither.
    """
    rest = text.removeprefix("debian:") or "stable"
    chosen = wanted or arch.host()
    label = as_label(f"debian:{rest}-{chosen}")
    if re.fullmatch(r"\d+(\.\d+)*", rest):
        return DebianSpec(text, label, chosen, tuple(rest.split(".")), ())
    if rest[0].isdigit():
        raise SpecError(f"{text!r} is no kernel version: give numbers such as debian:6.12 or debian:6.12.117")
    return DebianSpec(text, label, chosen, (), suites(rest))


def parse_deb(text: str, path: Path, wanted: Architecture | None) -> DebSpec:
    """Parse the path of a kernel package.

    :param wanted: from ``--arch``.
    :raises SpecError: if the package is not a kernel, or is for another architecture.
    """
    fields = deb.control(path)
    name, built_for = fields.get("Package", ""), fields.get("Architecture", "")
    if not re.match(r"linux-(image|binary)-", name):
        raise SpecError(f"{text} is no kernel package but {name}: give a linux-image-… or linux-binary-… package")
    found = next((each for each in ARCHITECTURES if each.debian == built_for), None)
    if found is None:
        raise SpecError(f"{text} is a kernel for {built_for}, which is not supported")
    check_arch(text, found, wanted)
    release = re.sub(r"^linux-(image|binary)-", "", name)
    return DebSpec(text, as_label(f"{release}-{found}"), found, path.resolve())


def packaged(archive: Archive, wanted: Architecture) -> list[str]:
    """The upstream versions that Debian's suites have a kernel of now, the oldest first, without candidates (-rc).

    ``debian:VERSION`` names each of them.

    :raises FetchError: if no index of a released suite can be fetched.
    """
    listed = archive.packages(wanted, RELEASED)
    with contextlib.suppress(HarnessError):  # the index of an unreleased suite expires on a mirror that stands still
        listed += archive.packages(wanted, UNRELEASED)
    return sorted(set(filter(None, (upstream(each, wanted) for each in listed))), key=version_key)


def upstream(package: Package, wanted: Architecture) -> str:
    """The upstream version of a kernel package; empty if it is a candidate (-rc), or no kernel for ``wanted``."""
    found = re.match(r"\d+(\.\d+)+(?!.*~rc)", package.version) if _is_kernel(package, wanted) else None
    return found[0] if found else ""


def is_whole(package: Package, listed: Sequence[Package]) -> bool:
    """Whether a list has all packages that a kernel consists of."""
    return not _closure(package, listed)[1]


def _is_kernel(package: Package, wanted: Architecture) -> bool:
    return bool(re.fullmatch(rf"linux-image(-\d[^-]*)+-{wanted.debian_flavour}", package.name))


def _cache_key(package: Package, packages: Sequence[Package]) -> str:
    """Names a kernel and the contents of its packages."""
    contents = hashlib.sha256(" ".join(each.sha256 for each in packages).encode()).hexdigest()[:16]
    return f"{package.name}_{package.version}_{contents}"


def _closure(package: Package, listed: Sequence[Package]) -> tuple[list[Package], tuple[str, ...]]:
    """The packages that a kernel consists of, and the names of those that its suite no longer has.

    Until 6.18 one package holds everything that is needed. Since 6.19 the boot image, the modules and the configuration
    are in one package each.

    :param package: the package linux-image-….
    :param listed: the packages to look for the others in.
    """
    known = {(each.name, each.version): each for each in listed if each.suite == package.suite}
    found = {package.name: package}
    missing: dict[str, None] = {}
    queue = [package]
    while queue:
        for name, version in re.findall(r"(linux-(?:binary|modules|base)-\d\S*) \(= ([^)]+)\)", queue.pop(0).depends):
            part = known.get((name, version))
            if part is None:
                missing[name] = None
            elif name not in found:
                found[name] = part
                queue.append(part)
    split = any(name.startswith("linux-modules-") for name in (*found, *missing))
    return list(found.values()), tuple(missing) if split else ()


def _with_neighbours(path: Path) -> Iterator[Path]:
    """A package file, and the packages in the same directory that it depends on."""
    yield path
    release = re.sub(r"^linux-(image|binary)-", "", deb.control(path).get("Package", ""))
    for part in ("binary", "modules", "base"):
        for other in sorted(path.parent.glob(f"linux-{part}-{release}_*.deb")):
            if other != path:
                yield other
                break


def _from_unpacked(spec: BootSpec, tree: Path, provenance: Provenance) -> Kernel:
    boot_image = tree / "image"
    if not boot_image.exists():
        raise SpecError(f"{provenance.package} contains no boot image: give the linux-image-… package that does")
    check_boot_image(spec, boot_image)
    directories = list((tree / "lib/modules").glob("*"))
    modules = ModuleTree.of(directories[0]) if directories else None
    release = directories[0].name if directories else image_format.read(boot_image).release or provenance.version
    config = read_config(tree / "config")
    check_config(spec, config)
    return Kernel(
        spec=spec,
        arch=spec.arch,
        release=release,
        boot_image=boot_image,
        config=config,
        modules=modules,
        vmlinux=None,
        provenance=provenance,
    )


def _unpack(debs: Sequence[Path], target: Path) -> None:
    """Unpack ``image``, ``config``, ``System.map`` and ``lib/modules/<release>`` of kernel packages."""
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
