# SPDX-License-Identifier: GPL-2.0
"""``harness doctor``: what works on this host, what is missing, and how to get it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import IO

from harness import __version__, arch, paths
from harness.arch import ARCHITECTURES, Architecture
from harness.debian.mirror import host_mirror
from harness.debian.suites import STABLE
from harness.errors import HarnessError
from harness.guests.template_store import TemplateStore
from harness.host import memory, requirements
from harness.host.cache import Cache
from harness.host.process import find_program, version_line
from harness.host.requirements import Requirement
from harness.host.terminal import colourful
from harness.machine import accelerator, userland

#: MiB a kernel, its modules, a userland and an initramfs need in the cache, with room to make them
_CACHE_NEEDS = 1500
#: MiB two templates of the default size need at most
_TEMPLATES_NEED = 1300
#: MiB for one guest of the default size, and pytest
_MEMORY_NEEDS = 900


class State(StrEnum):
    """How one thing stands."""

    OK = "ok"
    #: works, but slower or with less than it could
    LESS = "less"
    #: nothing of the kind works without it
    MISSING = "missing"
    #: not there, and only some features want it
    OPTIONAL = "optional"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    state: State
    #: what was found, or what is missing and what for
    text: str
    #: a command, or a sentence, that mends it; empty if nothing needs mending
    remedy: str = ""
    #: guests of no architecture run without it
    vital: bool = False


def main(*, as_json: bool = False) -> int:
    """Print the report; 0 if guests of some architecture can run.

    :param as_json: for programs instead of people; docs/hosts.md describes the form.
    """
    report = list(checks())
    if as_json:
        told = {"harness": __version__, "usable": usable(report), "checks": [asdict(each) for each in report]}
        print(json.dumps(told, indent=1))
    else:
        print_report(report, sys.stdout)
    return 0 if usable(report) else 1


def checks() -> Iterator[Check]:
    """Everything, in the order of the report."""
    yield _python()
    for architecture in ARCHITECTURES:
        yield _qemu(architecture)
        yield _accelerator(architecture)
    yield from map(_program, _programs_of_guests())
    yield _userland() if userland.lacking_programs() else _mirror()
    yield _space("cache", paths.cache_dir(), _CACHE_NEEDS, "kernels and images", "set XDG_CACHE_HOME to a bigger disk")
    yield _templates(TemplateStore().root)
    yield _memory()
    yield _cores()
    yield _drgn()
    yield from map(_extra, requirements.needed([requirements.EXTRAS]))
    yield from map(_compiler, ARCHITECTURES)
    yield from (_extra(row) for row in requirements.needed([requirements.BUILD]) if row.optional)


def usable(report: Iterable[Check]) -> bool:
    """Whether guests of at least one architecture can run."""
    report = list(report)
    emulators = {f"qemu {each}" for each in ARCHITECTURES}
    some = any(each.name in emulators and each.state is State.OK for each in report)
    return some and not any(each.vital and each.state is State.MISSING for each in report)


def _python() -> Check:
    pytest_version = metadata.version("pytest")
    text = f"{platform.python_version()}, pytest {pytest_version}, paramiko {metadata.version('paramiko')}"
    return Check("python", State.OK, text)


def _qemu(architecture: Architecture) -> Check:
    name = f"qemu {architecture}"
    try:
        program = find_program(architecture.qemu, architecture.qemu_package)
    except HarnessError:
        text = f"{architecture.qemu} is not installed: no {architecture} guests"
        state = State.OPTIONAL if architecture.best_effort else State.MISSING
        return Check(name, state, text, _install(architecture.qemu_package))
    version = re.search(r"version (\S+)", version_line(program, timeout=20))
    return Check(name, State.OK, f"{version[1] if version else 'version unknown'}, {program}")


def _accelerator(architecture: Architecture) -> Check:
    name = f"speed {architecture}"
    try:
        chosen = accelerator.choose(architecture)
    except HarnessError:
        return Check(name, State.OPTIONAL, "not tried: there is no QEMU for it")
    if chosen.name == "kvm":
        return Check(name, State.OK, f"kvm: {chosen.reason}")
    remedy = ""
    if architecture is arch.host() and os.path.exists("/dev/kvm") and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        remedy = f"{_sudo()}usermod -aG kvm {os.environ.get('USER', '$USER')}, then log in again"
    return Check(name, State.LESS, f"{chosen.name} (emulation): {chosen.reason}", remedy)


def _programs_of_guests() -> list[Requirement]:
    """What guests take beside QEMU, which has a line for each architecture, and the keyring: see _mirror."""
    rows = requirements.needed([requirements.GUESTS])
    return [row for row in rows if row.kind == requirements.PROGRAM and not row.machine]


def _program(row: Requirement) -> Check:
    path = shutil.which(row.name)
    if path:
        return Check(row.name, State.OK, path)
    if row.name in userland.lacking_programs():  # kernels may be files, and so may the userland: see _userland
        return Check(row.name, State.LESS, f"not installed: {row.purpose}")
    return Check(row.name, State.MISSING, f"not installed: {row.purpose}", _install(row.package), vital=True)


def _extra(row: Requirement) -> Check:
    path = shutil.which(row.name)
    if path:
        return Check(row.name, State.OK, path)
    return Check(row.name, State.OPTIONAL, f"not installed: {row.purpose}", _install(row.package))


def _userland() -> Check:
    """Where the guest's userland comes from on a host that cannot make it."""
    cache = Cache()
    kept = [str(each) for each in ARCHITECTURES if userland.cached(each, cache)]
    if kept:
        text = f"{' and '.join(kept)}, in the cache; kernels must be files, trees, or built from git"
        return Check("userland", State.OK, text)
    lacking = " and ".join(userland.lacking_programs())
    text = f"cannot be made without {lacking}, and none is in the cache"
    remedy = "on a Debian machine: harness userland --output FILE; then here: pytest --kernel=IMAGE --userland=FILE"
    return Check("userland", State.MISSING, text, remedy, vital=True)


def _mirror() -> Check:
    try:
        mirror = host_mirror()
    except HarnessError as error:
        problem, _, remedy = str(error).partition(": ")
        if "debian-archive-keyring" in remedy:
            remedy = _install("debian-archive-keyring")
        text = f"{problem}; built kernels need it too, for the guest's userland"
        return Check("mirror", State.MISSING, text, remedy, vital=True)
    text = f"{mirror.main}, keys in {mirror.keyring}"
    if not _reachable(f"{mirror.main}/dists/{STABLE}/InRelease"):
        text += "; not reachable now: only what is in the cache can be used"
        return Check("mirror", State.LESS, text, "see to the network, or to apt's own proxy settings")
    return Check("mirror", State.OK, text)


def _reachable(uri: str) -> bool:
    """Whether apt, with its own proxies, can fetch a file within a few seconds."""
    helper = Path("/usr/lib/apt/apt-helper")
    limits = ("-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=4", "-o", "Acquire::https::Timeout=4")
    with tempfile.TemporaryDirectory(prefix="mremap-doctor-") as directory:
        os.chmod(directory, 0o755)  # apt drops its rights before it fetches
        command = [str(helper), *limits, "download-file", uri, f"{directory}/file"]
        try:
            return subprocess.run(command, capture_output=True, check=False, timeout=15).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            return False


def _space(name: str, directory: Path, needed: int, purpose: str, remedy: str) -> Check:
    """Room in a directory that may not exist yet, in MiB."""
    existing = next(each for each in (directory, *directory.parents) if each.is_dir())
    free = shutil.disk_usage(existing).free >> 20
    text = f"{_size(free)} free in {directory}, for {purpose}"
    if not os.access(existing, os.W_OK):
        return Check(name, State.LESS, f"{directory} may not be written by this user", remedy)
    return Check(name, State.OK, text) if free >= needed else Check(name, State.LESS, text, remedy)


def _templates(root: Path) -> Check:
    """Room for the guests that clones are made of."""
    remedy = "mount -o remount,size=4G /dev/shm, or start the container with --shm-size=3g"
    found = _space("templates", root, _TEMPLATES_NEED, "frozen guests", remedy)
    if found.state is State.OK and not root.is_relative_to("/dev/shm"):
        # On a disk. Clones map these files privately, and read them through the page cache.
        return replace(found, state=State.LESS, text=f"{found.text}: /dev/shm cannot hold them", remedy=remedy)
    return found


def _memory() -> Check:
    free = memory.available()
    text = f"{_size(free)} available; a guest takes up to 640 MiB"
    return Check("memory", State.OK if free >= _MEMORY_NEEDS else State.LESS, text)


def _cores() -> Check:
    count = len(os.sched_getaffinity(0))
    return Check("cores", State.OK, f"{count}: pytest -n {count} runs that many guests side by side")


def _drgn() -> Check:
    if importlib.util.find_spec("drgn"):
        return Check("drgn", State.OK, metadata.version("drgn"))
    text = "not installed: reads kernel memory out of dumps"
    return Check("drgn", State.OPTIONAL, text, f"{sys.executable} -m pip install drgn")


def _compiler(architecture: Architecture) -> Check:
    """What builds kernels for an architecture."""
    rows = requirements.needed([requirements.BUILD], architecture.machine)
    missing = [row for row in rows if not row.optional and not row.found()]
    name = f"build {architecture}"
    if missing:
        text = f"{', '.join(row.name for row in missing)} not installed: building kernels"
        return Check(name, State.OPTIONAL, text, _install(*requirements.packages(missing)))
    return Check(name, State.OK, version_line(f"{architecture.cross_prefix}gcc", timeout=20))


def _install(*packages: str) -> str:
    if shutil.which("apt-get") is None:
        return f"install {', '.join(packages)}, as Debian calls it"
    return f"{_sudo()}apt-get install {' '.join(packages)}"


def _sudo() -> str:
    return "" if os.geteuid() == 0 else "sudo "


def _size(mebibytes: int) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes} MiB"


_COLOURS = {State.OK: "32", State.LESS: "33", State.MISSING: "31;1", State.OPTIONAL: "2"}


def print_report(report: Iterable[Check], out: IO[str]) -> None:
    """Aligned lines; what mends a thing stands below it. Colours only for people."""
    report = list(report)
    colours = colourful(out)
    width = max(len(each.name) for each in report)
    indent = " " * (width + 13)
    columns = max(60, shutil.get_terminal_size().columns) if out.isatty() else 0

    def paint(text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if colours else text

    for each in report:
        first, *more = (
            textwrap.wrap(each.text, columns - len(indent), break_on_hyphens=False) if columns else [each.text]
        )
        print(f"  {paint(f'{each.state:<8}', _COLOURS[each.state])}  {each.name:<{width}} {first}", file=out)
        for line in more:
            print(f"{indent}{line}", file=out)
        if each.remedy:
            print(f"{indent}{paint('→ ' + each.remedy, '36')}", file=out)
    print(f"\n{_summary(report)}", file=out)


def _summary(report: list[Check]) -> str:
    if not usable(report):
        return "No guest can run here yet: mend what is missing above."
    able = [
        str(each) for each in ARCHITECTURES if any(f.name == f"qemu {each}" and f.state is State.OK for f in report)
    ]
    missing = [each.name for each in report if each.state is State.MISSING]
    wanting = f", but without {', '.join(missing)}" if missing else ""
    kernel = "IMAGE" if userland.lacking_programs() else "debian:"
    return f"Guests of {' and '.join(able)} can run here{wanting}. Try: pytest --kernel={kernel} -k errno"
