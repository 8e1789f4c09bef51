# SPDX-License-Identifier: GPL-2.0
"""Where templates live: made under locks, kept for later runs, dropped when they are old or in the way."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from harness import paths
from harness.deadline import Deadline
from harness.errors import BootError, GuestLost
from harness.guests.guest import Guest, Patience
from harness.guests.template import RECORD, Template, TemplateError, digest, freeze, load, loaded, ram_files, seal, thaw
from harness.host.cache import Progress
from harness.host.process import find_program
from harness.machine import qemu
from harness.machine.vm import Vm

#: Raised when what a template holds changes in a way its key does not show.
FORMAT = 1


#: All templates of a user together take at most this share of the file system they are on, oldest dropped first.
_SHARE = 0.25


#: Seconds without use after which a template is dropped.
_MAX_AGE = 7 * 86400.0


#: Bytes of free space below which a file system counts as full.
_FULL = 1 << 20


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
            if (kept := load(directory, machine)) is not None:
                return self._hold(kept)
            with _being_made(directory) as fresh:
                progress(f"booting {machine.arch} once with {machine.accelerator.name}, for a template")
                self._make_room(machine.memory << 20)
                ram = qemu.Ram(ram_files(fresh), shared=True)
                with _full_disk_explained(self.root), Vm(machine, ram=ram) as vm:
                    deadline = Deadline.after(patience.boot)
                    vm.connect(deadline)
                    vm.run(deadline)
                    ready = Guest(vm, patience).hello(deadline)
                    freeze(vm, fresh, Deadline.after(patience.answer))
                seal(fresh, ready, None)
            return self._hold(loaded(directory, machine))

    def with_tests(
        self, base: Template, archive: bytes, args: list[str], patience: Patience, progress: Progress
    ) -> Template:
        """``base`` with these tests collected, made now if need be."""
        parts = [base.directory.name.encode(), archive, "\0".join(args).encode()]
        key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
        with self._entry(key) as directory:
            if (kept := load(directory, base.machine)) is not None:
                return self._hold(kept)
            with _being_made(directory) as fresh:
                progress("collecting the tests in a clone of it")
                self._make_room(base.machine.memory << 20)
                for source, target in zip(base.ram, ram_files(fresh), strict=True):
                    _copy_sparse(source, target)
                ram = qemu.Ram(ram_files(fresh), shared=True)
                with _full_disk_explained(self.root), Vm(base.machine, ram=ram, incoming=True) as vm:
                    thaw(vm, base.directory, Deadline.after(patience.answer))
                    guest = Guest(vm, patience)
                    ready = guest.hello(Deadline.after(patience.answer))
                    collected = guest.collect(archive, args, Deadline.after(patience.boot))
                    freeze(vm, fresh, Deadline.after(patience.answer))
                seal(fresh, ready, collected)
            return self._hold(loaded(directory, base.machine))

    def _hold(self, template: Template) -> Template:
        """Keep other runs from dropping a template for as long as we clone it."""
        # Opened through a lock of its own: the entry's is for those who make it.
        file = (template.directory / RECORD).open()
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
            (entry for entry in self.root.iterdir() if (entry / RECORD).exists()),
            key=lambda entry: (entry / RECORD).stat().st_mtime,
        )
        sizes = {entry: sum(file.stat().st_blocks * 512 for file in entry.iterdir()) for entry in kept}
        free = usage.free
        for entry in kept:
            age = time.time() - (entry / RECORD).stat().st_mtime
            crowded = sum(sizes.values()) + size > usage.total * _SHARE or free < size
            if (age > _MAX_AGE or crowded) and _dropped(entry):
                free += sizes.pop(entry)
        if shutil.disk_usage(self.root).free < size:
            raise TemplateError(f"{self.root} has no room for {size >> 20} MiB of guest memory")


def _dropped(entry: Path) -> bool:
    """Remove a template unless a run clones it."""
    with (entry / RECORD).open() as file:
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
    files = [digest(machine.kernel), digest(machine.initrd)]
    parts = (FORMAT, program, binary.st_size, binary.st_mtime_ns, devices, files)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


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
