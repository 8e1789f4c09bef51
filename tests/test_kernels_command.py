# SPDX-License-Identifier: GPL-2.0
"""``harness kernels``: what ``--kernel`` could name here. No network is used."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.arch import ARM64, X86_64
from harness.commands import cli
from harness.debian.apt import Archive
from harness.debian.apt_root import Package
from harness.debian.known import listed
from harness.host.cache import Cache
from harness.kernels import grammar, known


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("PATH", "/nowhere")  # no apt either


def package(version: str, name: str = "", arch: str = "amd64", depends: str = "") -> Package:
    upstream = version.partition("-")[0]
    return Package(name or f"linux-image-{upstream}+deb13-cloud-{arch}", version, arch, "trixie", "0" * 64, depends)


def write_list(suite: str, arch: str, *packages: Package, source: str = "de5708d1", hours: float = 3.0) -> Path:
    """A package list as an apt root keeps it."""
    root = Cache().root / "apt" / f"{suite}-{arch}-{source}"
    root.mkdir(parents=True)
    (root / "packages.json").write_text(json.dumps({"stamp": [], "value": [asdict(each) for each in packages]}))
    (root / "refreshed").touch()
    then = time.time() - hours * 3600 - 60
    os.utime(root / "refreshed", (then, then))
    return root


def told(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert cli.main(["kernels", *args]) == 0
    return capsys.readouterr().out


def test_versions_are_listed_by_suite_and_architecture_in_their_order(capsys: pytest.CaptureFixture[str]) -> None:
    write_list("trixie", "amd64", package("6.12.118-1"), package("6.12.9-1"))
    write_list("trixie-backports", "amd64", package("7.3.4-1~bpo13+1"), package("7.4~rc2-1"))
    write_list("trixie", "arm64", package("6.12.107-1", arch="arm64"))
    both = told(capsys)
    lines = [line.split() for line in both.splitlines()]
    assert ["trixie", "6.12.9", "6.12.118"] in lines
    assert ["trixie-backports", "7.3.4"] in lines, "a candidate is no version that debian: names"
    assert ["trixie", "6.12.107"] in lines
    assert "lists fetched 3 hours ago" in both
    arm = told(capsys, "--arch=arm64")
    assert "6.12.107" in arm
    assert "6.12.118" not in arm


def test_kernels_whose_modules_are_gone_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    binary = "linux-binary-7.1.13+deb13-cloud-amd64"
    modules = "linux-modules-7.1.13+deb13-cloud-amd64"
    needs = f"{binary} (= 7.1.13-1), {modules} (= 7.1.13-1)"
    write_list("sid", "amd64", package("7.1.13-1", depends=needs), package("7.1.13-1", binary), package("7.3.4-1"))
    assert ["sid", "7.1.13*", "7.3.4"] in [line.split() for line in told(capsys).splitlines()]


def test_variants_presets_and_source_packages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    write_list("trixie", "amd64", package("7.3.4-1", "linux-source-7.3", "all"))
    text = told(capsys)
    for name in ("unpatched", "relocate-anon", "relocate-anon-6.12", "linux-source-7.3", "kasan", "fast"):
        assert f"\n  {name} " in text
    assert "16k" in told(capsys, "--arch=arm64")
    assert "16k" not in told(capsys, "--arch=x86_64")


def test_what_is_cached_is_listed_with_its_size_the_last_used_first(capsys: pytest.CaptureFixture[str]) -> None:
    cache = Cache()

    def fill(target: Path) -> None:
        (target / "image").write_bytes(bytes(3_000_000))

    def built(target: Path) -> None:
        (target / "provenance.json").write_text(
            json.dumps({"source": "linux-source-7.3 7.3.4-1", "patches": 7, "configuration": "fast"})
        )

    cache.tree("kernels", "linux-image-6.1.0-56-cloud-amd64_6.1.192-2_ffee96c77d951c7c", fill)
    cache.tree("kernels", "deb 0123", fill)
    cache.tree("builds", "fast-arm64=0123", built)
    cache.tree("builds", "fast-arm64=4567", fill)
    cache.file("initrds", "one", lambda path: path.write_text("x") and None)
    text = told(capsys)
    assert "3 MB  now            x86_64  debian:6.1.192\n" in text
    assert "a .deb file" in text
    assert "arm64   linux-source-7.3 7.3.4-1 with 7 patches, fast\n" in text
    assert "a kernel of an older version of the harness" in text
    assert text.rpartition("In the cache:")[2].count("\n") == 5
    assert "6.1.192" not in told(capsys, "--arch=arm64")


def test_an_empty_cache_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys)
    assert "harness kernels --update" in text
    assert "No kernel is in the cache." in text


@pytest.mark.parametrize(
    "damage", ["", "{", '{"value": [{"name": "x"}]}', '{"value": 3}', "[]", '{"value": [[]]}'], ids=range(6)
)
def test_a_damaged_list_is_left_out(damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    (write_list("trixie", "amd64") / "packages.json").write_text(damage)
    write_list("bookworm", "amd64", package("6.1.192-2"))
    text = told(capsys)
    assert "6.1.192" in text
    assert "trixie" not in text


def test_a_list_that_was_given_up_is_left_out() -> None:
    (write_list("trixie", "amd64", package("6.12.118-1")) / "refreshed").unlink()
    assert listed(Cache()) == []


def test_lists_of_two_mirrors_are_put_together() -> None:
    write_list("trixie", "amd64", package("6.12.117-1"))
    write_list("trixie", "amd64", package("6.12.118-1"), source="00000000")
    (every,) = known.versions(listed(Cache()), X86_64).values()
    assert [each.text for each in every] == ["6.12.117", "6.12.118"]


def test_each_name_is_one_that_the_grammar_takes() -> None:
    write_list("trixie", "amd64", package("6.12.118-1"), package("7.3.4-1", "linux-source-7.3", "all"))
    found = known.names(Cache())
    assert found == ["debian:", "debian:6.12.118", "linux-source-7.3"]
    for name in found:
        assert grammar.parse(name, X86_64).text.startswith(name)


def test_an_update_reads_the_lists_of_the_mirror_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, float]] = []

    def packages(self: Archive, arch: object, names: Any, *, max_age: float) -> list[Package]:
        asked.extend((f"{name}-{arch}", max_age) for name in names)
        return []

    monkeypatch.setattr(Archive, "packages", packages)
    told(capsys, "--update", "--arch=arm64")
    assert ("trixie-arm64", 0) in asked
    assert ("sid-arm64", 0) in asked
    asked.clear()
    told(capsys)
    assert asked == []
    assert str(ARM64) == "arm64"
