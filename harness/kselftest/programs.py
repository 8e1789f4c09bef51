# SPDX-License-Identifier: GPL-2.0
"""Compiles upstream's test programs with the kernel's own Makefiles, and caches them.

Only a part of the source is needed, and it is unpacked from git into a directory of its own. The work tree that kernels
are built in is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.arch import Architecture
from harness.build.builder import Toolchain
from harness.build.series import patchset_hash
from harness.build.source import UNCONFIGURED, SourceStore, git_complaint, run_git
from harness.debian.apt import Archive
from harness.errors import BuildError
from harness.host.cache import Cache, host_trouble
from harness.host.process import find_program, killed_with_parent
from harness.kselftest import toolchain
from harness.kselftest.sources import DIRECTORY, Origin

#: must change when this module compiles differently, so that cached programs are compiled again
_GENERATION = "4"

#: what the goal "headers" of the kernel's Makefile and the tests need; {arch} is the directory below arch/
_PARTS = (
    "Kbuild",
    "Makefile",
    "arch/{arch}/Makefile",
    "arch/{arch}/entry/syscalls",
    "arch/{arch}/include",
    "arch/{arch}/tools",
    "include/asm-generic",
    "include/uapi",
    "include/vdso",
    "mm/gup_test.h",
    "scripts",
    "tools/arch",
    "tools/build",
    "tools/include",
    "tools/scripts",
    "tools/testing/selftests",
    "usr",
)

#: what the Makefile of the tests builds for an architecture
_LIST = "list-programs: ; @echo $(notdir $(TEST_GEN_PROGS) $(TEST_GEN_FILES))"

_REASONS = "reasons.json"


@dataclass(frozen=True)
class Programs:
    """The programs of one source for one architecture."""

    #: describes the source
    source: str
    #: holds the programs by their names
    directory: Path
    #: why programs are missing that the source does not have for this architecture
    missing: dict[str, str]
    #: why programs are missing that do not compile
    broken: dict[str, str]


def compiled(origin: Origin, arch: Architecture, names: Sequence[str], cache: Cache, archive: Archive) -> Programs:
    """Take the programs from the cache, or compile them now.

    :param names: programs of ``tools/testing/selftests/mm``.
    :raises SpecError: if the source does not exist.
    :raises FetchError: if the source or the C library cannot be fetched.
    :raises HostError: if this host lacks a program, or disk space.
    :raises PatchError: if a patch does not apply.
    :raises BuildError: if the kernel's headers cannot be made.
    """
    compiler = Toolchain.of(arch)
    root = toolchain.sysroot(arch, cache, archive)
    version = origin.source.identify(cache, archive)
    series = patchset_hash(origin.patches)
    parts = [_GENERATION, version.digest, series, compiler.version, *toolchain.flags(arch, root), *names]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    described = version.description + (f" + {len(origin.patches)} patches" if origin.patches else "")

    def make(target: Path) -> None:
        store = origin.source.store(cache)
        with store.locked():
            tree = store.apply(origin.source.fetch(version, cache, archive), origin.patches)
        archive.progress(f"compiling upstream's tests of {described} for {arch}")
        with host_trouble(store.root), TemporaryDirectory(dir=store.root, prefix="kselftest-") as scratch:
            _unpack(store, tree, arch, Path(scratch))
            build = _Build(Path(scratch), compiler, root, store.root / f"kselftest-{arch}.log")
            reasons = build.run(names, target)
        (target / _REASONS).write_text(json.dumps({"missing": reasons[0], "broken": reasons[1]}))

    directory = cache.tree("kselftests", f"{arch}={key}", make)
    reasons = json.loads((directory / _REASONS).read_text())
    return Programs(described, directory, reasons["missing"], reasons["broken"])


def _unpack(store: SourceStore, tree: str, arch: Architecture, target: Path) -> None:
    """Write the parts of a git tree that are needed to ``target``."""
    wanted = [part.format(arch=arch.srcarch) for part in _PARTS]
    have = store.git("ls-tree", "--name-only", tree, *wanted).splitlines()
    done = run_git(["archive", tree, *have], b"", GIT_DIR=str(store.git_dir), **UNCONFIGURED)
    if done.returncode:
        raise BuildError(f"the sources of upstream's tests cannot be read from {store.root}: {git_complaint(done)}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(target, filter="data")


class _Build:
    """One run of the Makefiles.

    :param source: the unpacked source.
    :param root: see :func:`harness.kselftest.toolchain.sysroot`.
    :param log: receives what make prints.
    """

    def __init__(self, source: Path, compiler: Toolchain, root: Path, log: Path) -> None:
        self._source = source
        self._compiler = compiler
        self._root = root
        self._log = log
        self._output = source / "out"
        self._programs = source / "programs"

    def run(self, names: Sequence[str], target: Path) -> tuple[dict[str, str], dict[str, str]]:
        """Compile programs to ``target``; returns why some are missing, and why some do not compile."""
        for directory in (self._output, self._programs):
            directory.mkdir()
        self._log.write_bytes(b"")
        arch = self._compiler.arch
        if trouble := self._make(self._source, [f"O={self._output}", "headers"]):
            raise BuildError(
                f"the kernel's headers for upstream's tests cannot be made: {trouble}\nthe whole log is {self._log}"
            )
        built = set(self._ask("-s", f"--eval={_LIST}", "list-programs").split())
        missing = {name: f"{DIRECTORY} builds no {name} for {arch}" for name in names if name not in built}
        wanted = [name for name in names if name in built]
        self._compile("-k", *wanted)
        broken = {}
        for name in wanted:
            if not (self._programs / name).exists() and (trouble := self._compile(name)):
                broken[name] = trouble
                continue
            shutil.copyfile(self._programs / name, target / name)
        return missing, broken

    def _compile(self, *words: str) -> str:
        """Compile some programs; returns the first complaint, or nothing."""
        goals = [word if word.startswith("-") else str(self._programs / word) for word in words]
        return self._make(self._source / DIRECTORY, [*self._flags(), *goals]) if goals else ""

    def _flags(self) -> list[str]:
        return [
            f"OUTPUT={self._programs}",
            f"KHDR_INCLUDES=-isystem {self._output}/usr/include",
            *toolchain.flags(self._compiler.arch, self._root),
        ]

    def _ask(self, *words: str) -> str:
        """What a goal of the tests' Makefile prints."""
        done = self._run(self._source / DIRECTORY, [*self._flags(), *words])
        return done.stdout.decode(errors="replace")

    def _make(self, directory: Path, words: Sequence[str]) -> str:
        """Run make; returns the first complaint if it fails."""
        done = self._run(directory, words)
        if done.returncode == 0:
            return ""
        lines = done.stdout.decode(errors="replace").splitlines()
        errors = [line for line in lines if re.search(r"\berror: |undefined reference|cannot find", line)]
        return (errors or [line for line in lines if "***" in line] or ["make said nothing"])[0]

    def _run(self, directory: Path, words: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        arch = self._compiler.arch
        command = [find_program("make", "make"), "-C", str(directory), f"-j{len(os.sched_getaffinity(0))}"]
        command += [f"ARCH={arch.kbuild}", f"CROSS_COMPILE={self._compiler.prefix}", *words]
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        done = subprocess.run(
            killed_with_parent(command, "TERM"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**kept, "LC_ALL": "C"},
            check=False,
        )
        with self._log.open("ab") as log:
            log.write(f"{' '.join(map(repr, command))}\n".encode() + done.stdout)
        return done
