# SPDX-License-Identifier: GPL-2.0
"""Parses the names of kernels that the harness builds.

::

    SOURCE[+PATCHES]...[:PRESET]...

``SOURCE`` is a variant of ``kernel_configs/variants.toml``, ``linux-source-X.Y``, ``git:PATH@REVISION``, or the path
of a source tree. ``PATCHES`` is a patch, an mbox, or a directory of patches. ``PRESET`` is a preset or a page size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from harness.arch import Architecture
from harness.build.source import GitSource, PackageSource, Source, TreeSource
from harness.build.variants import Configuration, KernelConfigs
from harness.errors import SpecError
from harness.options import BuildOptions


@dataclass(frozen=True)
class BuildName:
    """A parsed name."""

    #: the name with all presets, also those from the defaults
    text: str
    #: a short name, without the default preset
    label: str
    #: its name in variants.toml; empty if it is none of them
    variant: str
    source: Source
    #: patches, directories of patches, or mboxes, in order
    series: tuple[Path, ...]
    configuration: Configuration


def parse(text: str, arch: Architecture, options: BuildOptions) -> BuildName | None:
    """Parse a name. Reads local files only.

    :param arch: the architecture to build for.
    :returns: None if it is not the name of a kernel that the harness builds.
    :raises SpecError: if a part of the name is unknown.
    """
    definitions = KernelConfigs.load()
    words: list[str] = []
    named = text
    while ":" in named and named.rpartition(":")[2] in definitions.words:
        named, _, word = named.rpartition(":")
        words.insert(0, word)
    base, added = _split(named)
    variant_name, *unknown = base.split(":")
    if variant := definitions.variants.get(variant_name):
        words = unknown + words  # configuration() reports the unknown presets
        named = named.replace(base, variant_name, 1)
        label, source, series = variant.name, _source(variant.source), (*variant.patches, *added)
    else:
        found = _source(base)
        if isinstance(found, TreeSource) and not (words or added or options.trees):
            return None  # the user builds this tree
        if found is None and base.startswith("git:"):
            raise SpecError(f"there is no git repository {base[4:].partition('@')[0]}: give git:PATH@REVISION")
        if found is None and (words or added):
            raise SpecError(f"{text} cannot be built: there is no kernel source {base}")
        if found is None:
            return None
        label, source, series = found.label, found, tuple(added)
    if source is None:
        raise SpecError(f"the variant {label} has no kernel source: correct its line in variants.toml")
    configuration = definitions.configuration(words or options.words, arch, source.label)
    label += "".join(f"+{each.name if each.is_dir() else each.stem}" for each in added)
    if configuration.words != (definitions.default_preset,):
        label += f":{configuration}"
    name = variant.name if variant else ""
    return BuildName(f"{named}:{configuration}", label, name, source, series, configuration)


def _split(named: str) -> tuple[str, list[Path]]:
    """The part before the first ``+PATCHES``, and the patches. File names may contain ``+``."""
    added: list[Path] = []
    while "+" in named and not Path(named).expanduser().exists():
        places = [place for place, letter in enumerate(named) if letter == "+"]
        series = {place: Path(named[place + 1 :]).expanduser() for place in places}
        place = next((each for each in reversed(places) if named[each + 1 :] and series[each].exists()), None)
        if place is None and _source(named):
            break
        if place is None:
            raise SpecError(f"there is no patch, mbox or directory {named[places[-1] + 1 :]!r}")
        added.insert(0, series[place].absolute())
        named = named[:place]
    return named, added


def _source(base: str) -> Source | None:
    if re.fullmatch(r"linux-source-\d+\.\d+", base):
        return PackageSource(base)
    if base.startswith("git:"):
        return _git(base.removeprefix("git:"))
    path = Path(base).expanduser()
    # An O= directory has a Makefile, but not a Kconfig.
    is_source = base and all((path / name).is_file() for name in ("Makefile", "Kconfig", "Kbuild"))
    return TreeSource(path.absolute()) if is_source else None


def _git(text: str) -> GitSource | None:
    parts = text.split("@")
    for count in range(1, len(parts) + 1):  # both parts may contain an @, as HEAD@{1} does
        path, ref = Path("@".join(parts[:count])).expanduser(), "@".join(parts[count:])
        if path.is_dir():
            return GitSource(path.absolute(), ref or "HEAD")
    return None
