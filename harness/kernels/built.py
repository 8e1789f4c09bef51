# SPDX-License-Identifier: GPL-2.0
"""Kernels that are built here."""

from __future__ import annotations

from dataclasses import dataclass

from harness.build import builder, kconfig, series
from harness.build.naming import Formula
from harness.debian.apt import Archive
from harness.host.cache import Cache, sha256
from harness.kernels import image_format
from harness.kernels.kernel import BootSpec, Kernel, Provenance, check_config, read_config


@dataclass(frozen=True)
class BuildSpec(BootSpec):
    """A kernel that is built here."""

    formula: Formula

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`; takes minutes where it is not cached.

        :raises BuildError: if it cannot be built.
        """
        named = self.formula
        request = builder.Request(
            arch=self.arch,
            source=named.source,
            patches=tuple(patch for path in named.series for patch in series.load(path)),
            flavour=str(named.flavour),
            wanted=kconfig.merge(named.flavour.settings()),
            label=self.label,
        )
        built = builder.build(request, cache, archive)
        config = read_config(built.config)
        check_config(self, config)
        return Kernel(
            spec=self,
            arch=self.arch,
            release=built.release,
            image=image_format.bootable(built.image, cache),
            config=config,
            modules=None,  # no configuration of ours makes any
            vmlinux=built.vmlinux,
            provenance=Provenance(
                "build", built.recipe.source, built.release, sha256(built.image), recipe=built.recipe
            ),
        )
