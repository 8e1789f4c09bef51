# SPDX-License-Identifier: GPL-2.0
"""The same machine gives the same command line, and QEMU accepts it."""

from __future__ import annotations

import shutil
import socket
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from harness.arch import ARCHITECTURES, ARM64, X86_64, Architecture, ImageKind
from harness.deadline import Deadline
from harness.errors import GuestLost, HostError, LostCondition
from harness.machine.accelerator import Accelerator
from harness.machine.qemu import NODES, PORTS, Machine, Ram, Wiring, arguments
from harness.machine.vm import Vm
from tests import kernel_files

TCG = Accelerator("tcg", "for a test", 8.0)
KVM = Accelerator("kvm", "for a test", 1.0)
WIRING = Wiring(Path("/run/console"), Path("/run/monitor"), 10, (11, 12, 13))


def machine(architecture: Architecture = X86_64, **more: object) -> Machine:
    return replace(Machine(architecture, TCG, Path("/k/vmlinuz"), Path("/k/initrd")), **more)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def some_qemu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Command lines can be built on a host without QEMU; tests that start it are marked."""
    if "starts" in request.node.name:
        return
    for architecture in ARCHITECTURES:
        program = tmp_path / architecture.qemu
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


def value(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_our_parameters_come_first_and_the_users_last_so_that_they_win() -> None:
    line = machine(append="rdinit=/other slub_debug=F").command_line.split()
    assert line[0] == "console=ttyS0"
    assert line.index("rdinit=/init") < line.index("rdinit=/other")
    assert line[-1] == "slub_debug=F"


def test_parameters_for_emulation_are_left_out_without_it() -> None:
    assert "tsc=reliable" in machine().command_line
    assert "tsc=reliable" not in machine(accelerator=KVM).command_line


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_each_architecture_has_its_program_machine_and_cpu(architecture: Architecture) -> None:
    argv = arguments(machine(architecture), WIRING)
    assert argv[0].endswith(architecture.qemu)
    assert (value(argv, "-machine"), value(argv, "-cpu")) == (architecture.tcg.machine, architecture.tcg.cpu)
    argv = arguments(machine(architecture, accelerator=KVM), WIRING)
    assert (value(argv, "-machine"), value(argv, "-cpu")) == (architecture.kvm.machine, "host")


def test_a_kernel_with_pages_of_16k_gets_a_cpu_that_has_them() -> None:
    """An a57 has none: such a kernel stops there before it can say so."""
    cpus = {size: value(arguments(machine(ARM64, page_size=size), WIRING), "-cpu") for size in (4096, 16384, 65536)}
    assert cpus == {4096: "cortex-a57", 16384: "cortex-a76", 65536: "cortex-a57"}
    assert value(arguments(machine(ARM64, accelerator=KVM, page_size=16384), WIRING), "-cpu") == "host"


def test_a_clock_that_counts_instructions_is_asked_for_and_no_other_machine_has_one() -> None:
    counting = arguments(machine(icount=True), WIRING)
    assert value(counting, "-accel") == "tcg"
    assert value(counting, "-icount") == "shift=0,sleep=on"
    assert "-icount" not in arguments(machine(), WIRING)


def test_memory_is_shared_evenly_by_the_nodes_and_the_first_has_all_cpus() -> None:
    argv = arguments(machine(memory=512, cpus=2), WIRING)
    backends = [each for each in argv if each.startswith("memory-backend-ram")]
    assert backends == [f"memory-backend-ram,id=ram{node},size=256M" for node in range(NODES)]
    assert [each for each in argv if each.startswith("node,")] == [
        "node,nodeid=0,memdev=ram0,cpus=0-1",
        "node,nodeid=1,memdev=ram1",
    ]


def test_a_machine_whose_nodes_need_cpus_gets_more_of_them_which_run_no_process() -> None:
    """QEMU's riscv64 machine refuses a node that has no CPU."""
    architecture = replace(X86_64, cpu_in_every_node=True)
    what = machine(architecture, cpus=2)
    argv = arguments(what, WIRING)
    assert value(argv, "-smp") == f"{2 + NODES - 1},sockets={2 + NODES - 1}"
    nodes = [each.split("cpus=")[1] for each in argv if each.startswith("node,")]
    assert nodes == ["0-1", *(str(2 + node) for node in range(NODES - 1))]
    assert f"isolcpus=2-{NODES}" in what.command_line.split()
    assert "isolcpus" not in machine(cpus=2).command_line


def test_a_clone_differs_from_its_template_in_nothing_but_how_memory_is_mapped() -> None:
    files = (Path("/t/ram0"), Path("/t/ram1"))
    template = arguments(machine(), WIRING, ram=Ram(files, shared=True))
    clone = arguments(machine(), WIRING, ram=Ram(files, shared=False), incoming=True)
    assert clone[-2:] == ["-incoming", "defer"]
    assert [each.replace("share=off", "share=on") for each in clone[:-2]] == template
    assert "share=off" in " ".join(clone)


def test_every_port_is_wired_to_a_descriptor_of_its_own_and_nothing_listens_on_the_network() -> None:
    line = " ".join(arguments(machine(), WIRING))
    for port, fd in zip(PORTS, WIRING.port_fds, strict=True):
        assert f"socket,id={port},fd={fd} " in line
    assert "-netdev" not in line
    assert "tcp" not in line


def test_a_host_without_qemu_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=r"apt-get install qemu-system-arm$"):
        arguments(machine(ARM64), WIRING)


# ----------------------------------------------------------------------------------------------------------------------
# With the real QEMU


def kernel(architecture: Architecture) -> bytes:
    """Something that QEMU loads and never runs here."""
    if architecture.image.kind is ImageKind.IMAGE:
        return kernel_files.image(arch=architecture)
    data = bytearray(kernel_files.bzimage())
    struct.pack_into("<I", data, 0x22C, 0x7FFFFFFF)  # initrd_addr_max, Documentation/arch/x86/boot.rst
    return bytes(data)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("memory", ["plain", "template", "clone"])
@pytest.mark.parametrize("icount", [False, True], ids=["", "icount"])
def test_qemu_starts_with_every_such_command_line(
    tmp_path: Path, architecture: Architecture, memory: str, icount: bool
) -> None:
    if shutil.which(architecture.qemu) is None:
        pytest.skip(f"{architecture.qemu} is not installed")
    blob = tmp_path / "blob"
    blob.write_bytes(kernel(architecture))
    files = (tmp_path / "ram0", tmp_path / "ram1")
    ram = None if memory == "plain" else Ram(files, shared=memory == "template")
    what = machine(architecture, kernel=blob, initrd=blob, memory=256, cpus=2, icount=icount)
    with Vm(what, ram=ram, incoming=memory == "clone") as vm:
        vm.connect(Deadline.after(60))
        assert vm.qmp.execute("query-status", Deadline.after(30))["running"] is False
        assert len(vm.qmp.execute("query-cpus-fast", Deadline.after(30))) == 2 + what.extra_cpus
        vm.check()


def test_a_qemu_that_starts_and_ends_at_once_is_quoted(tmp_path: Path) -> None:
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    with Vm(machine(kernel=tmp_path / "none")) as vm, pytest.raises(GuestLost, match="QEMU did not start: ") as caught:
        vm.connect(Deadline.after(60))
    assert caught.value.condition is LostCondition.QEMU_DIED
    assert str(tmp_path / "none") in str(caught.value)


def test_closing_a_machine_that_starts_removes_all_of_it(tmp_path: Path) -> None:
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    vm = Vm(machine(kernel=tmp_path / "none"))
    vm.close()
    vm.close()
    assert vm.child.status is not None
    assert not vm.directory.exists()
    for sock in (vm.agent, vm.heartbeat, vm.shell):
        with pytest.raises(OSError, match="Bad file descriptor"):
            sock.send(b"x")
    assert isinstance(vm.agent, socket.socket)
