# SPDX-License-Identifier: GPL-2.0
"""``--kernel`` is parsed without a network, and each kind of local file or tree resolves to a kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from harness import arch
from harness.arch import ARCHITECTURES, ARM64, RISCV64, X86_64, Architecture
from harness.debian import deb
from harness.debian.apt import Archive
from harness.debian.apt_root import Package
from harness.debian.suites import ALIASES, suites
from harness.debian.version import version_key
from harness.errors import SpecError
from harness.host.cache import Cache
from harness.kernels.debian import DebianSpec, DebSpec, parse_debian
from harness.kernels.grammar import parse, parse_all
from harness.kernels.kernel import BootSpec, Kernel, Provenance, SshSpec
from harness.kernels.local import ImageSpec, TreeSpec
from tests.kernel_files import CONFIG, IMAGES, build_deb, build_tree, fill, ko


def resolve(text: str, tmp_path: Path, wanted: Architecture | None = None) -> Kernel:
    spec = parse(text, wanted)
    assert isinstance(spec, BootSpec)
    cache = Cache(tmp_path / "cache")
    return spec.resolve(cache, Archive(cache))


# The grammar


@pytest.mark.parametrize(
    ("text", "version", "in_suites", "label"),
    [
        ("debian:6.12", ("6", "12"), (), "debian:6.12-arm64"),
        ("debian:7.3.4", ("7", "3", "4"), (), "debian:7.3.4-arm64"),
        ("debian:trixie-backports", (), ("trixie-backports",), "debian:trixie-backports-arm64"),
        ("debian:stable", (), ("trixie", "trixie-security"), "debian:stable-arm64"),
        ("debian:", (), ("trixie", "trixie-security"), "debian:stable-arm64"),
        ("debian:unstable", (), ("sid",), "debian:unstable-arm64"),
    ],
)
def test_debian_kernels_are_named_by_version_or_suite(
    text: str, version: tuple[str, ...], in_suites: tuple[str, ...], label: str
) -> None:
    assert parse(text, ARM64) == DebianSpec(text, label, ARM64, version, in_suites)


# the package of each architecture whose kernel is taken
TAKEN = {X86_64: "cloud-amd64", ARM64: "cloud-arm64", RISCV64: "riscv64"}


@pytest.mark.parametrize("chosen", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("version", ["9.1.2+deb15", "9.1.0-30", "9.1~rc2"])
def test_of_debians_kernels_that_for_virtual_machines_is_taken_where_there_is_one(
    chosen: Architecture, version: str
) -> None:
    others = {f"{TAKEN[chosen]}-dbg", f"rt-{chosen.debian}", f"{TAKEN[chosen]}-unsigned", chosen.debian, "cloud-i386"}
    names = [f"linux-image-{version}-{flavour}" for flavour in (others | {TAKEN[chosen]})]
    spec = parse_debian("debian:9.1", chosen)
    fitting = [each for each in names if spec._fits(Package(each, "9.1.2-1", chosen.debian, "trixie", "", ""))]
    assert fitting == [f"linux-image-{version}-{TAKEN[chosen]}"]


def test_debian_kernels_are_for_this_host_unless_asked_otherwise() -> None:
    spec = parse("debian:6.12")
    assert spec.arch is arch.host()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ssh://board", SshSpec("ssh://board", "ssh-board", "root", "board", 22, None)),
        ("ssh://me@board:2222", SshSpec("ssh://me@board:2222", "ssh-board-2222", "me", "board", 2222, None)),
        ("ssh://[::1]", SshSpec("ssh://[::1]", "ssh-:1", "root", "::1", 22, None)),
    ],
)
def test_machines_are_named_by_ssh_address(text: str, expected: SshSpec) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "unknown kernel ''"),
        ("fedora:42", "unknown kernel 'fedora:42': give debian:VERSION"),
        ("debian:7.x", "'debian:7.x' is no kernel version"),
        ("debian:6.12.", "'debian:6.12.' is no kernel version"),
        ("debian:hamm-backports", "Debian has no suite 'hamm-backports'"),
        ("debian:sid-backports", "Debian has no suite 'sid-backports'"),
        ("debian:../..", "Debian has no suite"),
        ("ssh://", "is no SSH address"),
        ("ssh://board:none", "is no SSH address"),
        ("ssh://me:secret@board", "keys, no password"),
        ("/nowhere/bzImage", "there is no file or directory /nowhere/bzImage"),
        ("~/nowhere", "there is no file or directory /"),
    ],
)
def test_what_names_nothing_is_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_are_safe_in_test_ids(tmp_path: Path) -> None:
    path = tmp_path / "my [odd] dir :: linux"
    build_tree(path, X86_64)
    assert parse(str(path)).label == "my-odd-dir-:-linux-x86_64"


def test_repeated_kernels_are_taken_once_and_labels_are_unique(tmp_path: Path) -> None:
    trees = [str(build_tree(tmp_path / name / "linux", X86_64)) for name in "ab"]
    specs = parse_all([trees[0], trees[1], trees[0]])
    assert [spec.label for spec in specs] == ["linux-x86_64", "linux-x86_64-2"]


def test_parsing_touches_neither_network_nor_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is run at all: there is none to be found."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parse_all(["debian:6.12", "debian:trixie-backports", "ssh://board", str(build_tree(tmp_path / "linux", X86_64))])
    assert [path.name for path in tmp_path.iterdir()] == ["linux"]


# Build trees


@pytest.mark.parametrize("built", [X86_64, ARM64], ids=str)
def test_a_build_tree_is_a_kernel_with_config_modules_and_symbols(tmp_path: Path, built: Architecture) -> None:
    path = build_tree(tmp_path / "linux", built)
    kernel = resolve(str(path), tmp_path)
    assert isinstance(kernel.spec, TreeSpec)
    assert (kernel.spec.label, kernel.arch, kernel.release) == (f"linux-{built}", built, "9.1.2-tree")
    assert kernel.boot_image == path / built.tree_image
    assert kernel.vmlinux == path / "vmlinux"
    assert kernel.modules is not None
    assert (list(kernel.modules.files), set(kernel.modules.builtin)) == (["zram"], {"virtio_pci"})
    assert kernel.has("KSM")
    assert kernel.has("CONFIG_KSM")
    assert not kernel.has("NUMA")
    assert str(path) in str(kernel.provenance)


def test_arch_chooses_in_a_tree_built_for_both(tmp_path: Path) -> None:
    path = str(build_tree(tmp_path / "linux", X86_64, ARM64))
    assert parse(path, ARM64).arch is ARM64
    assert parse(path).arch is arch.host()


def test_a_tree_that_is_not_built_says_how_to_build_it(tmp_path: Path) -> None:
    path = build_tree(tmp_path / "linux")
    with pytest.raises(
        SpecError, match=r"linux has no arch/arm64/boot/Image: build it first with make, or with --build$"
    ):
        parse(str(path), ARM64)
    with pytest.raises(SpecError, match="build it first with make"):
        parse(str(path))


def test_a_tree_built_for_another_architecture_says_which(tmp_path: Path) -> None:
    path = build_tree(tmp_path / "linux", X86_64)
    with pytest.raises(SpecError, match=r"has no arch/arm64/boot/Image: .*; it is built for x86_64"):
        parse(str(path), ARM64)


def test_a_directory_that_is_no_tree_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no kernel build tree"):
        parse(str(tmp_path))


def test_a_kernel_that_cannot_unpack_an_initramfs_is_refused(tmp_path: Path) -> None:
    config = CONFIG.replace("CONFIG_BLK_DEV_INITRD=y", "# CONFIG_BLK_DEV_INITRD is not set")
    path = build_tree(tmp_path / "linux", X86_64, config=config)
    with pytest.raises(SpecError, match=r"cannot unpack the initramfs .*: set CONFIG_BLK_DEV_INITRD=y"):
        resolve(str(path), tmp_path)


# Images


def test_the_architecture_is_detected_from_an_image(tmp_path: Path) -> None:
    fill({tmp_path / "a": IMAGES[X86_64], tmp_path / "b": IMAGES[ARM64]})
    specs = [parse(str(tmp_path / name)) for name in "ab"]
    assert [(type(spec), spec.arch, spec.label) for spec in specs] == [
        (ImageSpec, X86_64, "a-x86_64"),
        (ImageSpec, ARM64, "b-arm64"),
    ]


def test_an_image_for_another_architecture_is_refused(tmp_path: Path) -> None:
    fill({tmp_path / "bzImage": IMAGES[X86_64]})
    with pytest.raises(SpecError, match="bzImage is a kernel for x86_64, but --arch=arm64 was asked for"):
        parse(str(tmp_path / "bzImage"), ARM64)


def test_a_file_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    fill({tmp_path / "notes": "Dear diary"})
    with pytest.raises(SpecError, match="notes is no kernel image: it starts with the text 'Dear diary'"):
        parse(str(tmp_path / "notes"))


def test_an_image_alone_is_a_kernel_without_modules(tmp_path: Path) -> None:
    fill({tmp_path / "Image": IMAGES[ARM64]})
    kernel = resolve(str(tmp_path / "Image"), tmp_path)
    assert (kernel.release, kernel.modules, kernel.vmlinux) == ("9.1.2-test", None, None)
    assert kernel.config == {}


def test_an_image_inside_a_tree_brings_the_tree(tmp_path: Path) -> None:
    path = build_tree(tmp_path / "linux", X86_64)
    kernel = resolve(str(path / X86_64.tree_image), tmp_path)
    assert (kernel.release, kernel.vmlinux) == ("9.1.2-tree", path / "vmlinux")
    assert kernel.has("KSM")
    assert kernel.spec.text == str(path / X86_64.tree_image)


def test_an_installed_image_brings_config_and_modules(tmp_path: Path) -> None:
    fill(
        {
            tmp_path / "boot/vmlinuz-9.1.2-test": IMAGES[X86_64],
            tmp_path / "boot/config-9.1.2-test": CONFIG,
            tmp_path / "lib/modules/9.1.2-test/kernel/zram.ko": ko(),
        }
    )
    kernel = resolve(str(tmp_path / "boot/vmlinuz-9.1.2-test"), tmp_path)
    assert kernel.has("KSM")
    assert kernel.modules is not None
    assert list(kernel.modules.files) == ["zram"]


# Packages


def test_a_package_of_one_piece_is_a_kernel(tmp_path: Path) -> None:
    path = build_deb(
        tmp_path,
        "linux-image-9.1.2-cloud-amd64",
        {
            "boot/vmlinuz-9.1.2-cloud-amd64": IMAGES[X86_64],
            "boot/config-9.1.2-cloud-amd64": CONFIG,
            "boot/System.map-9.1.2-cloud-amd64": "0 A x",
            "usr/lib/modules/9.1.2-cloud-amd64/kernel/zram.ko": ko(),
            "usr/lib/modules/9.1.2-cloud-amd64/dtb/board.dtb": "not for us",
            "usr/share/doc/readme": "not for us",
        },
    )
    kernel = resolve(str(path), tmp_path)
    assert isinstance(kernel.spec, DebSpec)
    assert (kernel.release, kernel.boot_image.read_bytes()) == ("9.1.2-cloud-amd64", IMAGES[X86_64])
    assert kernel.has("KSM")
    assert kernel.modules is not None
    assert list(kernel.modules.files) == ["zram"]
    assert kernel.provenance.package == "linux-image-9.1.2-cloud-amd64"
    unpacked = sorted(path.name for path in kernel.boot_image.parent.rglob("*") if path.is_file())
    assert unpacked == ["System.map", "config", "image", "zram.ko"]


def test_a_package_in_pieces_is_put_together_from_those_beside_it(tmp_path: Path) -> None:
    modules = "usr/lib/modules/9.1.2-cloud-arm64"
    path = build_deb(tmp_path, "linux-binary-9.1.2-cloud-arm64", {f"{modules}/vmlinuz": IMAGES[ARM64]}, "arm64")
    build_deb(tmp_path, "linux-modules-9.1.2-cloud-arm64", {f"{modules}/kernel/zram.ko": ko()}, "arm64")
    build_deb(tmp_path, "linux-base-9.1.2-cloud-arm64", {f"{modules}/config": CONFIG}, "arm64")
    kernel = resolve(str(path), tmp_path)
    assert (kernel.arch, kernel.boot_image.read_bytes()) == (ARM64, IMAGES[ARM64])
    assert kernel.has("KSM")
    assert kernel.modules is not None
    assert list(kernel.modules.files) == ["zram"]


def test_a_package_that_only_points_elsewhere_is_refused(tmp_path: Path) -> None:
    path = build_deb(tmp_path, "linux-image-9.1.2-cloud-amd64", {"usr/share/doc/readme": "x"})
    with pytest.raises(SpecError, match="contains no boot image"):
        resolve(str(path), tmp_path)


def test_a_package_that_is_no_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no kernel package but hello"):
        parse(str(build_deb(tmp_path, "hello", {"usr/share/doc/readme": "x"})))


def test_a_package_for_another_architecture_is_refused(tmp_path: Path) -> None:
    path = build_deb(tmp_path, "linux-image-9.1.2-amd64", {"boot/vmlinuz-9.1.2": IMAGES[X86_64]})
    with pytest.raises(SpecError, match="is a kernel for x86_64, but --arch=arm64"):
        parse(str(path), ARM64)


def test_a_package_that_ends_early_is_refused_and_not_cached(tmp_path: Path) -> None:
    path = build_deb(tmp_path, "linux-image-9.1.2-amd64", {"boot/vmlinuz-9.1.2": IMAGES[X86_64] * 50})
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(SpecError, match="is not a whole Debian package"):
        resolve(str(path), tmp_path)
    assert list((tmp_path / "cache/kernels").iterdir()) == []


def test_a_package_is_unpacked_whole_or_refused(tmp_path: Path) -> None:
    path = build_deb(tmp_path, "libhello-dev", {"usr/include/hello.h": b"hello" * 500})
    deb.unpack(path, tmp_path / "sysroot")
    assert (tmp_path / "sysroot/usr/include/hello.h").read_bytes() == b"hello" * 500
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpecError, match="is not a whole Debian package"):
        deb.unpack(path, tmp_path / "other")


def test_a_file_that_only_calls_itself_a_package_is_refused(tmp_path: Path) -> None:
    fill({tmp_path / "x.deb": "hello"})
    with pytest.raises(SpecError, match=r"x\.deb is not a Debian package"):
        parse(str(tmp_path / "x.deb"))


# Debian's ordering


VERSIONS = [
    "1.0~~", "1.0~~a", "1.0~", "1.0~rc1-1", "1.0", "1.0-1~bpo13+1", "1.0-1", "1.0-1+b1", "1.0-1.1", "1.0-10", "1.0a",
    "1.0+", "1.0.1-1", "6.1.192-2", "6.12.95-1~bpo12+1", "6.12.117-1", "7.3.4-1~bpo13+1", "7.3.4-1", "1:0.1",
]  # fmt: skip


def test_versions_are_ordered_as_dpkg_orders_them() -> None:
    def dpkg_says(left: str, right: str) -> bool:
        return subprocess.run(["dpkg", "--compare-versions", left, "lt", right], check=False).returncode == 0

    for left in VERSIONS:
        for right in VERSIONS:
            assert (version_key(left) < version_key(right)) == dpkg_says(left, right), f"{left} < {right}"


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_means_what_its_code_name_means(alias: str) -> None:
    assert suites(alias) == suites(ALIASES[alias])


def test_an_alias_may_have_backports() -> None:
    assert suites("stable-backports") == suites("trixie-backports") == ("trixie-backports",)


@pytest.mark.parametrize(
    ("source", "packaged", "release", "version"),
    [
        ("debian", "6.1.192-1", "6.1.0-56-cloud-amd64", "6.1.192"),
        ("debian", "6.12.118-1", "6.12.118+deb13-cloud-amd64", "6.12.118"),
        ("deb", "7.3~rc2-1~exp1", "7.3-rc2-amd64", "7.3"),
        ("tree", "6.19.0-rc3+", "6.19.0-rc3+", "6.19.0"),
        ("build", "7.3.4-relocate", "7.3.4-relocate", "7.3.4"),
        ("image", "nonsense", "nonsense", "nonsense"),
    ],
)
def test_the_upstream_version_is_known_where_the_release_hides_it(
    source: str, packaged: str, release: str, version: str
) -> None:
    spec = parse_debian("debian:9.1", X86_64)
    provenance = Provenance(source, "a package", packaged, "")
    assert Kernel(spec, X86_64, release, Path("image"), {}, None, None, provenance).version == version
