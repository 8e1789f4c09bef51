# SPDX-License-Identifier: GPL-2.0
"""An accelerator is accepted only after guest code had an effect."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from harness import arch
from harness.arch import ARCHITECTURES, X86_64, Architecture
from harness.machine import accelerator


def needs_qemu(architecture: Architecture) -> None:
    if shutil.which(architecture.qemu) is None:
        pytest.skip(f"{architecture.qemu} is not installed")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_the_probes_code_runs_under_emulation(architecture: Architecture) -> None:
    needs_qemu(architecture)
    assert accelerator.probe(architecture, "tcg")


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_an_accelerator_that_starts_and_executes_nothing_is_found_out_in_time(architecture: Architecture) -> None:
    """QEMU's qtest accelerator is exactly that."""
    needs_qemu(architecture)
    began = time.monotonic()
    assert not accelerator.probe(architecture, "qtest")
    assert time.monotonic() - began < 30


def test_an_accelerator_that_does_not_exist_does_not_work() -> None:
    needs_qemu(arch.host())
    assert not accelerator.probe(arch.host(), "magic")


def test_a_foreign_guest_is_emulated_and_the_reason_says_so() -> None:
    foreign = next(each for each in ARCHITECTURES if each is not arch.host())
    chosen = accelerator.choose(foreign)
    assert (chosen.name, chosen.reason) == ("tcg", f"{foreign} guests on an {arch.host()} host")
    assert chosen.slowdown > 1


def test_what_was_chosen_for_this_host_is_what_the_probe_found() -> None:
    needs_qemu(arch.host())
    chosen = accelerator.choose(arch.host())
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        assert chosen.name == "tcg"
        assert chosen.reason.startswith("/dev/kvm ")
    else:
        assert (chosen.name == "kvm") == accelerator.probe(arch.host(), "kvm")
        assert "executed guest code" in chosen.reason or "does not execute guest code" in chosen.reason


def test_the_verdict_about_kvm_is_remembered_until_the_host_boots_again(tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/kvm to remember anything about")
    needs_qemu(arch.host())
    state = tmp_path / "state" / "mremap-harness"
    state.mkdir(parents=True)
    accelerator.choose(arch.host())
    (remembered,) = state.iterdir()
    remembered.write_text("yes")
    assert accelerator.choose(arch.host()).name == "kvm"
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered.rename(state / remembered.name.replace(boot_id, "an-earlier-boot"))
    assert (accelerator.choose(arch.host()).name == "kvm") == accelerator.probe(arch.host(), "kvm")
    assert [path.name for path in state.iterdir()] == [remembered.name]


def test_the_probe_for_x86_64_is_what_its_source_assembles_to(tmp_path: Path) -> None:
    if arch.host() is not X86_64 or not shutil.which("as") or not shutil.which("objcopy"):
        pytest.skip("needs binutils for x86-64")
    source = Path(arch.__file__).with_name("probe_x86_64.S")
    subprocess.run(["as", "-o", "probe.o", source], cwd=tmp_path, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "probe.o", "probe.bin"], cwd=tmp_path, check=True)
    code = (tmp_path / "probe.bin").read_bytes()
    firmware = accelerator.firmware(X86_64)
    assert firmware[: len(code)] == code
    assert not firmware[len(code) : 0xFFF0].strip(b"\0"), "the source says nothing of what stands here"
