# SPDX-License-Identifier: GPL-2.0
"""Which accelerator really works here.

An open ``/dev/kvm`` proves nothing. Hosts exist where QEMU reports KVM as enabled and no guest instruction ever takes
effect, and hosts where KVM interprets a guest's kernel instruction by instruction and fails at the first one it does
not know (kvm-pvm: a BMI2 shift in the decompressor of Linux 6.12). So the probe runs guest code that ends QEMU with a
status of its own, on x86-64 after a long loop in 64-bit mode. Anything else within its deadline means TCG. The verdict
is remembered per boot of the host.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness import paths
from harness.arch import ARM64, X86_64, Architecture, host
from harness.deadline import Deadline
from harness.host.process import Child, find_program

#: The loop of the x86-64 probe takes 0.1 s on a processor, 0.3 s under TCG.
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


@dataclass(frozen=True)
class _Probe:
    """Guest code that ends QEMU, and how one sees that it ran."""

    #: the firmware image, up to the last byte that is not zero
    code: bytes
    #: bytes of the whole firmware image
    size: int
    arguments: tuple[str, ...]
    #: QEMU's exit status when the code ran
    status: int


_PROBES = {
    X86_64: _Probe(
        # probe_x86_64.S, assembled, and a far jump to it at the reset vector, 16 bytes below 4 GiB.
        code=bytes.fromhex(
            "fa31c08ed88ec0bf0010b90018fcf3ab66c70600100320000066c70600200330000066c7060030830000002e660f0116"
            "880066b8200000000f22e066b8001000000f22d866b9800000c00f32660d000100000f3066b8010000800f22c066ea65"
            "000f000800b900000008ffc975fcb010e6f4f40f1f440000000000000000000000000000009b20000f0078000f00"
        ).ljust(0xFFF0, b"\0")
        + bytes.fromhex("ea000000f0"),
        size=0x10000,
        arguments=("-machine", "q35", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
        status=0x21,
    ),
    ARM64: _Probe(
        # At address 0: ldr w0,=0x84000008 (PSCI SYSTEM_OFF); hvc #0; b . — QEMU ends with status 0.
        code=bytes.fromhex("60000018020000d40000001408000084"),
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
        return Accelerator("tcg", "/dev/kvm opens but does not execute guest code, or only very slowly", tcg)
    return Accelerator("kvm", "/dev/kvm executed guest code", 1.0)


def _kvm_runs(arch: Architecture) -> bool:
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Another probe may see more: its verdict is another one.
    code = hashlib.sha256(_PROBES[arch].code).hexdigest()[:8]
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
    return _PROBES[arch].code.ljust(_PROBES[arch].size, b"\0")


def probe(arch: Architecture, accelerator: str) -> bool:
    """Whether QEMU with this accelerator executes guest code to an observable effect, within a few seconds."""
    guest = _PROBES[arch]
    with tempfile.TemporaryDirectory(prefix="mremap-harness-probe-") as directory:
        image = Path(directory) / "firmware"
        image.write_bytes(firmware(arch))
        argv = [find_program(arch.qemu, arch.qemu_package), "-accel", accelerator, "-nodefaults", "-display", "none"]
        argv += ["-no-reboot", "-bios", str(image), *guest.arguments]
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
