# SPDX-License-Identifier: GPL-2.0
"""GNU cpio and busybox can read the archives that the harness writes."""

from __future__ import annotations

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from harness.machine import cpio

ENTRIES = (
    cpio.file("init", b"#!/bin/sh\n", executable=True),
    cpio.file("etc/deep/below/file", b"text"),
    cpio.symlink("bin", "usr/bin"),
    cpio.directory("empty"),
    cpio.file("nothing", b""),
)


def names(data: bytes) -> list[str]:
    """A reader of our own, from the format's description: the names in an archive, the trailer included."""
    found = []
    at = 0
    while at < len(data) and data[at : at + 6] == b"070701":
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        found.append(data[at + 110 : at + 110 + name_size - 1].decode())
        at = (at + 110 + name_size + 3) // 4 * 4
        at = (at + size + 3) // 4 * 4
    return found


def test_every_missing_parent_comes_once_and_before_what_needs_it() -> None:
    assert names(cpio.archive(ENTRIES)) == [
        "init",
        "etc",
        "etc/deep",
        "etc/deep/below",
        "etc/deep/below/file",
        "bin",
        "empty",
        "nothing",
        "TRAILER!!!",
    ]


def test_a_directory_given_twice_comes_once() -> None:
    entries = [cpio.file("a/b", b""), cpio.directory("a"), cpio.directory("a")]
    assert [entry.path for entry in cpio.with_parents(entries)] == ["a", "a/b"]


def test_archives_are_the_same_whenever_they_are_made() -> None:
    assert cpio.archive(ENTRIES) == cpio.archive(list(ENTRIES))


def test_an_archive_is_padded_so_that_another_can_follow() -> None:
    assert len(cpio.archive(ENTRIES)) % 512 == 0
    assert len(cpio.archive([])) % 512 == 0


@pytest.mark.parametrize("size", range(5))
def test_any_length_of_name_and_content_keeps_the_next_header_aligned(size: int) -> None:
    entries = [cpio.file("n" * (size + 1), b"x" * size), cpio.file("last", b"end")]
    assert names(cpio.archive(entries)) == ["n" * (size + 1), "last", "TRAILER!!!"]


def unpack_with(command: list[str], data: bytes, directory: Path) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run(command, input=data, cwd=directory, check=True, capture_output=True)


@pytest.mark.parametrize("command", [["cpio", "-id"], ["busybox", "cpio", "-id"]], ids=["cpio", "busybox"])
def test_others_unpack_what_we_pack(tmp_path: Path, command: list[str]) -> None:
    unpack_with(command, cpio.archive(ENTRIES), tmp_path)
    assert (tmp_path / "etc/deep/below/file").read_bytes() == b"text"
    assert (tmp_path / "nothing").read_bytes() == b""
    assert stat.S_IMODE((tmp_path / "init").stat().st_mode) == 0o755
    assert (tmp_path / "bin").readlink() == Path("usr/bin")
    assert (tmp_path / "empty").is_dir()
