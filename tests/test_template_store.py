# SPDX-License-Identifier: GPL-2.0
"""A template is found by everything it depends on, used only if complete, and removed only if nobody clones it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness.agent import protocol
from harness.arch import ARCHITECTURES, ARM64, X86_64
from harness.guests import template, template_store
from harness.guests.template import TemplateError
from harness.guests.template_store import TemplateStore
from harness.machine.accelerator import Accelerator
from harness.machine.qemu import NODES, Machine

READY = protocol.Ready("6.12", "x86_64", "3.13", 4096, 0, 1.0, "")
COLLECTED = protocol.Collected(["guest_tests/test_a.py::test_a"], [])


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine whose parts are small files, QEMU included."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for architecture in ARCHITECTURES:
        (programs / architecture.qemu).write_text("#!/bin/sh\n")
        (programs / architecture.qemu).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    (tmp_path / "kernel").write_text("kernel")
    (tmp_path / "initrd").write_text("initrd")
    accelerator = Accelerator("tcg", "for a test", 8.0)
    return Machine(X86_64, accelerator, tmp_path / "kernel", tmp_path / "initrd", memory=64)


def upgrade(path: Path) -> None:
    path.write_text(path.read_text() + "# upgraded\n")


CHANGES: dict[str, Callable[[Machine], Machine]] = {
    "another command line": lambda machine: replace(machine, append="slub_debug=F"),
    "more memory": lambda machine: replace(machine, memory=128),
    "another processor": lambda machine: replace(machine, cpus=2),
    "another architecture": lambda machine: replace(machine, arch=ARM64),
    "another accelerator": lambda machine: replace(machine, accelerator=Accelerator("kvm", "", 1.0)),
    "an upgraded QEMU": lambda machine: (upgrade(Path(shutil.which(machine.arch.qemu) or "")), machine)[1],
    "a rebuilt kernel": lambda machine: (upgrade(machine.kernel), machine)[1],
    "another userland": lambda machine: (upgrade(machine.initrd), machine)[1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_frozen_guest_depends_on_makes_it_another_template(machine: Machine, change: str) -> None:
    before = template_store._key(machine)
    assert template_store._key(machine) == before
    assert template_store._key(CHANGES[change](machine)) != before


def test_the_reason_for_an_accelerator_is_no_part_of_a_template(machine: Machine) -> None:
    reworded = replace(machine, accelerator=replace(machine.accelerator, reason="put differently"))
    assert template_store._key(reworded) == template_store._key(machine)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A template as it lies on disk."""
    return seal(tmp_path / "store" / "0123")


def seal(directory: Path, age: float = 0.0) -> Path:
    directory.mkdir(parents=True)
    for node in range(NODES):
        (directory / f"ram{node}").write_bytes(b"m" * 4096)
    (directory / "state").write_bytes(b"devices")
    template.seal(directory, READY, COLLECTED)
    used = time.time() - age
    os.utime(directory / "template.json", (used, used))
    return directory


def test_a_sealed_template_comes_back_as_it_was(machine: Machine, sealed: Path) -> None:
    found = template.load(sealed, machine)
    assert found is not None
    assert (found.ready, found.collected, found.machine) == (READY, COLLECTED, machine)
    assert all(path.stat().st_mode & 0o222 == 0 for path in (*found.ram, sealed / "state"))


def rewrite(path: Path, data: bytes) -> None:
    path.chmod(0o600)
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "RAM cut short": lambda entry: os.truncate(entry / "ram1", 100),
    "RAM touched": lambda entry: os.utime(entry / "ram0", (1, 1)),
    "RAM replaced": lambda entry: ((entry / "ram0").unlink(), (entry / "ram0").write_bytes(b"m" * 4096)),
    "RAM gone": lambda entry: (entry / "ram0").unlink(),
    "state rewritten": lambda entry: rewrite(entry / "state", b"DEVICES"),
    "state gone": lambda entry: (entry / "state").unlink(),
    "record cut short": lambda entry: os.truncate(entry / "template.json", 20),
    "record empty": lambda entry: (entry / "template.json").write_text("{}"),
    "record of another kind": lambda entry: (entry / "template.json").write_text("[1]"),
    "record gone": lambda entry: (entry / "template.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_template_that_is_not_whole_is_not_used(machine: Machine, sealed: Path, damage: str) -> None:
    DAMAGE[damage](sealed)
    assert template.load(sealed, machine) is None


def test_a_state_whose_bytes_changed_behind_its_date_is_not_used(machine: Machine, sealed: Path) -> None:
    state = sealed / "state"
    before = state.stat()
    rewrite(state, b"DEVICES")
    os.utime(state, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert template.load(sealed, machine) is None


def test_a_half_made_template_is_never_seen(tmp_path: Path) -> None:
    entry = tmp_path / "0123"

    def interrupted() -> None:
        with template_store._being_made(entry) as fresh:
            (fresh / "ram0").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_maker_left_is_replaced(tmp_path: Path) -> None:
    entry = tmp_path / "0123"
    (tmp_path / "0123.new").mkdir()
    (tmp_path / "0123.new" / "ram0").write_bytes(b"half")
    with template_store._being_made(entry) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "whole").touch()
    assert [path.name for path in entry.iterdir()] == ["whole"]


def test_templates_unused_for_long_are_dropped(tmp_path: Path) -> None:
    store = TemplateStore(tmp_path)
    old, young = seal(tmp_path / "old", age=30 * 86400), seal(tmp_path / "young")
    store._make_room(4096)
    assert not old.exists()
    assert young.exists()


def test_a_template_that_somebody_clones_is_not_dropped(tmp_path: Path, machine: Machine) -> None:
    user, other = TemplateStore(tmp_path), TemplateStore(tmp_path)
    entry = seal(tmp_path / "old")
    assert user._hold(entry, machine) is not None
    long_ago = time.time() - 30 * 86400
    os.utime(entry / "template.json", (long_ago, long_ago))
    other._make_room(4096)
    assert entry.exists()
    user.close()
    other._make_room(4096)
    assert not entry.exists()


def test_templates_that_another_run_removes_meanwhile_are_no_error(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = [seal(tmp_path / name, age=30 * 86400) for name in ("one", "two")]

    def removed(entry: Path) -> int:
        template_store._remove(entry)
        return 0

    monkeypatch.setattr(template_store, "disk_size", removed)
    store = TemplateStore(tmp_path)
    store._make_room(4096)
    assert not any(entry.exists() for entry in other)
    assert store._hold(other[0], machine) is None


def test_memory_that_cannot_fit_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match="has no room for 8388608 MiB of guest memory"):
        TemplateStore(tmp_path)._make_room(1 << 43)


@pytest.mark.parametrize(("size", "used"), [(64 << 20, False), (4 << 30, True)])
def test_a_tmpfs_that_is_too_small_for_any_template_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, used: bool
) -> None:
    """As /dev/shm in a container."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=size))
    (tmp_path / "shm").mkdir()
    root = template_store._default_root(tmp_path / "shm")
    assert root.is_relative_to(tmp_path / "shm") is used
    assert root.is_relative_to(tmp_path / "cache") is not used


def test_a_store_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(TemplateError, match="cannot write a template below"),
        TemplateStore(tmp_path / "file")._entry("0123"),
    ):
        pass


def test_holes_stay_holes_in_a_copy(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(16 << 20)
        file.seek(5 << 20)
        file.write(b"island" * 1000)
    template_store._copy_sparse(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20
    source.write_bytes(b"")
    template_store._copy_sparse(source, tmp_path / "empty")
    assert (tmp_path / "empty").read_bytes() == b""
