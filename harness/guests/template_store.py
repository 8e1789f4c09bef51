# SPDX-License-Identifier: GPL-2.0
"""Keeps templates for later runs, and removes them when they are old or take too much space."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

from harness import paths
from harness.deadline import Deadline
from harness.errors import BootError, GuestLost
from harness.guests.guest import Guest, Patience
from harness.guests.template import RECORD, Template, TemplateError, freeze, load, ram_files, seal, thaw
from harness.host.cache import Progress, sha256
from harness.host.process import find_program
from harness.host.pruning import Kept, disk_size, free
from harness.machine import qemu
from harness.machine.vm import Vm

#: Must be incremented when the contents of templates change in a way that their key does not show.
FORMAT = 1


#: All templates of a user take at most this share of their file system. The oldest are removed first.
_SHARE = 0.25


#: The memory of a small guest in bytes. A tmpfs whose share is less holds no template.
_SMALLEST = 256 << 20


#: A template is removed when it was not used for this many seconds.
_MAX_AGE = 7 * 86400.0


#: A file system with less free space than this, in bytes, is considered full.
_FULL = 1 << 20


class TemplateStore:
    """A directory of templates, each with a lock.

    :param root: a directory of this user; by default on tmpfs if there is one, so that no disk is written to.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root if root is not None else _default_root()
        self._held: list[IO[str]] = []

    def close(self) -> None:
        """Release the templates that this store returned. Other runs may remove them from now on."""
        while self._held:
            self._held.pop().close()

    def base(self, machine: qemu.Machine, patience: Patience, progress: Progress) -> Template:
        """The template of a machine that has booted to its agent; made now if there is none.

        :raises BootError: if the kernel does not reach the agent.
        :raises TemplateError: if the machine cannot be saved on this host.
        """
        key = _key(machine)
        with self._entry(key) as directory:
            if (kept := self._hold(directory, machine)) is not None:
                return kept
            with _being_made(directory) as fresh:
                progress(f"booting {machine.arch} once with {machine.accelerator.name}, for a template")
                self._make_room(machine.memory << 20)
                ram = qemu.Ram(ram_files(fresh), shared=True)
                with _full_disk_reported(self.root), Vm(machine, ram=ram) as vm:
                    deadline = Deadline.after(patience.boot)
                    vm.connect(deadline)
                    vm.run(deadline)
                    ready = Guest(vm, patience).hello(deadline)
                    freeze(vm, fresh, Deadline.after(patience.answer))
                seal(fresh, ready, None)
            return self._made(directory, machine)

    def with_tests(
        self, base: Template, archive: bytes, args: list[str], patience: Patience, progress: Progress
    ) -> Template:
        """The template of ``base`` with these tests collected; made now if there is none."""
        parts = [base.directory.name.encode(), archive, "\0".join(args).encode()]
        key = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:32]
        with self._entry(key) as directory:
            if (kept := self._hold(directory, base.machine)) is not None:
                return kept
            with _being_made(directory) as fresh:
                progress("collecting the tests in a clone of it")
                self._make_room(base.machine.memory << 20)
                for source, target in zip(base.ram, ram_files(fresh), strict=True):
                    _copy_sparse(source, target)
                ram = qemu.Ram(ram_files(fresh), shared=True)
                with _full_disk_reported(self.root), Vm(base.machine, ram=ram, incoming=True) as vm:
                    thaw(vm, base.directory, Deadline.after(patience.answer))
                    guest = Guest(vm, patience)
                    ready = guest.hello(Deadline.after(patience.answer))
                    collected = guest.collect(archive, args, Deadline.after(patience.boot))
                    freeze(vm, fresh, Deadline.after(patience.answer))
                seal(fresh, ready, collected)
            return self._made(directory, base.machine)

    def kept(self) -> list[Kept]:
        """All templates that are kept."""
        return [
            Kept("templates", entry.name, disk_size(entry), _used(entry), partial(_remove_if_old, entry))
            for entry in self._entries()
        ]

    def _entries(self) -> list[Path]:
        """The directories of all templates, without those that are being made or removed."""
        found = sorted(self.root.iterdir()) if self.root.is_dir() else []
        return [entry for entry in found if not entry.suffix and (entry / RECORD).exists()]

    def _hold(self, directory: Path, machine: qemu.Machine) -> Template | None:
        """The template in ``directory``, which no other run removes until :meth:`close`; None if there is none."""
        # The lock of the entry is not used for this: it belongs to the run that makes the template.
        try:
            file = (directory / RECORD).open()
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        # Another run may have removed it while this one waited for the lock.
        found = load(directory, machine)
        if found is None:
            file.close()
        else:
            self._held.append(file)
        return found

    def _made(self, directory: Path, machine: qemu.Machine) -> Template:
        """The template that was just made.

        :raises TemplateError: if another run has removed it at once.
        """
        made = self._hold(directory, machine)
        if made is None:
            raise TemplateError(f"the template in {directory} was removed or changed as soon as it was made")
        return made

    @contextlib.contextmanager
    def _entry(self, key: str) -> Iterator[Path]:
        """The directory of one template, with its lock held, so that two runs do not make it twice."""
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
        """Remove old templates, and then the least recently used ones, until there is room for ``size`` more bytes.

        Other runs may do the same meanwhile.
        """
        usage = shutil.disk_usage(self.root)
        used = {entry: _used(entry) for entry in self._entries()}
        sizes = {entry: disk_size(entry) for entry in used}
        free = usage.free
        for entry in sorted(used, key=lambda entry: used[entry]):
            crowded = sum(sizes.values()) + size > usage.total * _SHARE or free < size
            if (time.time() - used[entry] > _MAX_AGE or crowded) and _remove_unless_used(entry):
                free += sizes.pop(entry)
        if shutil.disk_usage(self.root).free < size:
            raise TemplateError(f"{self.root} has no room for {size >> 20} MiB of guest memory")


def boot(machine: qemu.Machine, progress: Progress) -> None:
    """Boot a kernel to its agent, unless there is a template of it. A run of tests then clones that guest.

    :raises BootError: if it does not reach its agent.
    :raises HostError: if QEMU cannot be started.
    """
    store = TemplateStore()
    # A host that cannot save guests boots one for each test.
    with contextlib.closing(store), contextlib.suppress(TemplateError):
        store.base(machine, Patience.scaled(machine.accelerator.slowdown), progress)


def _used(entry: Path) -> float:
    """When a template was last used, in seconds since the epoch."""
    with contextlib.suppress(OSError):
        return (entry / RECORD).stat().st_mtime
    return 0.0


def _remove_if_old(entry: Path, before: float) -> bool:
    """See :class:`harness.host.pruning.Kept`."""
    with free(entry.with_name(f"{entry.name}.lock")) as ours:
        return ours and (entry / RECORD).exists() and _used(entry) < before and _remove_unless_used(entry)


def _remove_unless_used(entry: Path) -> bool:
    """Remove a template unless a run uses it. Returns whether it is gone."""
    try:
        with (entry / RECORD).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(entry)
    except BlockingIOError:
        return False
    except FileNotFoundError:  # another run has removed it
        pass
    return True


def _remove(entry: Path) -> None:
    """Remove a template. It is renamed first, because QEMU creates memory files that are missing in a directory."""
    doomed = entry.with_suffix(".old")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        entry.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_reported(root: Path) -> Iterator[None]:
    """Report a full file system, on which writing to guest memory kills QEMU with SIGBUS, as such.

    :raises TemplateError: instead of the error about the guest.
    """
    try:
        yield
    except (BootError, GuestLost) as error:
        if shutil.disk_usage(root).free < _FULL:
            raise TemplateError(f"{root} filled up while guest memory was written there") from error
        raise


def _default_root(shm: Path = Path("/dev/shm")) -> Path:
    # Containers have 64 MB there unless they are told otherwise. No template fits into that.
    if os.access(shm, os.W_OK) and shutil.disk_usage(shm).total * _SHARE >= _SMALLEST:
        return shm / f"{paths.APP}-{os.geteuid()}"
    return paths.cache_dir() / "templates"


def _key(machine: qemu.Machine) -> str:
    """A digest of everything that the contents of a template depend on."""
    program = Path(find_program(machine.arch.qemu, machine.arch.qemu_package)).resolve()
    binary = program.stat()
    anywhere = qemu.Wiring(Path(), None, 0, (0,) * len(qemu.PORTS))
    devices = qemu.arguments(machine, anywhere)
    files = [sha256(machine.kernel), sha256(machine.initrd)]
    parts = (FORMAT, program, binary.st_size, binary.st_mtime_ns, devices, files)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _being_made(directory: Path) -> Iterator[Path]:
    """A new directory that is renamed to ``directory`` if no exception is raised."""
    fresh = directory.with_suffix(".new")
    shutil.rmtree(fresh, ignore_errors=True)  # a killed run may have left it; the lock is held
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
    """Copy a sparse file with its holes."""
    with source.open("rb") as reader, target.open("wb") as writer:
        size = os.fstat(reader.fileno()).st_size
        writer.truncate(size)
        offset = 0
        while offset < size:
            try:
                start = os.lseek(reader.fileno(), offset, os.SEEK_DATA)
            except OSError:
                break  # the rest of the file is a hole
            offset = os.lseek(reader.fileno(), start, os.SEEK_HOLE)
            writer.seek(start)
            while start < offset:
                start += os.sendfile(writer.fileno(), reader.fileno(), start, offset - start)
