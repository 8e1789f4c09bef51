# SPDX-License-Identifier: GPL-2.0
"""Kernels that the harness builds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from harness.arch import Architecture
from harness.build import builder, kconfig, mutants, naming, schemata, series
from harness.build.mutants import Mutants
from harness.build.naming import BuildName
from harness.debian.apt import Archive
from harness.host.cache import Cache, sha256
from harness.kernels import image_format
from harness.kernels.kernel import BootSpec, Kernel, Provenance, as_label, check_config, read_config
from harness.options import BuildOptions


@dataclass(frozen=True)
class BuildSpec(BootSpec):
    """A kernel that the harness builds."""

    name: BuildName
    is_built: ClassVar[bool] = True

    def resolve(self, cache: Cache, archive: Archive) -> Kernel:
        """See :meth:`BootSpec.resolve`. Takes minutes if the kernel is not cached.

        :raises BuildError: if the kernel cannot be built.
        """
        built = builder.build(self._request(), cache, archive)
        config = read_config(built.config)
        check_config(self, config)
        return Kernel(
            spec=self,
            arch=self.arch,
            release=built.release,
            boot_image=image_format.bootable(built.boot_image, cache),
            config=config,
            modules=None,  # the configurations in kernel_configs/ build none
            vmlinux=built.vmlinux,
            provenance=Provenance(
                "build", built.provenance.source, built.release, sha256(built.boot_image), build=built.provenance
            ),
        )

    def identify(self, cache: Cache, archive: Archive) -> str:
        """See :meth:`BootSpec.identify`; builds nothing."""
        return builder.identify(self._request(), cache, archive)

    def check_mutant(self, name: str) -> None:
        """See :meth:`BootSpec.check_mutant`."""
        if (has := self.mutants()) is None:
            super().check_mutant(name)
        elif name != schemata.RECORD:
            has.find(name)

    def mutants(self) -> Mutants | None:
        """The mutants that the kernel has; None if it has none.

        :raises UsageError: if their files have an error, or if there are none for this kernel.
        """
        return mutants.load(self.name.variant) if self.name.configuration.mutants else None

    def _request(self) -> builder.BuildRequest:
        named = self.name
        return builder.BuildRequest(
            arch=self.arch,
            source=named.source,
            patches=tuple(patch for path in named.series for patch in series.load(path)),
            mutants=self.mutants(),
            configuration=str(named.configuration),
            wanted=kconfig.merge(named.configuration.settings()),
            label=self.label,
        )


def parse_built(text: str, arch: Architecture, options: BuildOptions) -> BuildSpec | None:
    """Parse the name of a kernel that the harness builds: see :func:`harness.build.naming.parse`.

    :returns: None if it is not the name of one.
    :raises SpecError: if a part of the name is unknown.
    """
    if (found := naming.parse(text, arch, options)) is None:
        return None
    return BuildSpec(found.text, as_label(f"{found.label}-{arch}"), arch, found)
