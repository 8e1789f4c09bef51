# SPDX-License-Identifier: GPL-2.0
"""A real source package is built, and a change of one file gives another kernel.

The configuration is the smallest one that contains the changed file, so that the build takes minutes. Source, ccache
and output directories are those in the user's cache. Kernels in the cache are not touched.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.build import builder, kconfig
from harness.build.builder import BuildRequest, BuiltKernel
from harness.build.series import Patch
from harness.build.source import PackageSource
from harness.debian.apt import Archive
from harness.errors import ConfigError, HostError, SpecError
from harness.host.cache import Cache
from harness.kernels import image_format
from harness.kernels.kernel import REQUIRED

SOURCE = PackageSource("linux-source-7.3")
pytestmark = pytest.mark.builds_kernel

SMALL = "CONFIG_64BIT=y\nCONFIG_MMU=y\nCONFIG_PRINTK=y\n" + "".join(f"CONFIG_{name}=y\n" for name in REQUIRED)


class Workshop:
    """A cache of built kernels of its own, above the user's sources."""

    def __init__(self, root: Path) -> None:
        users = Cache()
        for shared in ("apt", "ccache", "debs", "sources", "locks"):
            (users.root / shared).mkdir(parents=True, exist_ok=True)
            (root / shared).symlink_to(users.root / shared)
        self.cache = Cache(root)
        self.archive = Archive(self.cache)

    def build(self, settings: str, *patches: Patch) -> BuiltKernel:
        """A kernel with these settings and patches."""
        wanted = kconfig.merge(kconfig.parse_fragment(settings, "small.config"))
        return builder.build(BuildRequest(X86_64, SOURCE, patches, "small", wanted, "small"), self.cache, self.archive)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    try:
        builder.Toolchain.of(X86_64)
        builder.check_host()
    except HostError as error:
        pytest.skip(str(error))
    return Workshop(tmp_path_factory.mktemp("cache"))


def change(workshop: Workshop, name: str) -> Patch:
    """A patch that gives one file another byte of data."""
    store = SOURCE.store(workshop.cache)
    version = SOURCE.identify(workshop.cache, workshop.archive)
    with store.locked():
        old = store.git("show", f"{SOURCE.fetch(version, workshop.cache, workshop.archive)}:{name}").splitlines(True)
    old[-1] = old[-1].rstrip("\n") + "\n"
    new = [*old, 'const char harness_was_here[] = "harness was here";\n']
    diff = "".join(difflib.unified_diff(old, new, f"a/{name}", f"b/{name}")).encode()
    return Patch("change.patch", diff, diff)


def test_a_change_of_one_file_recompiles_one_file_and_a_hit_nothing(workshop: Workshop) -> None:
    patch = change(workshop, "mm/mremap.c")
    plain = workshop.build(SMALL)
    assert image_format.identify(plain.boot_image).arch is X86_64
    assert plain.release.startswith("7.3")

    patched = workshop.build(SMALL, patch)
    assert patched.boot_image.read_bytes() != plain.boot_image.read_bytes()
    assert patched.provenance.config_digest == plain.provenance.config_digest
    log = patched.boot_image.with_name("build.log").read_text()
    compiled = [line.split()[1] for line in log.splitlines() if line.startswith("  CC ")]
    # The decompressor of the image knows the size of what it holds.
    assert [each for each in compiled if not each.startswith("arch/x86/boot/")] == ["mm/mremap.o"]

    hit = workshop.build(SMALL, patch)
    assert hit.boot_image == patched.boot_image


def test_the_same_inputs_make_the_same_bytes(workshop: Workshop) -> None:
    first = workshop.build(SMALL)
    image, config = first.boot_image.read_bytes(), first.config.read_bytes()
    shutil.rmtree(workshop.cache.root / "builds")
    for output in SOURCE.store(workshop.cache).tree.glob("out-x86_64-*"):
        if (output / ".config").read_bytes() == config:
            shutil.rmtree(output)
    again = workshop.build(SMALL)
    assert again.boot_image.read_bytes() == image


def test_an_option_without_its_dependency_is_explained(workshop: Workshop) -> None:
    with pytest.raises(ConfigError, match=r"CONFIG_KASAN_VMALLOC=y .* became n: it depends on KASAN \[KASAN=n\]"):
        workshop.build(f"{SMALL}CONFIG_KASAN_VMALLOC=y\n")


def test_a_source_that_the_archive_does_not_have_is_refused_in_one_line() -> None:
    archive = Archive(Cache())
    with pytest.raises(SpecError) as caught:
        PackageSource("linux-source-5.99").identify(archive.cache, archive)
    assert "no longer has linux-source-5.99, but " in str(caught.value)
    assert "give a tree of that version instead" in str(caught.value)
    assert "\n" not in str(caught.value)
