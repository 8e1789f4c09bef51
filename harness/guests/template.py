# SPDX-License-Identifier: GPL-2.0
"""Templates and clones: a booted guest, frozen in files, from which fresh guests start in a fraction of a second.

A template is the guest's RAM in files that QEMU mapped shared while it was made, and the state of its devices, which
migration writes without the RAM (the capability ``x-ignore-shared``). A clone maps the same files privately, so that
the host copies only the pages it writes, and takes over the device state. Clones run side by side and leave nothing
behind; the template never changes again.

Templates come in layers. The base knows the kernel and the agent; the layer above it has the tests collected. A
changed test costs a new upper layer, never a boot.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import HarnessError, HostError
from harness.machine import qemu
from harness.machine.vm import Vm

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]


#: The file that describes a template; locked by the runs that clone it.
RECORD = "template.json"


class TemplateError(HarnessError):
    """A template cannot be made or used here; a cold boot still can."""


@dataclass(frozen=True)
class Template:
    """A frozen guest.

    :param machine: what it is a guest of; clones run the same.
    :param directory: holds the RAM files, the device state and what we know of it.
    :param ready: what the agent said of itself when it was made.
    :param collected: the tests it has collected; None for a base.
    """

    machine: qemu.Machine
    directory: Path
    ready: protocol.Ready
    collected: protocol.Collected | None

    @property
    def ram(self) -> tuple[Path, ...]:
        """The RAM files, one per NUMA node."""
        return ram_files(self.directory)

    def clone(self) -> Vm:
        """Start a clone's process; :func:`thaw` it before use."""
        return Vm(self.machine, ram=qemu.Ram(self.ram, shared=False), incoming=True)


def thaw(vm: Vm, directory: Path, deadline: Deadline) -> None:
    """Give a machine that waits for it the device state in ``directory``, and let it run.

    :raises TemplateError: if QEMU does not take it.
    """
    vm.connect(deadline)
    vm.qmp.execute("migrate-set-capabilities", deadline, capabilities=_CAPABILITIES)
    vm.qmp.execute("migrate-incoming", deadline, uri=f"exec:cat {shlex.quote(str(directory / 'state'))}")
    _finish_migration(vm, deadline)
    vm.run(deadline)


def freeze(vm: Vm, directory: Path, deadline: Deadline) -> None:
    """Stop a machine and write its device state into ``directory``; its RAM is there already.

    :raises TemplateError: if QEMU or a device cannot migrate.
    """
    vm.stop(deadline)
    vm.qmp.execute("migrate-set-capabilities", deadline, capabilities=_CAPABILITIES)
    vm.qmp.execute("migrate", deadline, uri=f"exec:cat > {shlex.quote(str(directory / 'state'))}")
    _finish_migration(vm, deadline)


def _finish_migration(vm: Vm, deadline: Deadline) -> None:
    while True:
        status = vm.qmp.execute("query-migrate", deadline)
        if status.get("status") == "completed":
            return
        if status.get("status") in ("failed", "cancelled"):
            raise TemplateError(f"QEMU cannot migrate this machine: {status.get('error-desc', 'no reason given')}")
        deadline.check("QEMU to move the device state")
        vm.check()
        time.sleep(0.002)


def ram_files(directory: Path) -> tuple[Path, ...]:
    """The RAM files in a template's directory, one per NUMA node."""
    return tuple(directory / f"ram{node}" for node in range(qemu.NODES))


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(directory: Path) -> dict[str, list[int]]:
    """What shows that a file was touched since it was sealed. Reading half a GiB for a digest would cost a boot."""
    files = (*ram_files(directory), directory / "state")
    return {file.name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for file in files if (stat := file.stat())}


def seal(directory: Path, ready: protocol.Ready, collected: protocol.Collected | None) -> None:
    """Write what makes a directory with RAM files and device state a template, and take away the right to write."""
    for file in (*ram_files(directory), directory / "state"):
        file.chmod(0o400)
    record = {
        "ready": asdict(ready),
        "collected": asdict(collected) if collected else None,
        "state": digest(directory / "state"),
        "files": _stamp(directory),
    }
    (directory / RECORD).write_text(json.dumps(record))


def load(directory: Path, machine: qemu.Machine) -> Template | None:
    """The template in ``directory``, if it is there and whole."""
    try:
        record = json.loads((directory / RECORD).read_text())
        if record["files"] != _stamp(directory) or record["state"] != digest(directory / "state"):
            return None
        collected = protocol.Collected(**record["collected"]) if record["collected"] else None
        os.utime(directory / RECORD)  # used now: eviction goes by this
        return Template(machine, directory, protocol.Ready(**record["ready"]), collected)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def loaded(directory: Path, machine: qemu.Machine) -> Template:
    """The template in ``directory``, which was just made or found.

    :raises HostError: if it is not there any more.
    """
    template = load(directory, machine)
    if template is None:
        raise HostError(f"the template in {directory} changed under our hands")
    return template
