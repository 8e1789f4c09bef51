# SPDX-License-Identifier: GPL-2.0
"""Debian kernels are found, verified, fetched and cached, from a small archive made here and from the real one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness.arch import ARM64, X86_64, Architecture
from harness.audit import debuginfo
from harness.deadline import Deadline
from harness.debian import deb
from harness.debian.apt import Archive
from harness.debian.mirror import KEYRING, KEYRING_VARIABLE, MIRROR_VARIABLE, Mirror, host_mirror
from harness.errors import FetchError, HostError, SpecError
from harness.host.cache import Cache
from harness.kernels import modules
from harness.kernels.grammar import parse
from harness.kernels.kernel import BootSpec, Kernel
from tests.integration.debian_archive import Server, kernel_deb, split_kernel
from tests.kernel_files import build_deb
from tests.lab import wait_until

REAL_KERNELS = ("debian:6.12", "debian:6.18", "debian:7.3", "debian:trixie-backports")
#: run as its own process, so that it can be killed or race another
RESOLVE = """
import sys
from pathlib import Path
from harness import arch
from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels import grammar
cache = Cache(Path(sys.argv[1]))
print(grammar.parse(sys.argv[3], arch.X86_64).resolve(cache, Archive(cache, sys.argv[2])).release)
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    gpgconf = shutil.which("gpgconf")
    if not gpgconf:
        pytest.skip("needs gpg to sign an archive: install the package gnupg")
    for variable in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    # Sockets of gpg-agent have short paths, those of pytest's directories are long.
    gnupg = Path("/tmp") / f"mremap-test-{tmp_path.name[-20:]}-{time.time_ns()}"
    gnupg.mkdir(mode=0o700)
    server = Server(tmp_path / "www", gnupg)
    server.directory.mkdir()
    server.gpg("--passphrase", "", "--quick-generate-key", "test@localhost", "ed25519", "sign", "never")
    server.gpg("--output", str(server.keyring), "--export")
    monkeypatch.setenv(KEYRING_VARIABLE, str(server.keyring))
    yield server
    server.stop()
    subprocess.run([gpgconf, "--homedir", str(gnupg), "--kill", "all"], check=False, capture_output=True)
    shutil.rmtree(gnupg, ignore_errors=True)


@dataclass
class Client:
    """A cache and an archive on the server, and what they said."""

    server: Server
    root: Path
    said: list[str] = field(default_factory=list)

    def resolve(self, text: str, arch: Architecture = X86_64) -> Kernel:
        cache = Cache(self.root, self.said.append)
        spec = parse(text, arch)
        assert isinstance(spec, BootSpec)
        return spec.resolve(cache, Archive(cache, self.server.uri, self.said.append))

    def process(self, text: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RESOLVE, str(self.root), self.server.uri, text]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.fixture
def client(server: Server, tmp_path: Path) -> Client:
    return Client(server, tmp_path / "cache")


# Choosing


def test_a_version_prefix_is_matched_by_components_and_the_newest_wins(client: Client, tmp_path: Path) -> None:
    versions = ["9.1.9-1", "9.1.10-1", "9.10.1-1", "9.12.2-1", "9.1.11-1~bpo13+1"]
    client.server.publish("trixie", *(kernel_deb(tmp_path, version) for version in versions[:-1]))
    client.server.publish("trixie-backports", kernel_deb(tmp_path, versions[-1]))
    chosen = {text: client.resolve(f"debian:{text}").provenance.version for text in ("9.1", "9.1.9", "9", "9.10")}
    assert chosen == {"9.1": "9.1.11-1~bpo13+1", "9.1.9": "9.1.9-1", "9": "9.12.2-1", "9.10": "9.10.1-1"}
    assert client.resolve("debian:trixie").provenance.version == "9.12.2-1"
    assert client.resolve("debian:trixie-backports").provenance.version == "9.1.11-1~bpo13+1"


def test_only_cloud_kernels_of_the_wanted_architecture_are_taken(client: Client, tmp_path: Path) -> None:
    packages = [kernel_deb(tmp_path, "9.1.1-1"), kernel_deb(tmp_path, "9.1.2-1", ARM64)]
    packages += [kernel_deb(tmp_path, "9.1.3-1", flavour="rt"), kernel_deb(tmp_path, "9.1.4-1", flavour="cloud-dbg")]
    client.server.publish("trixie", *packages)
    assert client.resolve("debian:9.1").release == "9.1.1-cloud-amd64"
    assert client.resolve("debian:9.1", ARM64).release == "9.1.2-cloud-arm64"


def test_security_updates_of_a_release_come_with_it(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.server.publish("trixie-security", kernel_deb(tmp_path, "9.1.2-1"))
    assert client.resolve("debian:stable").release == "9.1.2-cloud-amd64"


def test_a_kernel_in_pieces_is_put_together(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", *split_kernel(tmp_path, "9.3.4-1~bpo13+1"))
    kernel = client.resolve("debian:9.3")
    assert kernel.release == "9.3.4-cloud-amd64"
    assert kernel.has("KSM")
    assert [module.name for module in modules.select(kernel.modules, {})] == ["zram"]
    assert kernel.provenance.package == "linux-binary-9.3.4-cloud-amd64"


def test_a_whole_kernel_comes_before_a_newer_one_in_pieces_that_are_gone(client: Client, tmp_path: Path) -> None:
    newer = [path for path in split_kernel(tmp_path, "9.3.5-1") if "modules" not in path.name]
    client.server.publish("trixie", *split_kernel(tmp_path, "9.3.4-1"), *newer)
    assert client.resolve("debian:9.3").release == "9.3.4-cloud-amd64"
    kernel = client.resolve("debian:9.3.5")
    assert kernel.provenance.missing == ("linux-modules-9.3.5-cloud-amd64",)
    assert any("no longer lists linux-modules-9.3.5-cloud-amd64" in line for line in client.said)


def test_an_unknown_version_names_the_nearest(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", *(kernel_deb(tmp_path, version) for version in ("9.1.1-1", "9.3.1-1")))
    with pytest.raises(SpecError, match=r"^Debian has no kernel 9\.2 for x86_64: the nearest are 9\.1\.1, 9\.3\.1$"):
        client.resolve("debian:9.2")


def test_debug_information_comes_from_the_suite_that_has_the_kernels_version(client: Client, tmp_path: Path) -> None:
    name, version = "linux-image-9.1.2-cloud-amd64-dbg", "9.1.2-1~bpo13+1"
    debug = build_deb(tmp_path, name, {"usr/lib/debug/boot/vmlinux-9.1.2": "x"}, version=version)
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.server.publish("trixie-backports", kernel_deb(tmp_path, version), debug)
    archive = Archive(Cache(client.root), client.server.uri)
    kernel = client.resolve("debian:9.1.2")
    assert debuginfo._fetch(archive, kernel, name, version).name == f"{name}_{version}_amd64.deb"
    with pytest.raises(FetchError, match=r"trixie-backports cannot satisfy linux-image-9\.1\.2-nonesuch-dbg="):
        debuginfo._fetch(archive, kernel, "linux-image-9.1.2-nonesuch-dbg", version)
    with pytest.raises(FetchError, match=r"cannot be had: no suite has it$"):
        debuginfo._fetch(archive, kernel, name, "9.1.3-1")


# Trust


def test_a_tampered_package_is_refused_and_not_cached(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    (package,) = (client.server.directory / "debian/pool").iterdir()
    data = bytearray(package.read_bytes())
    data[-1] ^= 1
    package.write_bytes(data)
    with pytest.raises(FetchError, match=r"^linux-image-9\.1\.1-cloud-amd64 cannot be .* Hash Sum") as e:
        client.resolve("debian:9.1")
    assert "\n" not in str(e.value)
    assert not list(client.root.glob("debs/*"))
    assert not list(client.root.glob("kernels/*"))


def test_a_tampered_index_is_refused(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    inrelease = client.server.directory / "debian/dists/trixie/InRelease"
    inrelease.write_text(inrelease.read_text().replace("Origin: Test", "Origin: Evil"))
    with pytest.raises(FetchError, match="the signature of trixie does not verify"):
        client.resolve("debian:9.1")


def test_an_unsigned_index_is_refused(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"), sign=False)
    with pytest.raises(FetchError, match="the signature of trixie does not verify"):
        client.resolve("debian:9.1")


def test_an_index_signed_by_somebody_else_is_refused(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.server.publish("trixie")
    if not KEYRING.exists():
        pytest.skip("needs the keys of the Debian archive: install the package debian-archive-keyring")
    monkeypatch.setenv(KEYRING_VARIABLE, str(KEYRING))
    with pytest.raises(FetchError, match="the signature of trixie does not verify"):
        client.resolve("debian:9.1")


def test_an_expired_suite_is_an_error_if_asked_for_and_else_left_out(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.server.publish("sid", kernel_deb(tmp_path, "9.2.1-1"), valid_until="Fri, 02 Jan 2026 00:00:00 UTC")
    with pytest.raises(FetchError, match="the Release file of sid has expired"):
        client.resolve("debian:unstable")
    with pytest.raises(SpecError, match=r"Debian has no kernel 9\.2"):
        client.resolve("debian:9.2")
    assert client.resolve("debian:9.1").release == "9.1.1-cloud-amd64"


def test_unreleased_suites_are_searched_last(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.server.publish("sid", kernel_deb(tmp_path, "9.1.2-1"), kernel_deb(tmp_path, "9.2.1-1"))
    assert client.resolve("debian:9.1").release == "9.1.1-cloud-amd64"
    assert not any("/sid/" in path for path in client.server.requests)
    assert client.resolve("debian:9.2").release == "9.2.1-cloud-amd64"


# Cache and faults


def test_a_cached_kernel_needs_no_network_and_no_apt(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    first = client.resolve("debian:9.1")
    client.server.requests.clear()
    monkeypatch.setenv("PATH", "")
    assert client.resolve("debian:9.1").boot_image == first.boot_image
    assert client.server.requests == []


def test_a_stale_index_serves_while_the_network_is_away(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.resolve("debian:trixie")
    client.server.stop()
    _age(client.root)
    client.said.clear()
    assert client.resolve("debian:trixie").release == "9.1.1-cloud-amd64"
    assert any("using the index of trixie from" in line for line in client.said)


def test_no_network_and_nothing_cached_is_one_line(client: Client) -> None:
    client.server.stop()
    with pytest.raises(FetchError, match="the index of trixie cannot be fetched") as caught:
        client.resolve("debian:trixie")
    assert "\n" not in str(caught.value)


def test_an_old_index_is_fetched_again(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.resolve("debian:trixie")
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.2-1"))
    assert client.resolve("debian:trixie").release == "9.1.1-cloud-amd64"
    _age(client.root)
    assert client.resolve("debian:trixie").release == "9.1.2-cloud-amd64"


def _age(root: Path) -> None:
    """Make every index look two days old."""
    for stamp in root.glob("apt/*/refreshed"):
        os.utime(stamp, (time.time() - 2 * 86400,) * 2)


def test_a_corrupted_kernel_is_unpacked_again_and_a_corrupted_package_fetched_again(
    client: Client, tmp_path: Path
) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    kernel = client.resolve("debian:9.1")
    whole = kernel.boot_image.read_bytes()
    (package,) = client.root.glob("debs/*/*.deb")
    for path in (kernel.boot_image, package):
        path.write_bytes(bytes(path.stat().st_size))
    client.server.requests.clear()
    assert client.resolve("debian:9.1").boot_image.read_bytes() == whole
    assert any("corrupted in the cache" in line for line in client.said)
    assert [Path(path).name for path in client.server.requests] == [package.name]


def test_two_runs_at_once_on_a_cold_cache_fetch_once(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    runs = [client.process("debian:trixie") for _ in range(2)]
    assert [run.communicate(timeout=120)[0] for run in runs] == ["9.1.1-cloud-amd64\n"] * 2
    assert sum(path.endswith(".deb") for path in client.server.requests) == 1
    assert sum(path.endswith("trixie/InRelease") for path in client.server.requests) == 1


def test_a_download_cut_short_by_a_kill_leaves_no_half_file(client: Client, tmp_path: Path) -> None:
    client.server.publish("trixie", kernel_deb(tmp_path, "9.1.1-1"))
    client.server.stall.set()
    with client.process("debian:trixie") as run:
        assert client.server.stalled.wait(60)
        assert _apt_processes(client.root)
        run.send_signal(signal.SIGKILL)
    wait_until(lambda: not _apt_processes(client.root), "the kernel to end apt with its parent", seconds=10)
    assert not list(client.root.glob("debs/*"))
    client.server.stall.clear()
    # The next run neither waits for the dead one nor takes what it left.
    started = Deadline.after(30)
    assert client.resolve("debian:trixie").boot_image.read_bytes().endswith(b"9.1.1-1")
    assert not started.passed
    assert not list(client.root.glob("*/.new-*"))
    assert not list(client.root.glob("apt/*/download"))


def _apt_processes(root: Path) -> list[str]:
    """The processes that use an apt root below ``root``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"APT_CONFIG={root}".encode() in (process / "environ").read_bytes():
                found.append(process.name)
    return found


def test_the_packages_to_install_come_with_what_they_depend_on(client: Client, tmp_path: Path) -> None:
    packages = [
        build_deb(tmp_path, "tool", {"usr/bin/tool": "x"}, depends="library (>= 9), data"),
        build_deb(tmp_path, "library", {"usr/lib/library": "x"}),
        build_deb(tmp_path, "data", {"usr/share/data": "x"}),
        build_deb(tmp_path, "other", {"usr/bin/other": "x"}),
        build_deb(tmp_path, "tool", {"usr/bin/tool": "x"}, "arm64"),
    ]
    client.server.publish("trixie", *packages)
    archive = Archive(Cache(client.root), client.server.uri)
    names = [path.name.partition("_")[0] for path in archive.install_set(["tool"], X86_64)]
    assert sorted(names) == ["data", "library", "tool"]
    assert names.index("library") < names.index("tool")
    without = archive.install_set(["tool"], X86_64, without=["data"])
    assert sorted(path.name.partition("_")[0] for path in without) == ["library", "tool"]
    (arm,) = archive.install_set(["tool"], ARM64)
    assert deb.control(arm)["Architecture"] == "arm64"
    with pytest.raises(FetchError, match="trixie cannot satisfy nonesuch for amd64"):
        archive.install_set(["nonesuch"], X86_64)


# The host's own configuration


def test_a_host_without_apt_is_told_what_it_needs(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest's userland needs apt too, so giving the kernel as a file would not be enough."""
    monkeypatch.setenv("PATH", "")
    advice = "use a Debian or Ubuntu host, or give the kernel as a file, and the guest's userland with --userland=FILE"
    with pytest.raises(HostError, match=rf"this host has no apt-config, .*: {advice}$"):
        client.resolve("debian:9.1")


def test_a_host_without_the_keys_is_told_which_package_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYRING_VARIABLE, "/nowhere.gpg")
    with pytest.raises(HostError, match="install the package debian-archive-keyring"):
        host_mirror("http://localhost/debian")


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        pytest.param(
            {
                "sources.list": "# deb http://127.0.0.1/old/debian trixie main\n"
                "deb [arch=amd64 signed-by=/x] http://127.0.0.1/debian/ trixie main contrib # ours\n",
                "parts/security.list": "deb http://127.0.0.1/sec/debian-security trixie-security main\n",
            },
            ("http://127.0.0.1/debian", "http://127.0.0.1/sec/debian-security"),
            id="one-line",
        ),
        pytest.param(
            {
                "parts/debian.sources": "Types: deb\n# a remark\nURIs: http://127.0.0.1/old/debian\nSuites: trixie\n"
                "Components: main\nEnabled: no\n\nTypes: deb deb-src\nURIs: http://127.0.0.1/debian\n"
                "Suites: trixie trixie-updates\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY-----\n .\n"
            },
            ("http://127.0.0.1/debian", "http://127.0.0.1/debian-security"),
            id="deb822, security beside it",
        ),
        pytest.param(
            {
                "parts/cloud.sources": "Types: deb\nURIs: mirror+file:///etc/apt/mirrors/debian.list\nSuites: trixie\n"
                "Components: main\n\nTypes: deb\nURIs: mirror+file:///etc/apt/mirrors/debian-security.list\n"
                "Suites: trixie-security\nComponents: main\n"
            },
            ("mirror+file:///etc/apt/mirrors/debian.list", "mirror+file:///etc/apt/mirrors/debian-security.list"),
            id="mirror lists of cloud images",
        ),
        pytest.param(
            {
                "sources.list": "deb http://127.0.0.1/vendor/linux/debian trixie stable\n"
                "deb http://127.0.0.1/ubuntu noble main\ndeb-src http://127.0.0.1/debian trixie main\n"
            },
            None,
            id="only others",
        ),
    ],
)
def test_the_mirror_comes_from_the_hosts_own_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources: dict[str, str], expected: tuple[str, str] | None
) -> None:
    """The host's apt is the real one, pointed at another directory."""
    keys = tmp_path / "keys.gpg"
    keys.touch()
    monkeypatch.setenv(KEYRING_VARIABLE, str(keys))
    (tmp_path / "parts").mkdir()
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{tmp_path}/sources.list"; Dir::Etc::sourceparts "{tmp_path}/parts";'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    monkeypatch.delenv(MIRROR_VARIABLE, raising=False)
    if expected:
        assert host_mirror() == Mirror(*expected, keys)
    else:
        with pytest.raises(HostError, match=r"knows no Debian mirror .* --debian-mirror=URI"):
            host_mirror()


# The real archive


@pytest.mark.parametrize("arch", [X86_64, ARM64], ids=str)
@pytest.mark.parametrize("text", REAL_KERNELS)
def test_a_real_kernel_is_whole(text: str, arch: Architecture) -> None:
    cache = Cache()
    spec = parse(text, arch)
    assert isinstance(spec, BootSpec)
    kernel = spec.resolve(cache, Archive(cache))
    prefix = text.removeprefix("debian:")
    assert kernel.release.startswith(prefix + ".") or not prefix[0].isdigit()
    assert kernel.arch is arch
    assert kernel.has("KSM")
    assert kernel.has("NUMA")
    names = [module.name for module in modules.select(kernel.modules, kernel.config)]
    assert {"zram", "hwpoison_inject", "qemu_fw_cfg"} <= set(names)
