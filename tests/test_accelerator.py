# SPDX-License-Identifier: GPL-2.0
"""An accelerator counts as working when guest code had an effect, and not before."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from harness import accelerator, arch
from harness.arch import ARCHITECTURES, Architecture


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
        assert "executed guest code" in chosen.reason or "executes no guest code" in chosen.reason


def test_the_verdict_about_kvm_is_remembered_until_the_host_boots_again(tmp_path: Path) -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("there is no /dev/kvm to remember anything about")
    needs_qemu(arch.host())
    state = tmp_path / "state" / "mremap-harness"
    state.mkdir(parents=True)
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (state / f"kvm-{arch.host()}-{boot_id}").write_text("yes")
    assert accelerator.choose(arch.host()).name == "kvm"
    (state / f"kvm-{arch.host()}-{boot_id}").rename(state / f"kvm-{arch.host()}-an-earlier-boot")
    assert (accelerator.choose(arch.host()).name == "kvm") == accelerator.probe(arch.host(), "kvm")
    assert [path.name for path in state.iterdir()] == [f"kvm-{arch.host()}-{boot_id}"]
