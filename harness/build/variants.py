# SPDX-License-Identifier: GPL-2.0
"""The kernels that ``kernel_configs/`` defines: named variants, presets, and the fragments of each architecture."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness import paths
from harness.arch import Architecture
from harness.build.kconfig import Setting, parse_fragment
from harness.errors import SpecError


@dataclass(frozen=True)
class Variant:
    """A named kernel: a source and the patches on top of it."""

    name: str
    description: str
    #: what a source is called on the command line
    source: str
    #: patches, directories of patches, or mboxes, in order
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class Preset:
    """A choice among configurations."""

    name: str
    description: str
    fragments: tuple[str, ...]
    #: not complete by itself: comes on top of another
    addition: bool


@dataclass(frozen=True)
class ArchFragments:
    """What one architecture needs."""

    fragments: tuple[str, ...]
    #: fragments by page size
    page_sizes: Mapping[str, tuple[str, ...]]
    default_page_size: str


@dataclass(frozen=True)
class Flavour:
    """A configuration: what the words behind a kernel's name mean for one architecture."""

    #: in the order of their definition, the default page size left out
    words: tuple[str, ...]
    #: in the order in which they are merged
    fragments: tuple[Path, ...]

    def __str__(self) -> str:
        return ":".join(self.words)

    def settings(self) -> list[Setting]:
        """What the fragments ask for, in order.

        :raises UsageError: if one is not written well.
        """
        return [
            setting
            for path in self.fragments
            for setting in parse_fragment(path.read_text(), f"{path.parent.name}/{path.name}")
        ]


@dataclass(frozen=True)
class Definitions:
    """All of ``variants.toml``."""

    directory: Path
    base: tuple[str, ...]
    default_preset: str
    variants: Mapping[str, Variant]
    presets: Mapping[str, Preset]
    arches: Mapping[str, ArchFragments]

    @classmethod
    def load(cls, directory: Path = paths.PROJECT / "kernel_configs") -> Definitions:
        """Read a directory's ``variants.toml``; it is read once."""
        return _load(directory)

    @property
    def words(self) -> frozenset[str]:
        """Every preset and page size."""
        return frozenset(self.presets).union(*(each.page_sizes for each in self.arches.values()))

    def flavour(self, words: Sequence[str], arch: Architecture) -> Flavour:
        """The configuration that some presets, and at most one page size, make.

        :raises SpecError: for a word that is none, or not one of this architecture.
        """
        here = self.arches[arch.name]
        for word in words:
            if word not in self.presets and word not in here.page_sizes:
                which = f"{arch} has no pages of {word}" if word in self.words else f"there is no preset {word!r}"
                known = ", ".join((*self.presets, *here.page_sizes))
                raise SpecError(f"{which}: use {known} for {arch}")
        sizes = [word for word in here.page_sizes if word in words] or [here.default_page_size]
        if len(sizes) > 1:
            raise SpecError(f"a kernel has one page size, not {' and '.join(sizes)}")
        presets = [preset for preset in self.presets.values() if preset.name in words]
        if all(preset.addition for preset in presets):
            presets.insert(0, self.presets[self.default_preset])
        named = (*(preset.name for preset in presets), *(size for size in sizes if size != here.default_page_size))
        fragments = [*self.base, *here.fragments, *here.page_sizes[sizes[0]]]
        fragments += [fragment for preset in presets for fragment in preset.fragments]
        return Flavour(named, tuple(self.directory / f"{fragment}.config" for fragment in fragments))


@cache
def _load(directory: Path) -> Definitions:
    data: dict[str, Any] = tomllib.loads((directory / "variants.toml").read_text())
    return Definitions(
        directory=directory,
        base=tuple(data["base"]),
        default_preset=data["default_preset"],
        variants={
            name: Variant(
                name, each["description"], each["source"], tuple(directory / patch for patch in each["patches"])
            )
            for name, each in data["variants"].items()
        },
        presets={
            name: Preset(name, each["description"], tuple(each["fragments"]), each.get("addition", False))
            for name, each in data["presets"].items()
        },
        arches={
            name: ArchFragments(
                tuple(each["fragments"]),
                {size: tuple(fragments) for size, fragments in each["page_sizes"].items()},
                each["default_page_size"],
            )
            for name, each in data["arch"].items()
        },
    )
