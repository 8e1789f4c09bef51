# SPDX-License-Identifier: GPL-2.0
"""Reads ``kernel_configs/``: named variants, presets, and the fragments of each architecture."""

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
    """A named kernel: a source and patches for it."""

    name: str
    description: str
    #: the name of the source, as on the command line
    source: str
    #: patches, directories of patches, or mboxes, in order
    patches: tuple[Path, ...]


@dataclass(frozen=True)
class Preset:
    """A named set of configuration fragments."""

    name: str
    description: str
    fragments: tuple[str, ...]
    #: it is not complete by itself and is added to another preset
    addition: bool
    #: the kernel has the mutants of its variant: see :mod:`harness.build.mutants`
    mutants: bool


@dataclass(frozen=True)
class ArchFragments:
    """The configuration fragments of one architecture."""

    fragments: tuple[str, ...]
    #: fragments by page size
    page_sizes: Mapping[str, tuple[str, ...]]
    default_page_size: str


@dataclass(frozen=True)
class Configuration:
    """A configuration for one architecture, which is named by presets and a page size."""

    #: presets in the order of their definition, and the page size unless it is the default
    words: tuple[str, ...]
    #: the files, in the order in which they are merged
    fragments: tuple[Path, ...]
    #: whether the kernel has the mutants of its variant
    mutants: bool
    #: options of the fragments that the source does not have, without ``CONFIG_``
    lacks: frozenset[str]

    def __str__(self) -> str:
        return ":".join(self.words)

    def settings(self) -> list[Setting]:
        """The settings of the fragments, in order, without those of options that the source does not have.

        :raises UsageError: if a fragment has a syntax error.
        """
        return [
            setting
            for path in self.fragments
            for setting in parse_fragment(path.read_text(), f"{path.parent.name}/{path.name}")
            if setting.symbol not in self.lacks
        ]


@dataclass(frozen=True)
class KernelConfigs:
    """The contents of ``variants.toml``."""

    directory: Path
    base: tuple[str, ...]
    default_preset: str
    variants: Mapping[str, Variant]
    presets: Mapping[str, Preset]
    arches: Mapping[str, ArchFragments]
    #: by the name of a source: options of the fragments that it does not have
    lacks: Mapping[str, frozenset[str]]

    @classmethod
    def load(cls, directory: Path = paths.KERNEL_CONFIGS) -> KernelConfigs:
        """Read ``variants.toml`` of a directory, once in a process."""
        return _load(directory)

    @property
    def words(self) -> frozenset[str]:
        """The names of all presets and page sizes."""
        return frozenset(self.presets).union(*(each.page_sizes for each in self.arches.values()))

    def configuration(self, words: Sequence[str], arch: Architecture, source: str) -> Configuration:
        """The configuration that is named by presets and at most one page size.

        :param source: the name of the source.
        :raises SpecError: if the architecture has no such preset or page size, or if there are two page sizes.
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
        return Configuration(
            named,
            tuple(self.directory / f"{fragment}.config" for fragment in fragments),
            any(preset.mutants for preset in presets),
            self.lacks.get(source, frozenset()),
        )


@cache
def _load(directory: Path) -> KernelConfigs:
    data: dict[str, Any] = tomllib.loads((directory / "variants.toml").read_text())
    return KernelConfigs(
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
            name: Preset(
                name,
                each["description"],
                tuple(each["fragments"]),
                each.get("addition", False),
                each.get("mutants", False),
            )
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
        lacks={name: frozenset(each["lacks"]) for name, each in data["sources"].items()},
    )
