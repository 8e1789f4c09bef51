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

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from harness import paths, qemu
from harness.agent import protocol
from harness.cache import Progress
from harness.deadline import Deadline
from harness.errors import BootError, GuestLost, HarnessError, HostError
from harness.guest import Guest, Patience
from harness.process import find_program
from harness.vm import Vm

#: Raised when what a template holds changes in a way its key does not show.
FORMAT = 1

_CAPABILITIES = [{"capability": "x-ignore-shared", "state": True}]

#: All templates of a user together take at most this share of the file system they are on, oldest dropped first.
_SHARE = 0.25
#: Seconds without use after which a template is dropped.
_MAX_AGE = 7 * 86400.0

#: The file that describes a template; locked by the runs that clone it.
_RECORD = "template.json"

#: Bytes of free space below which a file system counts as full.
_FULL = 1 << 20


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
        return _ram(self.directory)

    def clone(self) -> Vm:
        """Start a clone's process; :func:`thaw` it before use."""
        return Vm(self.machine, ram=qemu.Ram(self.ram, shared=False), incoming=True)


def _ram(directory: Path) -> tuple[Path, ...]:
    return tuple(directory / f"ram{node}" for node in range(qemu.NODES))


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


class Store:
    """Where templates live, under locks.

    :param root: a directory of this user's own; on tmpfs where there is room, so that making one costs no disk I/O.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else _default_root()
        self._held: list[IO[str]] = []

    def close(self) -> None:
        """Let go of the templates that were given out: from now on they may be dropped."""
        while self._held:
            self._held.pop().close()

    def base(self, machine: qemu.Machine, patience: Patience, progress: Progress) -> Template:
        """The template of a machine that has booted to its agent, made now if need be.

        :raises BootError: if the kernel does not get there.
        :raises TemplateError: if the machine cannot be frozen here.
        """
        key = _key(machine)
        with self._entry(key) as directory:
            if (kept := _load(directory, machine)) is not None:
                return self._hold(kept)
            with _being_made(directory) as fresh:
                progress(f"booting {machine.arch} once with {machine.accelerator.name}, for a template")
                self._make_room(machine.memory << 20)
                ram = qemu.Ram(_ram(fresh), shared=True)
                with _full_disk_explained(self.root), Vm(machine, ram=ram) as vm:
                    deadline = Deadline.after(patience.boot)
                    vm.connect(deadline)
                    vm.run(deadline)
                    ready = Guest(vm, patience).hello(deadline)
                    freeze(vm, fresh, Deadline.after(patience.answer))
                _seal(fresh, ready, None)
            return self._hold(_loaded(directory, machine))

    def with_tests(
        self, base: Template, archive: bytes, args: list[str], patience: Patience, progress: Progress
    ) -> Template:
        """``base`` with these tests collected, made now if need be."""
        parts = [base.directory.name.encode(), archive, "\0".join(args).encode()]
        key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
        with self._entry(key) as directory:
            if (kept := _load(directory, base.machine)) is not None:
                return self._hold(kept)
            with _being_made(directory) as fresh:
                progress("collecting the tests in a clone of it")
                self._make_room(base.machine.memory << 20)
                for source, target in zip(base.ram, _ram(fresh), strict=True):
                    _copy_sparse(source, target)
                ram = qemu.Ram(_ram(fresh), shared=True)
                with _full_disk_explained(self.root), Vm(base.machine, ram=ram, incoming=True) as vm:
                    thaw(vm, base.directory, Deadline.after(patience.answer))
                    guest = Guest(vm, patience)
                    ready = guest.hello(Deadline.after(patience.answer))
                    collected = guest.collect(archive, args, Deadline.after(patience.boot))
                    freeze(vm, fresh, Deadline.after(patience.answer))
                _seal(fresh, ready, collected)
            return self._hold(_loaded(directory, base.machine))

    def _hold(self, template: Template) -> Template:
        """Keep other runs from dropping a template for as long as we clone it."""
        # Opened through a lock of its own: the entry's is for those who make it.
        file = (template.directory / _RECORD).open()
        fcntl.flock(file, fcntl.LOCK_SH)
        self._held.append(file)
        return template

    @contextlib.contextmanager
    def _entry(self, key: str) -> Iterator[Path]:
        """The directory of one template, with its lock held: whoever comes second finds it made."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.root.stat().st_uid != os.geteuid():
                raise TemplateError(f"{self.root} belongs to another user")
            lock = (self.root / f"{key}.lock").open("w")
        except OSError as error:
            raise TemplateError(f"cannot write a template below {self.root}: {error}") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield self.root / key

    def _make_room(self, size: int) -> None:
        """Drop templates that are old, then those used longest ago, until ``size`` bytes more are within bounds."""
        usage = shutil.disk_usage(self.root)
        kept = sorted(
            (entry for entry in self.root.iterdir() if (entry / _RECORD).exists()),
            key=lambda entry: (entry / _RECORD).stat().st_mtime,
        )
        sizes = {entry: sum(file.stat().st_blocks * 512 for file in entry.iterdir()) for entry in kept}
        free = usage.free
        for entry in kept:
            age = time.time() - (entry / _RECORD).stat().st_mtime
            crowded = sum(sizes.values()) + size > usage.total * _SHARE or free < size
            if (age > _MAX_AGE or crowded) and _dropped(entry):
                free += sizes.pop(entry)
        if shutil.disk_usage(self.root).free < size:
            raise TemplateError(f"{self.root} has no room for {size >> 20} MiB of guest memory")


def _dropped(entry: Path) -> bool:
    """Remove a template unless a run clones it."""
    with (entry / _RECORD).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _remove(entry)
        return True


def _remove(entry: Path) -> None:
    """Remove a template at one blow: QEMU would make up a RAM file that is missing from a directory still there."""
    doomed = entry.with_suffix(".old")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    """Writing guest memory to a file system without room kills QEMU by SIGBUS: not the kernel's fault, nor QEMU's.

    :raises TemplateError: in place of the lost guest.
    """
    try:
        yield
    except (BootError, GuestLost) as error:
        if shutil.disk_usage(root).free < _FULL:
            raise TemplateError(f"{root} filled up while guest memory was written there") from error
        raise


def _default_root() -> Path:
    shm = Path("/dev/shm")
    if os.access(shm, os.W_OK):
        return shm / f"{paths.APP}-{os.geteuid()}"
    return paths.cache_dir() / "templates"


def _key(machine: qemu.Machine) -> str:
    """A digest of all that a frozen guest depends on."""
    program = Path(find_program(machine.arch.qemu, machine.arch.qemu_package)).resolve()
    binary = program.stat()
    anywhere = qemu.Wiring(Path(), None, 0, (0,) * len(qemu.PORTS))
    devices = qemu.arguments(machine, anywhere)
    files = [_digest(machine.kernel), _digest(machine.initrd)]
    parts = (FORMAT, program, binary.st_size, binary.st_mtime_ns, devices, files)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _being_made(directory: Path) -> Iterator[Path]:
    """A scratch directory that becomes ``directory`` if all goes well."""
    fresh = directory.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)  # what a killed run left: we hold the lock
    fresh.mkdir(mode=0o700)
    try:
        yield fresh
        _remove(directory)
        fresh.rename(directory)
    except OSError as error:
        raise TemplateError(f"cannot write a template below {directory.parent}: {error}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file, leaving holes where it has them."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        offset = 0
        while offset < size:
            try:
                start = os.lseek(reader.fileno(), offset, os.SEEK_DATA)
            except OSError:
                break  # only a hole is left
            offset = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            writer.seek(start)
            while start < offset:
                start += os.sendfile(writer.fileno(), reader.fileno(), start, offset - start)


def _stamp(directory: Path) -> dict[str, list[int]]:
    """What shows that a file was touched since it was sealed. Reading half a GiB for a digest would cost a boot."""
    files = (*_ram(directory), directory / "state")
    return {file.name: [stat.st_size, stat.st_mtime_ns, stat.st_ino] for file in files if (stat := file.stat())}


def _seal(directory: Path, ready: protocol.Ready, collected: protocol.Collected | None) -> None:
    for file in (*_ram(directory), directory / "state"):
        file.chmod(0o400)
    record = {
        "ready": asdict(ready),
        "collected": asdict(collected) if collected else None,
        "state": _digest(directory / "state"),
        "files": _stamp(directory),
    }
    (directory / _RECORD).write_text(json.dumps(record))


def _load(directory: Path, machine: qemu.Machine) -> Template | None:
    """The template in ``directory``, if it is there and whole."""
    try:
        record = json.loads((directory / _RECORD).read_text())
        if record["files"] != _stamp(directory) or record["state"] != _digest(directory / "state"):
            return None
        collected = protocol.Collected(**record["collected"]) if record["collected"] else None
        os.utime(directory / _RECORD)  # used now: eviction goes by this
        return Template(machine, directory, protocol.Ready(**record["ready"]), collected)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _loaded(directory: Path, machine: qemu.Machine) -> Template:
    template = _load(directory, machine)
    if template is None:
        raise HostError(f"the template in {directory} changed under our hands")
    return template
