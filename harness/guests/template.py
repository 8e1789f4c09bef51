# SPDX-License-Identifier: GPL-2.0
"""Templates and clones: a guest is booted once and saved, and clones of it start in a fraction of a second.

A template consists of the guest's memory and the state of its devices. The memory is in files that QEMU maps shared
while the template is made. The device state is written by a migration that leaves out the memory (the capability
``x-ignore-shared``). A clone maps the same files privately, so that the host copies only the pages that the clone
writes to, and loads the device state. Clones run at the same time and never change the template.

There are two layers of templates. The guest of a base has booted to its agent. The guest of the layer above has also
collected the tests. When a test changes, only the upper layer is made again, and no guest boots.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.agent import protocol
from harness.deadline import Deadline
from harness.errors import HarnessError
from harness.host.cache import sha256
from harness.machine import qemu
from harness.machine.vm import Vm

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]


#: the file that describes a template; runs that use the template hold a lock on it
RECORD = "template.json"


class TemplateError(HarnessError):
    """A template cannot be made or used on this host. Guests can still be booted."""


@dataclass(frozen=True)
class Template:
    """A saved guest.

    :param machine: the machine of the guest and of its clones.
    :param directory: contains the memory files, the device state, and :data:`RECORD`.
    :param ready: the agent's description of the guest.
    :param collected: the collected tests; None for a base.
    """

    machine: qemu.Machine
    directory: Path
    ready: protocol.Ready
    collected: protocol.Collected | None

    @property
    def ram(self) -> tuple[Path, ...]:
        """The memory files, one for each NUMA node."""
        return ram_files(self.directory)

    def clone(self) -> Vm:
        """Start the QEMU process of a clone. Call :func:`thaw` before using it."""
        return Vm(self.machine, ram=qemu.Ram(self.ram, shared=False), incoming=True)


def thaw(vm: Vm, directory: Path, deadline: Deadline) -> None:
    """Load the device state in ``directory`` into a machine that waits for it, and start the machine.

    :raises TemplateError: if QEMU cannot load it.
    """
    vm.connect(deadline)
    vm.qmp.execute("migrate-set-capabilities", deadline, capabilities=_CAPABILITIES)
    vm.qmp.execute("migrate-incoming", deadline, uri=f"exec:cat {shlex.quote(str(directory / 'state'))}")
    _finish_migration(vm, deadline)
    vm.run(deadline)


def freeze(vm: Vm, directory: Path, deadline: Deadline) -> None:
    """Stop a machine, and write its device state into ``directory``, where its memory files are.

    :raises TemplateError: if QEMU or a device does not support migration.
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
        deadline.check("QEMU to migrate the device state")
        vm.check()
        time.sleep(0.002)


def ram_files(directory: Path) -> tuple[Path, ...]:
    """The memory files in the directory of a template, one for each NUMA node."""
    return tuple(directory / f"ram{node}" for node in range(qemu.NODES))


def _stamp(directory: Path) -> dict[str, list[int]]:
    """Attributes that show whether a file changed. A digest of half a GiB would take as long as a boot."""
    files = (*ram_files(directory), directory / "state")
    return {file.name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for file in files if (stat := file.stat())}


def seal(directory: Path, ready: protocol.Ready, collected: protocol.Collected | None) -> None:
    """Make a directory with memory files and device state a template: write its record, and make it read-only."""
    for file in (*ram_files(directory), directory / "state"):
        file.chmod(0o400)
    record = {
        "ready": asdict(ready),
        "collected": asdict(collected) if collected else None,
        "state": sha256(directory / "state"),
        "files": _stamp(directory),
    }
    (directory / RECORD).write_text(json.dumps(record))


def load(directory: Path, machine: qemu.Machine) -> Template | None:
    """The template in ``directory``; None if it is missing or damaged."""
    try:
        record = json.loads((directory / RECORD).read_text())
        if record["files"] != _stamp(directory) or record["state"] != sha256(directory / "state"):
            return None
        collected = protocol.Collected(**record["collected"]) if record["collected"] else None
        os.utime(directory / RECORD)  # the time of last use, by which old templates are removed
        return Template(machine, directory, protocol.Ready(**record["ready"]), collected)
    except (OSError, ValueError, KeyError, TypeError):
        return None
