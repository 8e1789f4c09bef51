# SPDX-License-Identifier: GPL-2.0
"""Builds QEMU's command line from typed values.

The same machine description gives the same devices in the same order, which is what lets a clone take over a
template's device state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.arch import Architecture
from harness.host.process import find_program
from harness.machine.accelerator import Accelerator

#: A migration test needs a second NUMA node to migrate to.
NODES = 2

#: The virtio-serial ports, in order; each is a file of this name under /dev/virtio-ports in the guest.
PORTS = ("harness.agent", "harness.heartbeat", "harness.shell")

#: Kernel parameters for every guest.
PARAMS = (
    "quiet",
    "loglevel=5",  # warnings and our own markers reach the console; each character costs time under emulation
    "panic=-1",  # reboot at once, which -no-reboot turns into an end that is noticed
    "printk.devkmsg=on",  # no rate limit: a lost marker would attribute a splat to the wrong test
    "log_buf_len=1M",
    "rdinit=/init",
)


@dataclass(frozen=True)
class Machine:
    """Everything about a virtual machine that its guest can see."""

    arch: Architecture
    accelerator: Accelerator
    #: the kernel to boot
    kernel: Path
    #: the initramfs
    initrd: Path
    #: of the kernel, in bytes
    page_size: int = 4096
    #: added to the kernel's command line, after our own parameters
    append: str = ""
    #: MiB of RAM in all, shared evenly by the NUMA nodes
    memory: int = 640
    #: virtual CPUs; a second one costs time under TCG and helps only races
    cpus: int = 1
    #: the guest's clock counts the instructions it executes, one a nanosecond; TCG only
    icount: bool = False

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        params = [f"console={self.arch.console}", *PARAMS]
        if self.accelerator.name == "tcg":
            params += self.arch.tcg_params
        return " ".join([*params, self.append]).strip()


@dataclass(frozen=True)
class Ram:
    """Guest memory in files, one per NUMA node.

    :param shared: True while a template is being made, False for clones, which get their own copy of what they write.
    """

    files: tuple[Path, ...]
    shared: bool


@dataclass(frozen=True)
class Wiring:
    """How the outside reaches the machine."""

    #: the file that receives the serial console
    console: Path
    #: a socket for people, e.g. ``socat - UNIX-CONNECT:…``; None for none
    monitor: Path | None
    #: our end's peer of the machine-protocol socket pair: a descriptor QEMU inherits
    qmp_fd: int
    #: the same for each of PORTS
    port_fds: tuple[int, ...]


def arguments(machine: Machine, wiring: Wiring, *, ram: Ram | None = None, incoming: bool = False) -> list[str]:
    """QEMU's command line.

    :param ram: memory in files; None for ordinary memory.
    :param incoming: wait for a migration instead of booting.
    :raises HostError: if QEMU is not installed.
    """
    arch, accelerator = machine.arch, machine.accelerator
    kvm = accelerator.name == "kvm"
    argv = [find_program(arch.qemu, arch.qemu_package), "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-S", "-no-reboot", "-action", "panic=pause,reboot=shutdown"]
    argv += ["-machine", arch.kvm_machine if kvm else arch.tcg_machine, "-accel", accelerator.name]
    if machine.icount:
        # An idle guest's clock follows ours. With sleep=off it would run ahead to the next timer at once: a processor
        # busy with idling, and a heartbeat without end.
        argv += ["-icount", "shift=0,sleep=on"]
    # A socket per CPU: one socket across both nodes is a topology the scheduler warns about at boot.
    argv += ["-smp", f"{machine.cpus},sockets={machine.cpus}", "-m", f"{machine.memory}M"]
    argv += ["-cpu", "host" if kvm else arch.tcg_cpu_16k if machine.page_size == 16384 else arch.tcg_cpu]
    argv += _memory(machine, ram)
    argv += ["-kernel", str(machine.kernel), "-initrd", str(machine.initrd), "-append", machine.command_line]
    argv += ["-chardev", f"file,id=console,path={wiring.console},append=on", "-serial", "chardev:console"]
    argv += ["-chardev", f"socket,id=qmp,fd={wiring.qmp_fd}", "-mon", "chardev=qmp,mode=control"]
    if wiring.monitor is not None:
        argv += ["-chardev", f"socket,id=hmp,path={wiring.monitor},server=on,wait=off", "-mon", "chardev=hmp"]
    argv += ["-device", "virtio-serial-pci,max_ports=4"]
    for port, fd in zip(PORTS, wiring.port_fds, strict=True):
        argv += ["-chardev", f"socket,id={port},fd={fd}", "-device", f"virtserialport,chardev={port},name={port}"]
    argv += ["-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng"]
    argv += ["-device", "pvpanic-pci", "-device", "vmcoreinfo"]
    if incoming:
        argv += ["-incoming", "defer"]
    return argv


def _memory(machine: Machine, ram: Ram | None) -> Sequence[str]:
    argv: list[str] = []
    size = machine.memory // NODES
    for node in range(NODES):
        if ram is None:
            backend = f"memory-backend-ram,id=ram{node},size={size}M"
        else:
            share = "on" if ram.shared else "off"
            backend = f"memory-backend-file,id=ram{node},size={size}M,mem-path={ram.files[node]},share={share}"
        cpus = f",cpus=0-{machine.cpus - 1}" if node == 0 else ""
        argv += ["-object", backend, "-numa", f"node,nodeid={node},memdev=ram{node}{cpus}"]
    return argv
