# SPDX-License-Identifier: GPL-2.0
"""The kernels that ``kernel_configs/variants.toml`` defines, and what fragments ask of each source."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.build.naming import BuildName, parse
from harness.build.variants import KernelConfigs
from harness.options import BuildOptions
from harness.paths import KERNEL_CONFIGS


def named(text: str) -> BuildName:
    name = parse(text, X86_64, BuildOptions())
    assert name is not None
    return name


def symbols(text: str) -> set[str]:
    """The options that the configuration of a kernel sets."""
    return {each.symbol for each in named(text).configuration.settings()}


def test_an_option_that_a_source_does_not_have_is_not_asked_of_it() -> None:
    for text in ("unpatched-6.12", "relocate-anon-6.12:debug", "linux-source-6.12"):
        assert symbols("unpatched:debug") - symbols(text) >= {"NUMA_MIGRATION"}
    assert symbols("unpatched") - symbols("unpatched-6.12") == {"NUMA_MIGRATION"}


def test_without_the_table_of_its_source_it_would_be_asked_for(tmp_path: Path) -> None:
    shutil.copytree(KERNEL_CONFIGS, tmp_path / "configs")
    file = tmp_path / "configs/variants.toml"
    file.write_text(file.read_text().replace('lacks = ["NUMA_MIGRATION"]', "lacks = []"))
    definitions = KernelConfigs.load(tmp_path / "configs")
    settings = definitions.configuration((), X86_64, "linux-source-6.12").settings()
    assert "NUMA_MIGRATION" in {each.symbol for each in settings}


def test_what_a_source_lacks_is_in_a_fragment() -> None:
    text = "".join(each.read_text() for each in KERNEL_CONFIGS.rglob("*.config"))
    for source, options in KernelConfigs.load().lacks.items():
        for option in options:
            assert f"CONFIG_{option}=" in text, f"{source} lacks {option}, which no fragment asks for"


@pytest.mark.parametrize("suffix", ["", "-6.12"])
def test_the_kernels_of_a_pair_differ_in_their_patches_only(suffix: str) -> None:
    plain, patched = named(f"unpatched{suffix}"), named(f"relocate-anon{suffix}")
    assert plain.source == patched.source
    assert plain.configuration == patched.configuration
    assert (plain.series, patched.series) == ((), (KERNEL_CONFIGS / f"patches/relocate-anon{suffix}",))
