# SPDX-License-Identifier: GPL-2.0
"""Private apt roots: one directory for each suite and architecture, with its own index and no installed packages.

The only thing that is read of the host's own apt state is its configuration of proxies and certificates. Nothing of the
host is changed, and no root rights are needed. apt itself checks the signature of each index and the digest of each
package; none of its checks is switched off.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness.debian import commands
from harness.debian.mirror import Mirror
from harness.errors import FetchError, HostError
from harness.host.cache import Cache, Progress, disk_trouble, host_trouble, locked

#: an index that is older than this many seconds is fetched again
REFRESH_AFTER = 24 * 3600
#: the same, if the index lacks what is looked for, or if the last attempt failed
RETRY_AFTER = 3600

#: name, version and architecture, which together identify a package file
PackageId = tuple[str, str, str]

#: the packages of an index that kernels, their modules and their source are in
_KERNEL_PACKAGES = re.compile(
    r"^Package: (linux-(?:image|binary|modules|base)-\S+|linux-source-\d+\.\d+)$", re.MULTILINE
)


@dataclass(frozen=True)
class Package:
    """One version of a kernel package, as a signed index describes it."""

    name: str
    version: str
    #: Debian's name of the architecture, or "all"
    arch: str
    suite: str
    #: the digest of the package file
    sha256: str
    #: the Depends field as it is in the index
    depends: str


def cached_package(cache: Cache, package: PackageId) -> Path | None:
    """The file of a package, if it is in the cache."""
    filename = _filename(*package)
    return cache.get("debs", filename, name=filename)


@dataclass(frozen=True)
class AptRoot:
    """The apt root of one suite and architecture.

    :param progress: told what is fetched.
    :param arch: Debian's name of the architecture.
    """

    cache: Cache
    progress: Progress
    mirror: Mirror
    suite: str
    arch: str

    @property
    def path(self) -> Path:
        """The directory; its name includes the mirror and its keys, so that their indexes are never mixed up."""
        source = sha256(f"{self.mirror.base(self.suite)} {self.mirror.keyring}".encode()).hexdigest()[:8]
        return self.cache.root / "apt" / f"{self.suite}-{self.arch}-{source}"

    def refresh(self, max_age: float, *, again: bool = True) -> str:
        """Fetch the index unless it is younger than ``max_age`` seconds.

        An older index stays in use if the mirror cannot be reached. It does not if a signature is wrong.

        :param again: whether to try again what failed less than :data:`RETRY_AFTER` seconds ago.
        :returns: why there is no index, as a sentence without a full stop; empty if there is one.
        """
        if self._age("refreshed") < max_age:
            return ""
        with locked(self.path / "lock", f"another run that reads the index of {self.suite}", self.progress):
            if self._age("refreshed") < max_age:
                return ""
            usable = (self.path / "refreshed").exists()
            if self._age("trouble") < RETRY_AFTER and (usable or not again):
                return "" if usable else (self.path / "trouble").read_text()
            with host_trouble(self.cache.root):
                self._write_config()
            self.progress(f"reading the index of {self.suite} for {self.arch}")
            done = self._apt("apt-get", "update", "--quiet", "-o", "APT::Update::Error-Mode=any")
            trouble, offline = self._update_trouble(done)
            with host_trouble(self.cache.root):
                if not trouble:
                    (self.path / "trouble").unlink(missing_ok=True)
                    (self.path / "refreshed").touch()
                    return ""
                (self.path / "trouble").write_text(trouble)
                if not (offline and usable):
                    (self.path / "refreshed").unlink(missing_ok=True)  # the index may be forged
                    return trouble
            days = self._age("refreshed") / 86400
            self.progress(f"{trouble}; using the index of {self.suite} from {days:.1f} days ago")
            return ""

    def kernels(self) -> list[Package]:
        """The kernel packages in the index. They are kept in a file of their own, which is read much faster."""
        found = self._memo("packages", lambda: [asdict(each) for path in self._lists() for each in self._parse(path)])
        return [Package(**each) for each in found]

    def closure(self, names: Sequence[str], without: frozenset[str]) -> list[PackageId]:
        """All packages that installing ``names`` into an empty system takes, dependencies first.

        :param without: packages to leave out.
        :raises FetchError: if the suite lacks one of them.
        """

        def simulate() -> list[PackageId]:
            done = self._apt("apt-get", "install", "--simulate", "--quiet", "--no-install-recommends", *names)
            if done.returncode:
                why = commands.reason(done)
                raise FetchError(f"{self.suite} cannot satisfy {' '.join(names)} for {self.arch}: {why}")
            lines = re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", done.stdout, re.MULTILINE)
            return [(name.partition(":")[0], version, arch) for name, version, arch in lines]

        rows = self._memo("closure-" + sha256(" ".join(names).encode()).hexdigest()[:16], simulate)
        return [(name, version, arch) for name, version, arch in rows if name not in without]

    def download(self, packages: Sequence[PackageId]) -> None:
        """Fetch those packages into the cache that are not there yet.

        :raises FetchError: if one cannot be fetched.
        :raises HostError: if the disk is full.
        """
        if not self._missing(packages):
            return
        with locked(self.path / "lock", f"another run that fetches from {self.suite}", self.progress):
            missing = self._missing(packages)
            if not missing:
                return
            scratch = self.path / "download"
            with host_trouble(self.cache.root):
                self._write_config()  # an older version of this program may have written another one
                shutil.rmtree(scratch, ignore_errors=True)  # apt leaves incomplete files here when it is killed
                scratch.mkdir()
            what = ", ".join(name for name, _, _ in missing) if len(missing) < 5 else f"{len(missing)} packages"
            self.progress(f"fetching {what}")
            try:
                done = self._apt("apt-get", "download", "--quiet", *(f"{n}={v}" for n, v, _ in missing), cwd=scratch)
                if done.returncode:
                    self._raise_if_full(done)
                    raise FetchError(f"{what} cannot be fetched from {self.suite}: {commands.reason(done)}")
                for package in missing:
                    self._publish(scratch / _filename(*package))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, fetched: Path) -> None:
        def move(path: Path) -> None:
            shutil.move(fetched, path)

        self.cache.file("debs", fetched.name, move, name=fetched.name)

    def _missing(self, packages: Sequence[PackageId]) -> list[PackageId]:
        return [package for package in packages if cached_package(self.cache, package) is None]

    def _age(self, stamp: str) -> float:
        """Seconds since a file was written; infinite if there is none."""
        try:
            return time.time() - (self.path / stamp).stat().st_mtime
        except OSError:
            return float("inf")

    def _write_config(self) -> None:
        path = self.path
        for directory in ("lists/partial", "archives/partial", *(f"etc/{name}" for name in _ETC_DIRECTORIES)):
            (path / directory).mkdir(parents=True, exist_ok=True)
        (path / "status").touch()
        (path / "sources.list").write_text(
            f"deb [signed-by={self.mirror.keyring}] {self.mirror.base(self.suite)} {self.suite} main\n"
        )
        (path / "apt.conf").write_text(_CONFIG.format(path=path, arch=self.arch) + _host_transport())

    def _apt(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return commands.run(command, APT_CONFIG=str(self.path / "apt.conf"), cwd=cwd)

    def _lists(self) -> list[Path]:
        return sorted((self.path / "lists").glob("*_Packages*"))

    def _memo(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value that ``compute`` derives from the index; computed again only when the index has changed."""
        # apt sets the mtime of an index to the server's date, which has whole seconds. Two updates within a second
        # differ only in ctime.
        stats = [(path.name, path.stat()) for path in self._lists()]
        stamp = [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]
        kept = self.path / f"{name}.json"
        try:
            stored = json.loads(kept.read_bytes())
            if stored["stamp"] == stamp:
                return stored["value"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        value = compute()
        with host_trouble(self.cache.root):
            new = kept.with_name(f"{kept.name}.{os.getpid()}")
            new.write_text(json.dumps({"stamp": stamp, "value": value}))
            new.replace(kept)
        return value

    def _parse(self, path: Path) -> list[Package]:
        """The kernel packages in one index file."""
        done = self._apt("/usr/lib/apt/apt-helper", "cat-file", str(path))
        if done.returncode:
            raise FetchError(f"the index of {self.suite} cannot be read: {commands.reason(done)}")
        found = []
        for match in _KERNEL_PACKAGES.finditer(done.stdout):
            end = done.stdout.find("\n\n", match.start())
            fields = dict(re.findall(r"^(\S+): (.*)$", done.stdout[match.start() : end], re.MULTILINE))
            found.append(
                Package(
                    name=match[1],
                    version=fields["Version"],
                    arch=fields["Architecture"],
                    suite=self.suite,
                    sha256=fields["SHA256"],
                    depends=fields.get("Depends", ""),
                )
            )
        return found

    def _update_trouble(self, done: subprocess.CompletedProcess[str]) -> tuple[str, bool]:
        """Why an update failed, as a sentence that is empty for success; and whether the mirror was unreachable."""
        text = done.stdout + done.stderr
        if done.returncode == 0:
            return "", False
        self._raise_if_full(done)
        suite = self.suite
        if found := re.search(r"is expired \(invalid since ([^)]*)\)", text):
            return f"the Release file of {suite} has expired ({found[1]} ago): its mirror is no longer updated", False
        if re.search(r"NO_PUBKEY|BADSIG|EXPKEYSIG|KEYEXPIRED|not signed|invalid signature|couldn't be verified", text):
            return f"the signature of {suite} does not verify with {self.mirror.keyring}", False
        if re.search(r"does not have a Release file|404 ", text):
            return f"the mirror has no suite {suite}", False
        return f"the index of {suite} cannot be fetched ({commands.reason(done)})", True

    def _raise_if_full(self, done: subprocess.CompletedProcess[str]) -> None:
        if re.search(r"No space left on device|don't have enough free space", done.stdout + done.stderr):
            raise HostError(disk_trouble(self.cache.root, "is on a full file system"))


_ETC_DIRECTORIES = ("apt.conf.d", "preferences.d", "auth.conf.d", "trusted.gpg.d", "sources.list.d")

_CONFIG = """\
Dir "{path}/";
Dir::State "{path}";
Dir::State::status "{path}/status";
Dir::Cache "{path}";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Dir::Etc "{path}/etc";
Dir::Etc::sourcelist "{path}/sources.list";
Dir::Log "{path}";
APT::Architecture "{arch}";
APT::Architectures {{ "{arch}"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::PDiffs "false";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
"""


def _host_transport() -> str:
    """The host's own proxies and certificates, as lines for apt.conf."""
    lines = commands.run(["apt-config", "dump"]).stdout.splitlines()
    return "".join(f"{line}\n" for line in lines if re.match(r"Acquire::https?(::[\w.-]+)*::(proxy|ca)", line, re.I))


def _filename(name: str, version: str, arch: str) -> str:
    """The name that ``apt-get download`` gives to the file of a package."""
    return f"{name}_{version.replace(':', '%3a')}_{arch}.deb"
