# SPDX-License-Identifier: GPL-2.0
"""Which accelerator really works here.

``/dev/kvm`` can lie: hosts exist where it opens, QEMU reports KVM as enabled, and no guest instruction ever takes
effect. So the probe runs a few bytes of guest code that end QEMU with a status of their own, and anything else within
its deadline means TCG. The verdict is remembered per boot of the host.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import paths
from harness.arch import ARM64, X86_64, Architecture, host
from harness.deadline import Deadline
from harness.process import Child, find_program

_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class Accelerator:
    """What executes guest code."""

    #: QEMU's name: "kvm" or "tcg"
    name: str
    #: why this one, for the report
    reason: str
    #: how many times longer guest work may take than with hardware virtualisation; scales deadlines
    slowdown: float


@dataclass(frozen=True)
class _Probe:
    """Guest code that ends QEMU, and how one sees that it ran."""

    #: placed where the CPU starts
    code: bytes
    #: where in the firmware image the code stands
    offset: int
    #: bytes of the whole firmware image
    size: int
    arguments: tuple[str, ...]
    #: QEMU's exit status when the code ran
    status: int


_PROBES = {
    X86_64: _Probe(
        # The reset vector, 16 bytes below 4 GiB: mov al,0x10; out 0xf4,al; hlt. isa-debug-exit ends QEMU with
        # (value << 1) | 1.
        code=bytes.fromhex("b010e6f4f4"),
        offset=0xFFF0,
        size=0x10000,
        arguments=("-machine", "q35", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
        status=0x21,
    ),
    ARM64: _Probe(
        # At address 0: ldr w0,=0x84000008 (PSCI SYSTEM_OFF); hvc #0; b . — QEMU ends with status 0.
        code=bytes.fromhex("60000018020000d40000001408000084"),
        offset=0,
        size=0x10000,
        arguments=("-machine", "virt,gic-version=host"),
        status=0,
    ),
}


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
        return Accelerator("tcg", "/dev/kvm opens but executes no guest code", tcg)
    return Accelerator("kvm", "/dev/kvm executed guest code", 1.0)


def _kvm_runs(arch: Architecture) -> bool:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    remembered = paths.state_dir() / f"kvm-{arch}-{boot_id}"
    if not remembered.exists():
        works = probe(arch, "kvm")
        remembered.parent.mkdir(parents=True, exist_ok=True)
        for old in remembered.parent.glob(f"kvm-{arch}-*"):
            old.unlink(missing_ok=True)
        remembered.write_text("yes" if works else "no")
    return remembered.read_text() == "yes"


def probe(arch: Architecture, accelerator: str) -> bool:
    """Whether QEMU with this accelerator executes guest code to an observable effect, within a few seconds."""
    guest = _PROBES[arch]
    with tempfile.TemporaryDirectory(prefix="mremap-harness-probe-") as directory:
        firmware = Path(directory) / "firmware"
        firmware.write_bytes(bytes(guest.offset) + guest.code.ljust(guest.size - guest.offset, b"\0"))
        argv = [find_program(arch.qemu, arch.qemu_package), "-accel", accelerator, "-nodefaults", "-display", "none"]
        argv += ["-no-reboot", "-bios", str(firmware), *guest.arguments]
        if accelerator == "kvm":
            argv += ["-cpu", "host"]
        elif arch is ARM64:
            argv[argv.index("virt,gic-version=host")] = "virt,gic-version=3"
            argv += ["-cpu", "cortex-a57"]
        child = Child(argv, Path(directory) / "output")
        try:
            return child.wait(Deadline.after(_PROBE_SECONDS)) == guest.status
        finally:
            child.kill()
