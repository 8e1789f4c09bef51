# SPDX-License-Identifier: GPL-2.0
"""Kernel sources. Each becomes a git tree in a repository in the cache.

A source is a distribution's package, a revision of a repository, or a directory with uncommitted changes. Patches are
applied to a git index, which writes nothing but objects. Each source has one work tree; checking out another patched
tree there writes only the files that differ, so that ``make`` compiles only what changed. The user's own trees and
repositories are never written to: new objects go into the repository in the cache, which has the user's object
directory as an alternate.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

from harness import arch
from harness.build.series import Patch
from harness.debian import deb
from harness.debian.apt import Archive
from harness.debian.apt_root import Package
from harness.debian.search import search
from harness.debian.version import version_key
from harness.errors import BuildError, FetchError, HostError, PatchError, SpecError
from harness.host.cache import Cache, Progress, disk_trouble, host_trouble, locked, silent
from harness.host.process import find_program

#: A third of the source that is left out of work trees, because no kernel built here needs it. Patches may change it.
#: The last entry holds register tables of one graphics driver.
LEFT_OUT = ("/Documentation/*", "!/Documentation/Kconfig", "/drivers/gpu/drm/amd/include/asic_reg/")


@dataclass(frozen=True)
class SourceVersion:
    """One version of a source. Equal digests mean equal contents."""

    #: SHA-256 of the package file, or the ID of the git tree
    digest: str
    #: text for reports and messages
    description: str


class Source(ABC):
    """Where kernel source comes from."""

    @property
    @abstractmethod
    def label(self) -> str:
        """A short name."""

    @abstractmethod
    def identify(self, cache: Cache, archive: Archive) -> SourceVersion:
        """Find out which version the source has now. Takes a second at most, and fetches no source.

        :raises SpecError: if there is no such source.
        :raises FetchError: if no index of the archive can be read.
        """

    @abstractmethod
    def store(self, cache: Cache) -> SourceStore:
        """Where its objects, its work tree and its output directories are kept."""

    @abstractmethod
    def fetch(self, version: SourceVersion, cache: Cache, archive: Archive) -> str:
        """Bring the source into its store. The caller must hold the lock of the store.

        :returns: the ID of its git tree.
        """


@dataclass(frozen=True)
class SourceStore:
    """A directory that holds everything that is kept of one source."""

    root: Path
    progress: Progress = silent

    @classmethod
    def of(cls, cache: Cache, name: str) -> SourceStore:
        """The store called ``name``."""
        return cls((cache.root / "sources" / name).resolve(), cache.progress)

    @property
    def tree(self) -> Path:
        """The work tree."""
        return self.root / "tree"

    @property
    def git_dir(self) -> Path:
        """The repository; it is configured as a bare one."""
        return self.root / "git"

    def locked(self, part: str = "") -> AbstractContextManager[None]:
        """Hold the lock of the store, of which there is one because there is one work tree.

        :param part: name of a part that has a lock of its own.
        """
        lock = self.root / f"lock{part}"
        return locked(lock, f"another run that builds {self.root.name}", self.progress)

    def init(self, objects: Path, object_format: str = "sha1") -> None:
        """Create the repository unless it exists.

        :param objects: the object directory of a user's repository, from which objects are read as well; or that of
            this repository.
        :param object_format: git's hash algorithm in that object directory.
        """
        if not (self.git_dir / "HEAD").exists():
            with host_trouble(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
            self.git("init", "--quiet", "--bare", f"--object-format={object_format}", str(self.git_dir), bare=True)
            self.git("config", "core.sparseCheckout", "true")
            self.git("config", "core.compression", "1")
            info = self.git_dir / "info"
            info.mkdir(exist_ok=True)
            negated = (each.removeprefix("!") if each.startswith("!") else f"!{each}" for each in LEFT_OUT)
            (info / "sparse-checkout").write_text("\n".join(["/*", *negated, ""]))
        if objects != self.git_dir / "objects":
            (self.git_dir / "objects/info/alternates").write_text(f"{objects}\n")

    def git(self, *args: str, bare: bool = False, stdin: bytes = b"", index: Path | None = None, work: str = "") -> str:
        """Run git on this repository, without any configuration of the user or the host.

        :param bare: ``args`` name the repository.
        :param index: the index to use instead of the work tree's.
        :param work: the work tree to use instead of :attr:`tree`.
        :returns: its output without the last newline.
        :raises BuildError: if git ends with an error.
        :raises HostError: if the disk is full.
        """
        where = {} if bare else {"GIT_DIR": str(self.git_dir), "GIT_WORK_TREE": work or str(self.tree)}
        done = run_git(args, stdin, GIT_INDEX_FILE=str(index or self.root / "index"), **UNCONFIGURED, **where)
        if done.returncode and b"No space left on device" in done.stderr:
            raise HostError(disk_trouble(self.root, "is on a full file system"))
        if done.returncode:
            raise BuildError(f"git {args[0]} failed in {self.root}: {git_complaint(done)}")
        return done.stdout.decode(errors="replace").rstrip("\n")

    def apply(self, tree: str, patches: Sequence[Patch]) -> str:
        """Apply patches to a tree; no work tree is changed.

        :returns: the ID of the patched tree.
        :raises PatchError: if a patch does not apply; names the patch and the hunk.
        """
        if not patches:
            return tree
        with TemporaryDirectory(dir=self.root, prefix="apply-") as scratch:
            index = Path(scratch, "index")
            self.git("read-tree", tree, index=index)
            for number, patch in enumerate(patches, 1):
                command = ("apply", "--cached", "--whitespace=nowarn", "-")
                done = run_git(
                    command, patch.diff, GIT_DIR=str(self.git_dir), GIT_INDEX_FILE=str(index), **UNCONFIGURED
                )
                if done.returncode:
                    raise PatchError(_does_not_apply(patch, f"{number} of {len(patches)}", done))
            return self.git("write-tree", index=index)

    def read(self, tree: str, path: str) -> str:
        """A file of a tree.

        :raises BuildError: if the tree has no such file.
        """
        return self.git("cat-file", "blob", f"{tree}:{path}") + "\n"

    def write(self, tree: str, files: Mapping[str, str]) -> str:
        """Replace files of a tree, or add them; no work tree is changed.

        :param files: their contents by path.
        :returns: the ID of the new tree.
        """
        with TemporaryDirectory(dir=self.root, prefix="write-") as scratch:
            index = Path(scratch, "index")
            self.git("read-tree", tree, index=index)
            for path, text in files.items():
                blob = self.git("hash-object", "-w", "--stdin", stdin=text.encode())
                self.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{path}", index=index)
            return self.git("write-tree", index=index)

    def checkout(self, tree: str) -> Path:
        """Check out ``tree`` into the work tree. Files that do not differ keep their times.

        :returns: the work tree.
        """
        with host_trouble(self.root):
            self.tree.mkdir(parents=True, exist_ok=True)
        (self.root / "index.lock").unlink(
            missing_ok=True
        )  # left by a run that was killed: the lock of the store is held
        self.git("read-tree", "--reset", "-u", tree)
        return self.tree

    def snapshot(self, directory: Path, seed: Path | None) -> str:
        """Make a tree of a directory as it is now, without the files that its .gitignore files exclude.

        :param seed: the index of the user's repository. Most files are in it already, which saves time.
        :returns: the ID of the tree.
        """
        index = self.root / "snapshot-index"
        index.with_name("snapshot-index.lock").unlink(missing_ok=True)
        if seed and not index.exists():
            shutil.copyfile(seed, index)
        try:
            self.git("add", "--all", ".", index=index, work=str(directory))
        except BuildError:
            index.unlink(missing_ok=True)  # the seed cannot be used by another repository, or is damaged
            self.git("add", "--all", ".", index=index, work=str(directory))
        return self.git("write-tree", index=index, work=str(directory))


#: Environment variables by which git reads no configuration of the user or the host.
UNCONFIGURED = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


def run_git(args: Sequence[str], stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run git to its end, whatever that is.

    :param environment: variables for it; of this process's own, those of git are left out.
    """
    git = find_program("git", "git")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env = {**inherited, "LC_ALL": "C", **environment}
    # The environment names the work tree, but "." in the arguments means the current directory.
    cwd = environment.get("GIT_WORK_TREE")
    return subprocess.run(
        [git, *args],
        input=stdin,
        capture_output=True,
        env=env,
        check=False,
        cwd=cwd if cwd and Path(cwd).is_dir() else None,
    )


def git_complaint(done: subprocess.CompletedProcess[bytes]) -> str:
    """What git said last, of a run that failed."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("fatal: ").removeprefix("error: ") if lines else f"status {done.returncode}"


def _does_not_apply(patch: Patch, which: str, done: subprocess.CompletedProcess[bytes]) -> str:
    text = done.stderr.decode(errors="replace")
    failed = [
        patch.hunk(file, int(line)) for file, line in re.findall(r"^error: patch failed: (.*):(\d+)$", text, re.M)
    ]
    others = [line.removeprefix("error: ") for line in text.splitlines() if not line.endswith("does not apply")]
    others = [line for line in others if not line.startswith("patch failed: ")]
    reason = "; ".join([*(f"{each} fails" for each in failed), *others]) or f"status {done.returncode}"
    return f"patch {which} does not apply: {patch.name}: {reason}"


@dataclass(frozen=True)
class PackageSource(Source):
    """A package ``linux-source-X.Y`` of Debian: the newest version of the series."""

    name: str

    @property
    def label(self) -> str:
        """See :attr:`Source.label`."""
        return self.name

    def identify(self, cache: Cache, archive: Archive) -> SourceVersion:
        """See :meth:`Source.identify`."""
        package = self._packages(archive)[0]
        return SourceVersion(package.sha256, f"{package.name} {package.version}")

    def store(self, cache: Cache) -> SourceStore:
        """See :meth:`Source.store`. Versions of a series share one, because most of their files are the same."""
        return SourceStore.of(cache, self.name)

    def fetch(self, version: SourceVersion, cache: Cache, archive: Archive) -> str:
        """See :meth:`Source.fetch`."""
        store = self.store(cache)
        store.init(store.git_dir / "objects")
        wanted = f"refs/heads/{version.digest}"
        with suppress(BuildError):
            return store.git("rev-parse", "--quiet", "--verify", f"{wanted}^{{tree}}")
        (path,) = archive.download([each for each in self._packages(archive) if each.sha256 == version.digest][:1])
        archive.progress(f"unpacking {version.description}")
        _import(path, store, wanted)
        return store.git("rev-parse", "--verify", f"{wanted}^{{tree}}")

    def _packages(self, archive: Archive) -> tuple[Package, ...]:
        """All versions, the newest first."""
        found = search(archive, arch.host(), lambda each: each.name == self.name)
        if found.fitting:
            return found.fitting
        names = {each.name for each in found.listed if each.name.startswith("linux-source-")}
        have = ", ".join(sorted(names, key=lambda name: version_key(name.rpartition("-")[2]))) or "no source at all"
        raise SpecError(
            f"Debian's archive no longer has {self.name}, but {have}: give a tree of that version instead, "
            "with --kernel=PATH+PATCHES"
        )


def _import(package: Path, store: SourceStore, ref: str) -> None:
    """Turn the tarball in a source package into git objects, without writing its files to disk."""
    command = [find_program("git", "git"), f"--git-dir={store.git_dir}"]
    command += ["-c", "core.compression=1", "-c", "pack.compression=1", "fast-import", "--quiet", "--done", "--force"]
    env = {**os.environ, **UNCONFIGURED}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as process:
        pipe, complaints = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stderr)
        try:
            with suppress(BrokenPipeError):  # git has failed: its message is read below
                pipe.write(f"commit {ref}\ncommitter harness <> 0 +0000\ndata 0\n".encode())
                empty = True
                for mode, path, content in _tarball(package):
                    empty = False
                    pipe.write(b'M %s inline "%s"\ndata %d\n' % (mode, _quoted(path), len(content)))
                    pipe.write(content + b"\n")
                if empty:
                    raise FetchError(f"{package.name} holds no kernel source: give a tree with --kernel=PATH")
                pipe.write(b"done\n")
                pipe.close()
        except BaseException:
            process.kill()
            raise
        complaint = complaints.read().decode(errors="replace").strip()
    if process.returncode:
        raise BuildError(f"{package.name} cannot be unpacked into {store.root}: {complaint}")


def _quoted(path: str) -> bytes:
    return path.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").encode()


def _tarball(package: Path) -> Iterator[tuple[bytes, str, bytes]]:
    """Git's file mode, the path and the content of each file of the tarball in a source package."""
    for member, content in deb.members(package):
        if content is None or not re.fullmatch(r"usr/src/linux-source-[\d.]+\.tar\.\w+", member.name):
            continue
        with tarfile.open(fileobj=content, mode="r|*") as tarball:
            for each in tarball:
                path = each.name.removeprefix("./").partition("/")[2]
                if each.isreg() and path:
                    data = cast(IO[bytes], tarball.extractfile(each)).read()
                    yield b"100755" if each.mode & 0o100 else b"100644", path, data
                elif each.issym() and path:
                    yield b"120000", path, each.linkname.encode()


class _LocalSource(Source):
    """A source in a directory of this host."""

    path: Path

    def store(self, cache: Cache) -> SourceStore:
        """See :meth:`Source.store`. A tree and its revisions share one."""
        path = self.path.resolve()
        return SourceStore.of(cache, f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}")

    def fetch(self, version: SourceVersion, cache: Cache, archive: Archive) -> str:
        """See :meth:`Source.fetch`. The objects are in the store already, or in the user's repository."""
        self._init(self.store(cache))
        return version.digest

    def _init(self, store: SourceStore) -> None:
        objects, object_format = store.git_dir / "objects", "sha1"
        if self._repository:
            objects, object_format = self._repository[0], self._repository[2]
        store.init(objects, object_format)

    @cached_property
    def _repository(self) -> tuple[Path, Path, str] | None:
        """The object directory, the index and the object format of the git repository; None if this is not its top."""
        lines = self._ask("rev-parse", "--show-cdup", "--git-path", "objects", "--git-path", "index").splitlines()
        if len(lines) != 3 or lines[0]:
            return None
        return (
            (self.path / lines[1]).resolve(),
            (self.path / lines[2]).resolve(),
            self._ask("rev-parse", "--show-object-format").strip(),
        )

    def _ask(self, *args: str) -> str:
        done = run_git(("-C", str(self.path), *args))
        return done.stdout.decode(errors="replace") if done.returncode == 0 else ""


@dataclass(frozen=True)
class GitSource(_LocalSource):
    """A revision of a git repository."""

    path: Path
    ref: str

    @property
    def label(self) -> str:
        """See :attr:`Source.label`."""
        return f"{self.path.resolve().name}-{self.ref}"

    def identify(self, cache: Cache, archive: Archive) -> SourceVersion:
        """See :meth:`Source.identify`."""
        if not self._repository:
            raise SpecError(f"{self.path} is not the top of a git repository")
        found = self._ask("rev-parse", "--verify", "--end-of-options", f"{self.ref}^{{tree}}").strip()
        if not found:
            raise SpecError(f"{self.path} has no revision {self.ref!r}: see git -C {self.path} branch -a, or git tag")
        return SourceVersion(
            found, f"{self._ask('describe', '--tags', '--always', self.ref).strip() or self.ref} of {self.path}"
        )


@dataclass(frozen=True)
class TreeSource(_LocalSource):
    """A kernel source tree as it is, with its uncommitted changes."""

    path: Path

    @property
    def label(self) -> str:
        """See :attr:`Source.label`."""
        return self.path.resolve().name

    def identify(self, cache: Cache, archive: Archive) -> SourceVersion:
        """See :meth:`Source.identify`."""
        store = self.store(cache)
        self._init(store)
        with store.locked("-snapshot"):
            tree = store.snapshot(self.path.resolve(), self._repository[1] if self._repository else None)
        return SourceVersion(tree, f"{self.path} (tree {tree[:12]})")
