# SPDX-License-Identifier: GPL-2.0
"""Which accelerator really works here.

An open ``/dev/kvm`` proves nothing. On some hosts QEMU reports KVM as enabled and no guest instruction ever takes
effect. On others KVM interprets a guest's kernel instruction by instruction and fails at the first one it does not
know (kvm-pvm: a BMI2 shift in the decompressor of Linux 6.12). So the probe runs guest code that ends QEMU with a
status of its own, on x86-64 after a long loop in 64-bit mode. Anything else before its deadline means TCG. The verdict
is remembered until the host boots again. The guest code belongs to the architecture (``Architecture.probe``).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import paths
from harness.arch import Architecture, host
from harness.deadline import Deadline
from harness.host.process import Child, find_program

#: seconds that a probe may take; the loop of the x86-64 one takes 0.1 s on a processor, 0.3 s under TCG
_PROBE_SECONDS = 5.0


@dataclass(frozen=True)
class Accelerator:
    """What executes guest code."""

    #: QEMU's name: "kvm" or "tcg"
    name: str
    #: why this one, for the report
    reason: str
    #: how many times longer guest work may take than with hardware virtualisation; scales deadlines
    slowdown: float


def choose(arch: Architecture, *, icount: bool = False) -> Accelerator:
    """The accelerator to use for guests of ``arch``, and why.

    :param icount: it has to count instructions.
    """
    tcg = 8.0
    if icount:
        # A busy guest's clock, and with it the heartbeat, falls behind ours: by 0.7 s in a second of processor time.
        return Accelerator("tcg", "--icount: no other accelerator counts instructions", 4 * tcg)
    if arch is not host():
        return Accelerator("tcg", f"{arch} guests on an {host()} host", tcg)
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        state = "is not there" if not os.path.exists("/dev/kvm") else "may not be opened by this user"
        return Accelerator("tcg", f"/dev/kvm {state}", tcg)
    if not _kvm_runs(arch):
        return Accelerator("tcg", "/dev/kvm opens but does not execute guest code, or only very slowly", tcg)
    return Accelerator("kvm", "/dev/kvm executed guest code", 1.0)


def _kvm_runs(arch: Architecture) -> bool:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Another probe may see more: its verdict is another one.
    code = hashlib.sha256(arch.probe.code).hexdigest()[:8]
    remembered = paths.state_dir() / f"kvm-{arch}-{boot_id}-{code}"
    if not remembered.exists():
        works = probe(arch, "kvm")
        remembered.parent.mkdir(parents=True, exist_ok=True)
        for old in remembered.parent.glob(f"kvm-{arch}-*"):
            old.unlink(missing_ok=True)
        remembered.write_text("yes" if works else "no")
    return remembered.read_text() == "yes"


def firmware(arch: Architecture) -> bytes:
    """The firmware image of an architecture's probe."""
    return arch.probe.code.ljust(arch.probe.size, b"\0")


def probe(arch: Architecture, accelerator: str) -> bool:
    """Whether QEMU with this accelerator executes guest code to an observable effect, within a few seconds."""
    guest, args = arch.probe, arch.kvm if accelerator == "kvm" else arch.tcg
    with tempfile.TemporaryDirectory(prefix="mremap-harness-probe-") as directory:
        image = Path(directory) / "firmware"
        image.write_bytes(firmware(arch))
        argv = [find_program(arch.qemu, arch.qemu_package), "-accel", accelerator, "-nodefaults", "-display", "none"]
        argv += ["-no-reboot", "-machine", args.machine, "-cpu", args.cpu, *guest.load, str(image)]
        for device in guest.devices:
            argv += ["-device", device]
        child = Child(argv, Path(directory) / "output")
        try:
            return child.wait(Deadline.after(_PROBE_SECONDS)) == guest.status
        finally:
            child.kill()
