# SPDX-License-Identifier: GPL-2.0
"""The kernel's own tests of mm/vma.c, which run on the host, pass with each relocate-anon series.

They are in tools/testing/vma of the kernel source. A patch of the series adds the case of a copy that is to be
relocated. The tests compile mm/vma.c with stubs for the rest of the kernel.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness.build import builder, series
from harness.build.source import PackageSource
from harness.build.variants import KernelConfigs
from harness.debian.apt import Archive
from harness.errors import HostError
from harness.host import requirements
from harness.host.cache import Cache

VARIANTS = ("relocate-anon", "relocate-anon-6.12")
NEEDED = ("mm", "lib", "include", "tools", "scripts", "arch/x86/include")


@pytest.fixture(scope="module", params=VARIANTS)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of the patched kernel source that these tests are made of."""
    if missing := [each.package for each in requirements.needed([requirements.UNIT]) if not each.found()]:
        pytest.skip(f"needs the packages {', '.join(missing)}")
    try:
        builder.check_host()
    except HostError as error:
        pytest.skip(str(error))
    cache = Cache()
    archive = Archive(cache)
    variant = KernelConfigs.load().variants[request.param]
    source = PackageSource(variant.source)
    store = source.store(cache)
    root = tmp_path_factory.mktemp("vma")
    work = root / "linux"
    work.mkdir()
    with store.locked():
        plain = source.fetch(source.identify(cache, archive), cache, archive)
        patched = store.apply(plain, [patch for path in variant.patches for patch in series.load(path)])
        store.git("checkout", patched, "--", *NEEDED, index=root / "index", work=str(work))
    return work


def run(tree: Path) -> subprocess.CompletedProcess[str]:
    """Compile and run the tests."""
    directory = tree / "tools/testing/vma"
    # The makefile of 7.3 does not know that main.c includes mm/vma.c.
    for made in ("main.o", "vma.o", "vma"):
        (directory / made).unlink(missing_ok=True)
    done = subprocess.run(["make", "-C", directory, "vma"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return subprocess.run([directory / "vma"], capture_output=True, text=True, check=False)


def test_they_pass_with_the_series(tree: Path) -> None:
    done = run(tree)
    assert done.returncode == 0, done.stderr
    assert ", 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("\t\t*relocate = false;\n", ""),
        ("vmg.prev == src ? NULL : vmg.prev", "vmg.prev"),
        ("vmg.next == src ? NULL : vmg.next", "vmg.next"),
        ("if (*relocate) {", "if (0) {"),
        ("\t\t\tnew_vma->anon_vma = NULL;\n", ""),
    ],
    ids=["merged", "previous-is-source", "next-is-source", "page-offset", "anon-vma"],
)
def test_they_fail_without_parts_of_it(tree: Path, right: str, wrong: str) -> None:
    file = tree / "mm/vma.c"
    text = file.read_text()
    assert text.count(right) == 1
    file.write_text(text.replace(right, wrong))
    try:
        done = run(tree)
    finally:
        file.write_text(text)
    assert "Test copy_vma_relocate FAILED" in done.stderr, done.stdout
