# SPDX-License-Identifier: GPL-2.0
"""Builds QEMU's command line from a description of the machine.

The same description always gives the same devices in the same order. A clone can load the device state of a template
only because of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.arch import Architecture, QemuArgs
from harness.host.process import find_program
from harness.machine.accelerator import Accelerator

#: The number of NUMA nodes. Tests of migration need a second node to migrate to.
NODES = 2

#: The names of the virtio-serial ports, in the order of the devices.
PORTS = ("harness.agent", "harness.heartbeat", "harness.shell")

#: Kernel parameters for every guest.
PARAMS = (
    "quiet",
    "loglevel=5",  # warnings and the markers of tests reach the console; every character costs time under emulation
    "panic=-1",  # reboot at once; because of -no-reboot, QEMU then ends, and the host notices
    "printk.devkmsg=on",  # no rate limit: without a marker, a splat would be attributed to the wrong test
    "log_buf_len=1M",
    "rdinit=/init",
)


@dataclass(frozen=True)
class Machine:
    """A virtual machine: everything that its guest can see."""

    arch: Architecture
    accelerator: Accelerator
    #: the kernel to boot
    kernel: Path
    #: the initramfs
    initrd: Path
    #: the kernel's page size in bytes
    page_size: int = 4096
    #: parameters added to the kernel's command line, after those of the harness
    append: str = ""
    #: the guest's memory in MiB, divided evenly between the NUMA nodes
    memory: int = 640
    #: the number of virtual CPUs; a second one costs time under TCG, and only tests of races need it
    cpus: int = 1
    #: whether the guest's clock advances one nanosecond for each instruction; TCG only
    icount: bool = False

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        params = [f"console={self.arch.console}", *PARAMS, *self.args.params]
        if self.extra_cpus:
            params.append(f"isolcpus={self.cpus}-{self.cpus + self.extra_cpus - 1}")
        return " ".join([*params, self.append]).strip()

    @property
    def extra_cpus(self) -> int:
        """CPUs that the machine has only because its memory nodes need them; they run no process."""
        return NODES - 1 if self.arch.cpu_in_every_node else 0

    @property
    def args(self) -> QemuArgs:
        """The architecture's arguments for the accelerator."""
        return self.arch.kvm if self.accelerator.name == "kvm" else self.arch.tcg


@dataclass(frozen=True)
class Ram:
    """Guest memory in files.

    :param files: one file for each NUMA node.
    :param shared: True while a template is being made. False for a clone, which gets a private copy of what it writes.
    """

    files: tuple[Path, ...]
    shared: bool


@dataclass(frozen=True)
class Wiring:
    """The connections between QEMU and the harness."""

    #: the file that receives the serial console
    console: Path
    #: the path of a socket with QEMU's monitor, for a person with ``socat``; None for no monitor
    monitor: Path | None
    #: the descriptor that QEMU inherits for its machine protocol: one end of a socket pair
    qmp_fd: int
    #: the descriptors that QEMU inherits for the ports, in the order of PORTS
    port_fds: tuple[int, ...]


def arguments(machine: Machine, wiring: Wiring, *, ram: Ram | None = None, incoming: bool = False) -> list[str]:
    """Build QEMU's command line.

    :param ram: the files that hold guest memory; None for anonymous memory.
    :param incoming: whether to wait for a migration instead of booting.
    :raises HostError: if QEMU is not installed.
    """
    arch = machine.arch
    argv = [find_program(arch.qemu, arch.qemu_package), "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-S", "-no-reboot", "-action", "panic=pause,reboot=shutdown"]
    argv += ["-machine", machine.args.machine, "-accel", machine.accelerator.name]
    if machine.icount:
        # With sleep=on the clock of an idle guest follows the host's clock. With sleep=off it would jump to the next
        # timer at once: an idle guest would keep a host CPU busy, and send heartbeats without a pause.
        argv += ["-icount", "shift=0,sleep=on"]
    # One socket for each CPU. A socket that spans both nodes makes the scheduler warn about the topology at boot.
    cpus = machine.cpus + machine.extra_cpus
    argv += ["-smp", f"{cpus},sockets={cpus}", "-m", f"{machine.memory}M"]
    argv += ["-cpu", machine.args.cpu_for(machine.page_size)]
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
    for device in arch.devices:
        argv += ["-device", device]
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
        cpus = ""
        if node == 0:
            cpus = f",cpus=0-{machine.cpus - 1}"
        elif machine.extra_cpus:
            cpus = f",cpus={machine.cpus - 1 + node}"
        argv += ["-object", backend, "-numa", f"node,nodeid={node},memdev=ram{node}{cpus}"]
    return argv
