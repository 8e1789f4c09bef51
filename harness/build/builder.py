# SPDX-License-Identifier: GPL-2.0
"""Builds kernels and caches them.

Source, patches, configuration and compiler determine a kernel completely. A built kernel is cached under a key made of
these four, and no source tree has to be read to compute that key. Two more things make a new build short: output
directories are kept, so that ``make`` compiles only what a patch changed, and ccache is used if it is installed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path

from harness.arch import Architecture
from harness.build import dotconfig, kconfig, schemata
from harness.build.kconfig import MergedFragments
from harness.build.mutants import Mutants
from harness.build.series import Patch, patchset_hash
from harness.build.source import Source, SourceVersion
from harness.debian.apt import Archive
from harness.errors import BuildError, HarnessError, HostError
from harness.host import requirements
from harness.host.cache import Cache, host_trouble
from harness.host.process import killed_with_parent, version_line

#: must change when this module builds kernels differently, so that cached kernels are built again
_GENERATION = "1"
#: output directories kept for each source; one takes 300 MB, or 2 GB with debug information
_KEPT = 3
#: what programs say when they fail for a reason that is not in the source
_HOST_TROUBLE = (
    "No space left on device",
    "Disk quota exceeded",
    "Cannot allocate memory",
    "virtual memory exhausted",
    "Killed signal terminated program",
)
#: seconds between two progress messages
_TELL_EVERY = 0.5
#: lines of make's output for each option that is set, for a first estimate (7.3 with 883 options: 2046 lines)
_STEPS_PER_OPTION = 2.5


@dataclass(frozen=True)
class BuildProvenance:
    """What a kernel was built from. Equal provenances give identical kernels."""

    #: description of the source
    source: str
    #: SHA-256 of the source package, or the ID of the git tree
    source_digest: str
    #: number of patches
    patches: int
    #: digest of the patches as KCIDB defines it; empty if there are none
    patchset_hash: str
    #: names of the presets and the page size
    configuration: str
    #: SHA-256 of the complete ``.config``
    config_digest: str
    #: compiler and linker with their versions
    compiler: str

    def __str__(self) -> str:
        patched = f" + {self.patches} patches ({self.patchset_hash[:16]}…)" if self.patches else ""
        return f"{self.source}{patched}, {self.configuration} configuration {self.config_digest[:16]}…, {self.compiler}"


@dataclass(frozen=True)
class BuiltKernel:
    """A kernel in the cache. The output of make is in the file ``build.log`` beside its boot image."""

    provenance: BuildProvenance
    #: as ``uname -r`` shows it
    release: str
    boot_image: Path
    config: Path
    #: the ELF file with debug information; None if the kernel was configured without
    vmlinux: Path | None


@dataclass(frozen=True)
class Toolchain:
    """The compiler for one architecture on this host."""

    arch: Architecture
    #: ``CROSS_COMPILE``
    prefix: str

    @classmethod
    def of(cls, arch: Architecture) -> Toolchain:
        """The host's own compiler, or the cross compiler that Debian packages.

        :raises HostError: if it is not installed.
        """
        compiler = (f"{arch.cross_prefix}gcc", f"{arch.cross_prefix}ld")
        rows = [row for row in requirements.needed([requirements.BUILD], arch.machine) if row.name in compiler]
        if missing := requirements.packages(row for row in rows if not row.found()):
            raise HostError(
                f"this host cannot compile kernels for {arch}: install its compiler with: "
                f"apt-get install {' '.join(missing)}"
            )
        return cls(arch, arch.cross_prefix)

    @cached_property
    def version(self) -> str:
        """The first line of ``--version`` of compiler and linker."""
        programs = (f"{self.prefix}gcc", f"{self.prefix}ld")
        return ", ".join(version_line(each) for each in programs)

    def variables(self) -> list[str]:
        """The variables for make's command line."""
        ccache = "ccache " if shutil.which("ccache") else ""
        return [
            f"ARCH={self.arch.kbuild}",
            f"CROSS_COMPILE={self.prefix}",
            f"CC={ccache}{self.prefix}gcc",
            f"HOSTCC={ccache}gcc",
        ]


@dataclass(frozen=True)
class BuildRequest:
    """A kernel to build."""

    arch: Architecture
    source: Source
    patches: tuple[Patch, ...]
    #: deliberate bugs to compile in after the patches
    mutants: Mutants | None
    #: names of the presets and the page size
    configuration: str
    #: the options that the configuration sets
    wanted: MergedFragments
    #: name for messages
    label: str

    @property
    def stem(self) -> str:
        """The readable part of cache keys. The label is not in it, so equal kernels with two labels are cached once."""
        return f"{self.configuration}-{self.arch}".replace(":", "-")


def build(request: BuildRequest, cache: Cache, archive: Archive) -> BuiltKernel:
    """Take a kernel from the cache, or build it now.

    :raises SpecError: if the source does not exist.
    :raises FetchError: if the source cannot be fetched.
    :raises HostError: if this host lacks a program, or disk space.
    :raises PatchError: if a patch does not apply.
    :raises ConfigError: if an option cannot have its value in this source.
    :raises BuildError: if the kernel does not compile.
    """
    return _Build(request, cache, archive).run()


def identify(request: BuildRequest, cache: Cache, archive: Archive) -> str:
    """What :func:`build` would make, in words that change with the kernel's bytes; nothing is built.

    :raises SpecError: if the source does not exist.
    :raises FetchError: if its description cannot be had.
    :raises HostError: if this host lacks the compiler.
    """
    made = _Build(request, cache, archive)
    return f"{made.version.description} {_digest(made.inputs, request.wanted.text)}"


class _Build:
    """The build of one kernel."""

    def __init__(self, request: BuildRequest, cache: Cache, archive: Archive) -> None:
        self.request = request
        self.cache = cache
        self.archive = archive
        self.toolchain = Toolchain.of(request.arch)
        self.store = request.source.store(cache)
        self._patched: str | None = None

    @cached_property
    def version(self) -> SourceVersion:
        return self.request.source.identify(self.cache, self.archive)

    @cached_property
    def inputs(self) -> list[str]:
        """Everything that the kernel is made of, except its configuration."""
        series = patchset_hash(self.request.patches)
        mutants = [schemata.digest(self.request.mutants)] if self.request.mutants else []
        return [_GENERATION, self.request.arch.name, self.version.digest, series, *mutants, self.toolchain.version]

    def run(self) -> BuiltKernel:
        request = self.request
        inputs = self.inputs
        config = self.cache.file(
            "configs", f"{request.stem}={_digest(inputs, request.wanted.text)}", self._configure, name="config"
        )
        config_digest = self.cache.digest(config)
        provenance = BuildProvenance(
            source=self.version.description,
            source_digest=self.version.digest,
            patches=len(request.patches),
            patchset_hash=patchset_hash(request.patches),
            configuration=request.configuration,
            config_digest=config_digest,
            compiler=self.toolchain.version,
        )

        def make(target: Path) -> None:
            self._compile(config, target)
            (target / "provenance.json").write_text(json.dumps(asdict(provenance), indent=1))

        made = self.cache.tree("builds", f"{request.stem}={_digest(inputs, config_digest)}", make)
        vmlinux = made / "vmlinux"
        return BuiltKernel(
            provenance=provenance,
            release=(made / "release").read_text().strip(),
            boot_image=made / "image",
            config=made / "config",
            vmlinux=vmlinux if vmlinux.exists() else None,
        )

    def _checkout(self) -> Path:
        """The work tree with the patched source; the caller must hold the lock of the store."""
        if self._patched is None:
            tree = self.request.source.fetch(self.version, self.cache, self.archive)
            self._patched = self.store.apply(tree, self.request.patches)
            if self.request.mutants:
                files = schemata.files(self.request.mutants, partial(self.store.read, self._patched))
                self._patched = self.store.write(self._patched, files)
        return self.store.checkout(self._patched)

    def _configure(self, target: Path) -> None:
        """Write the complete ``.config`` to ``target``, and check that it has every option that was asked for."""
        check_host()
        request = self.request
        with self.store.locked():
            source = self._checkout()
            self.archive.progress(f"{request.label}: configuring")
            for before, after in request.wanted.redefined:
                self.archive.progress(
                    f"{request.label}: {after} of {after.origin} replaces {before} of {before.origin}"
                )
            output = source / f"out-config-{request.arch}"
            output.mkdir(exist_ok=True)
            (output / "wanted").write_text(request.wanted.text)
            for goal in (["allnoconfig", "KCONFIG_ALLCONFIG=wanted"], ["olddefconfig"]):
                log = self._log("config")
                if self._make(source, output, goal, log):
                    shutil.rmtree(output)  # a run that was killed may have left an incomplete program in it
                    raise self._failure("cannot be configured", log)
            text = (output / ".config").read_text()
            kconfig.check(request.wanted, dotconfig.parse(text), source, request.arch.srcarch)
        target.write_text(text)

    def _compile(self, config: Path, target: Path) -> None:
        """Build the kernel, and copy what is needed to boot and to inspect it to ``target``."""
        check_host()
        arch = self.request.arch
        with self.store.locked(), host_trouble(self.store.root):
            source = self._checkout()
            options = dotconfig.parse(config.read_text())
            debug_info = options.get("DEBUG_INFO") == "y"
            output = self._output(source, config)
            unfinished = output / ".unfinished"
            if unfinished.exists():
                # That build was killed, and make does not notice incomplete object files.
                shutil.rmtree(output)
            output.mkdir(exist_ok=True)
            unfinished.touch()
            if not (output / ".config").exists() or (output / ".config").read_bytes() != config.read_bytes():
                shutil.copyfile(config, output / ".config")
            log = self._log("build")
            goal = [Path(arch.tree_image).name]
            if debug_info:
                # Debug information contains the name of the source directory, which differs from host to host.
                goal += [f"{name}=-fdebug-prefix-map={source}=/linux" for name in ("KCFLAGS", "KAFLAGS")]
            steps = source.parent / f"steps-{arch}"
            estimate = int(steps.read_text()) if steps.exists() else int(_STEPS_PER_OPTION * len(options))
            if (output / arch.tree_image).exists():
                estimate = 0  # make compiles only what changed since, and nobody knows how much that is
            progress = _Progress(f"{self.request.label}: building", estimate, self.archive.progress)
            try:
                status = self._make(source, output, goal, log, progress.line)
            finally:
                unfinished.unlink()  # make ended by itself, so all files are complete
            if status:
                raise self._failure("does not compile", log)
            if estimate and progress.done > estimate // 2:
                steps.write_text(str(progress.done))
            for name, place in (("image", arch.tree_image), ("config", ".config"), ("System.map", "System.map")):
                shutil.copyfile(output / place, target / name)
            shutil.copyfile(output / "include/config/kernel.release", target / "release")
            if debug_info:
                shutil.copyfile(output / "vmlinux", target / "vmlinux")
            shutil.move(log, target / "build.log")

    def _output(self, source: Path, config: Path) -> Path:
        """The output directory for this configuration and compiler; the least recently used ones are removed."""
        # It is directly below the source, where kbuild calls the source "..". So no object contains the name of a
        # directory, and ccache finds an object whatever the output directory is called.
        name = f"out-{self.request.arch}-{_digest([self.toolchain.version], self.cache.digest(config))}"
        others = [each for each in source.glob("out-*-*") if each.name != name and "config" not in each.name]
        others.sort(key=lambda each: each.stat().st_mtime, reverse=True)
        for each in others[_KEPT - 1 :]:
            shutil.rmtree(each, ignore_errors=True)
        return source / name

    def _log(self, what: str) -> Path:
        """Where make's output goes; it stays there if make fails."""
        return self.store.root / f"{what}-{re.sub(r'[^A-Za-z0-9.+:_-]+', '-', self.request.label)}.log"

    def _failure(self, what: str, log: Path) -> HarnessError:
        """The error of a make that failed: the source's, unless the log shows that the host is to blame."""
        lines = log.read_text(errors="replace").splitlines()
        if trouble := next((line for line in lines if any(each in line for each in _HOST_TROUBLE)), None):
            return HostError(
                f"this host could not build {self.request.label}: {trouble.strip()}\n"
                f"make room, or give it more memory; the whole log is {log}"
            )
        errors = [line for line in lines if re.search(r"\berror: |undefined reference|^/bin/sh: |^Kconfig:.*", line)]
        errors = errors or [line for line in lines if "***" in line] or lines[-1:] or ["make said nothing"]
        said = [f"{self.request.label} {what}: {errors[0]}", *errors[1:10], f"the whole log is {log}"]
        return BuildError("\n".join(said))

    def _make(
        self, source: Path, output: Path, goal: Sequence[str], log: Path, line: Callable[[str], None] | None = None
    ) -> int:
        """Run make to its end.

        :param line: called with each line of output.
        :returns: the exit status.
        """
        command = ["make", "-C", str(source), f"O={output}", f"-j{len(os.sched_getaffinity(0))}"]
        command += [*self.toolchain.variables(), *goal]
        ccache = self.cache.root / "ccache"
        # On SIGTERM, make ends the processes that it started and removes incomplete files.
        argv = killed_with_parent(command, "TERM")
        with log.open("w", buffering=1) as record:
            record.write(f"{' '.join(map(repr, command))}\n")
            with subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=_environment(ccache),
                start_new_session=True,
            ) as process:
                assert process.stdout is not None
                try:
                    for each in process.stdout:
                        record.write(each)
                        if line:
                            line(each)
                except BaseException:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                    raise
        return process.returncode


def _environment(ccache: Path) -> Mapping[str, str]:
    """The environment of make: nothing of the host that could change the kernel."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return {
        **kept,
        "LC_ALL": "C",
        "KBUILD_BUILD_TIMESTAMP": "Thu Jan  1 00:00:00 UTC 1970",
        "KBUILD_BUILD_VERSION": "1",
        "KBUILD_BUILD_USER": "harness",
        "KBUILD_BUILD_HOST": "harness",
        "CCACHE_DIR": str(ccache),
        # No object contains the name of a directory (see _output), and checking out a source gives headers new times.
        "CCACHE_NOHASHDIR": "1",
        "CCACHE_SLOPPINESS": "time_macros,include_file_mtime,include_file_ctime",
    }


class _Progress:
    """Reports how far make is, by the lines that it prints."""

    def __init__(self, what: str, estimate: int, tell: Callable[[str], None]) -> None:
        self._what = what
        self._estimate = estimate
        self._tell = tell
        self._started = self._told = time.monotonic()
        self._linking = False
        self.done = 0

    def line(self, line: str) -> None:
        """Count a line such as ``  CC      mm/mremap.o``."""
        found = re.match(r"  ([A-Z]\S*) +(?:\[M\] +)?(\S+)", line)
        if not found:
            return
        self.done += 1
        linking = self._linking or found[2] in ("vmlinux.unstripped", "vmlinux", "vmlinux.o")
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY or linking != self._linking:
            self._tell(f"{self._what}, {'linking' if linking else self._share(now - self._started)}")
            self._told = now
        self._linking = linking

    def _share(self, elapsed: float) -> str:
        """How much is done, and how much time is left."""
        if not self._estimate:
            return f"{self.done} changed files so far"
        if self.done >= self._estimate:
            return f"{self.done} files, more than estimated"
        left = elapsed / self.done * (self._estimate - self.done)
        time_left = f"{left / 60:.0f} min" if left >= 90 else f"{left:.0f} s"
        return f"{self.done / self._estimate:.0%} ({self.done} of about {self._estimate} files), about {time_left} left"


def _digest(parts: Sequence[str], *more: str) -> str:
    return hashlib.sha256("\0".join([*parts, *more]).encode()).hexdigest()[:24]


def check_host() -> None:
    """Make sure that this host has all that a build runs beside the compiler, and say in one line what it lacks.

    :raises HostError: naming the packages.
    """
    rows = [row for row in requirements.needed([requirements.BUILD]) if not row.optional]
    if missing := requirements.packages(row for row in rows if not row.found()):
        raise HostError(
            f"this host cannot build kernels: install what is missing with: apt-get install {' '.join(missing)}"
        )
