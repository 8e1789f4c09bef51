# SPDX-License-Identifier: GPL-2.0
"""Debian packages, by way of apt in private roots below the cache.

Each suite and architecture has a root of its own, with an empty package state: nothing of the host's own apt state is
read beyond *where* its Debian mirror is, nothing is changed, and no root rights are needed. apt itself checks the
signature of each index and the digest of each package; none of its checks is ever switched off.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from harness.arch import Architecture, host
from harness.errors import FetchError, HostError, SpecError
from harness.host.cache import Cache, Progress, disk_trouble, host_trouble, locked, silent

#: Debian's release of the day, which the guest userland is made from
STABLE = "trixie"
#: what a suite is called besides its code name; moves on with each Debian release
ALIASES = {"stable": STABLE, "oldstable": "bookworm", "testing": "forky", "unstable": "sid", "rc-buggy": "experimental"}
#: suites that are searched for a kernel version
RELEASED = (
    "trixie", "trixie-security", "trixie-backports",
    "bookworm", "bookworm-security", "bookworm-backports",
)  # fmt: skip
#: ... and these only if no released suite has it: they change daily, and mirrors let them expire
UNRELEASED = ("forky", "sid", "experimental")

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "MREMAP_HARNESS_DEBIAN_MIRROR"
KEYRING_VARIABLE = "MREMAP_HARNESS_DEBIAN_KEYRING"

#: an index older than this (seconds) is fetched anew
REFRESH_AFTER = 24 * 3600
#: ... and after this, if it lacks what is looked for, or the last attempt failed
RETRY_AFTER = 3600

_SUFFIXES = ("", "-security", "-updates", "-backports", "-proposed-updates", "-backports-sloppy")
_CODENAMES = tuple(name for name in (*RELEASED, *UNRELEASED) if "-" not in name)
_WANTED = re.compile(r"^Package: (linux-(?:image|binary|modules|base)-\S+|linux-source-\d+\.\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """One version of a kernel package, as a signed index describes it."""

    name: str
    version: str
    #: Debian's name of the architecture, or "all"
    arch: str
    suite: str
    sha256: str
    #: the Depends field, verbatim
    depends: str


@dataclass(frozen=True)
class Mirror:
    """Where packages come from, and whose signature they must bear."""

    #: base URI of the main archive
    main: str
    #: base URI of the security archive; empty if not known
    security: str
    keyring: Path


def suites(name: str) -> tuple[str, ...]:
    """The suites meant by one name: a release comes with its security updates.

    :raises SpecError: if Debian has no suite of that name.
    """
    stem, dash, suffix = name.partition("-")
    stem = ALIASES.get(stem, stem)
    if name in ALIASES:
        stem, dash, suffix = ALIASES[name], "", ""
    full = stem + dash + suffix
    if stem not in _CODENAMES or dash + suffix not in _SUFFIXES or (dash and stem in ("sid", "experimental")):
        known = ", ".join((*ALIASES, *RELEASED, *UNRELEASED))
        raise SpecError(f"Debian has no suite {name!r} that we know of: use one of {known}")
    return (full, f"{full}-security") if f"{full}-security" in RELEASED else (full,)


def version_key(version: str) -> tuple[tuple[int, tuple[object, ...]], ...]:
    """A sort key for Debian versions, as deb-version(7) orders them."""
    epoch, colon, rest = version.partition(":")
    if not colon:
        epoch, rest = "0", version
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return ((int(epoch), ()), (0, _part_key(upstream)), (0, _part_key(revision)))


def _part_key(part: str) -> tuple[object, ...]:
    def char(letter: str) -> int:
        if letter == "~":
            return -1  # before everything, even the end
        return ord(letter) if letter.isalpha() else ord(letter) + 256

    # Alternating non-digits and digits; the end of a run of non-digits sorts as 0, after "~" and before letters.
    runs = re.findall(r"(\D*)(\d*)", part)
    return tuple((*map(char, text), 0, int(digits or 0)) for text, digits in runs)


def host_mirror(mirror: str = "", keyring: str = "") -> Mirror:
    """The Debian mirror this host is configured for, unless the user names another.

    :param mirror: URI of a Debian archive (what stands before ``dists/``); wins over the environment, and that
        over apt's own configuration.
    :param keyring: file with the keys that may sign it.
    :raises HostError: if there is none, or no keyring.
    """
    keys = Path(keyring or os.environ.get(KEYRING_VARIABLE, "") or KEYRING)
    if not keys.exists():
        raise HostError(
            f"the keys of the Debian archive are not at {keys}: install the package debian-archive-keyring, "
            f"or name another file with {KEYRING_VARIABLE}"
        )
    chosen = (mirror or os.environ.get(MIRROR_VARIABLE, "")).rstrip("/")
    if chosen:
        security = chosen + "-security" if chosen.endswith("/debian") else ""
        return Mirror(chosen, security, keys)
    main = security = ""
    for uri, suite, component in _host_sources():
        path = re.split(r"[/.]", uri)
        release, _, suffix = suite.partition("-")
        if component != "main" or not {"debian", "debian-security"}.intersection(path):
            continue  # another vendor's archive
        if release not in (*ALIASES, *_CODENAMES, "bullseye"):
            continue
        if suffix.startswith("security"):
            security = security or uri
        else:
            main = main or uri
    if not main:
        raise HostError(
            "this host's apt knows no Debian mirror to take kernels from: "
            f"name one with --debian-mirror=URI, or in the environment with {MIRROR_VARIABLE}=URI"
        )
    return Mirror(main, security or (main + "-security" if main.endswith("/debian") else ""), keys)


def _host_sources() -> list[tuple[str, str, str]]:
    """URI, suite and component of each source of packages in the host's own apt configuration.

    Read from the files, because apt itself lists a source only once its index has been fetched, which a fresh
    container has not done.
    """
    done = _run(["apt-config", "shell", "main", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"])
    places = dict(re.findall(r"^(\w+)='(.*)'$", done.stdout, re.MULTILINE))
    files = [Path(places["main"])] if "main" in places else []
    files += sorted(Path(places["parts"]).glob("*")) if "parts" in places else []
    rows: list[tuple[str, str, str]] = []
    for file in files:
        if not file.is_file() or file.suffix not in (".list", ".sources"):
            continue
        text = re.sub(r"^\s*#.*\n?", "", file.read_text(errors="replace"), flags=re.MULTILINE)
        rows += _stanzas(text) if file.suffix == ".sources" else _lines(text)
    return rows


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    for uri, suite, components in re.findall(r"^\s*deb\s+(?:\[.*?\]\s*)?(\S+)\s+(\S+)(.*)$", text, re.MULTILINE):
        for component in components.partition("#")[0].split():
            yield uri.rstrip("/"), suite, component


def _stanzas(text: str) -> Iterator[tuple[str, str, str]]:
    for stanza in re.split(r"\n\s*\n", text):
        fields = re.findall(r"^(\S+?):(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        values = {name.lower(): value.split() for name, value in fields}
        if "deb" in values.get("types", []) and values.get("enabled", ["yes"]) != ["no"]:
            names = ("uris", "suites", "components")
            for uri, suite, component in itertools.product(*(values.get(name, []) for name in names)):
                yield uri.rstrip("/"), suite, component


@dataclass(frozen=True)
class Archive:
    """The packages of one Debian mirror.

    :param cache: holds indexes and packages.
    :param mirror_uri: see :func:`host_mirror`, which is asked when the first index is needed.
    :param progress: told what is fetched, and which suite is left out.
    """

    cache: Cache
    mirror_uri: str = ""
    progress: Progress = silent

    @cached_property
    def mirror(self) -> Mirror:
        """Where packages come from.

        :raises HostError: see :func:`host_mirror`.
        """
        return host_mirror(self.mirror_uri)

    def packages(
        self, arch: Architecture, names: Iterable[str], *, strict: bool = False, max_age: float = REFRESH_AFTER
    ) -> list[Package]:
        """Every version of every kernel package in some suites.

        :param names: suites, each by its full code name.
        :param strict: whether it is an error that the first suite cannot be had. Others are left out with a note.
        :param max_age: fetch an index again that is older than this many seconds.
        :raises FetchError: if no index could be had (or, when strict, not the first).
        """
        wanted = tuple(names)
        roots = [_Root.of(self, name, arch) for name in wanted if self._base(name)]
        with ThreadPoolExecutor(max_workers=len(wanted)) as pool:
            troubles = list(pool.map(lambda root: root.refresh(max_age, again=strict), roots))
        reasons = "; ".join(filter(None, troubles))
        if reasons and (all(troubles) or (strict and troubles[0])):
            raise FetchError(reasons)
        if reasons:
            self.progress(f"{reasons}; going on without")
        return [
            package for root, trouble in zip(roots, troubles, strict=True) if not trouble for package in root.kernels()
        ]

    def download(self, packages: Sequence[Package]) -> list[Path]:
        """The package files, in order, from the cache or the mirror.

        :raises FetchError: if one cannot be had, or is not what its index says.
        :raises HostError: if the disk is full.
        """
        by_root: dict[tuple[str, str], list[Package]] = {}
        for package in packages:
            root = host().debian if package.arch == "all" else package.arch
            by_root.setdefault((package.suite, root), []).append(package)
        for (suite, root), group in by_root.items():
            _Root(self, suite, root).download([(each.name, each.version, each.arch) for each in group])
        found = [self._cached(each.name, each.version, each.arch) for each in packages]
        for package, path in zip(packages, found, strict=True):
            if path is None or self.cache.digest(path) != package.sha256:
                raise FetchError(
                    f"{package.name} {package.version} does not match the digest in the index of {package.suite}: "
                    "try again later, or with another mirror"
                )
        return [path for path in found if path is not None]

    def install_set(
        self, names: Sequence[str], arch: Architecture, suite: str = STABLE, without: Iterable[str] = ()
    ) -> list[Path]:
        """The package files that installing ``names`` into an empty system takes, dependencies first.

        :param without: packages to leave out, with nothing in their place.
        :raises FetchError: if a package does not exist or cannot be had.
        """
        root = _Root.of(self, suite, arch)
        if trouble := root.refresh(REFRESH_AFTER):
            raise FetchError(trouble)
        triples = root.closure(names, frozenset(without))
        root.download(triples)
        found = [self._cached(*triple) for triple in triples]
        return [path for path in found if path is not None]

    def _base(self, suite: str) -> str:
        return self.mirror.security if suite.endswith("-security") else self.mirror.main

    def _cached(self, name: str, version: str, arch: str) -> Path | None:
        filename = _filename(name, version, arch)
        return self.cache.get("debs", filename, name=filename)


@dataclass(frozen=True)
class _Root:
    """One suite for one architecture in an apt root of its own."""

    archive: Archive
    suite: str
    arch: str

    @classmethod
    def of(cls, archive: Archive, suite: str, arch: Architecture) -> _Root:
        return cls(archive, suite, arch.debian)

    @property
    def path(self) -> Path:
        # The mirror and its keys are part of the name: an index of one is never taken for that of another.
        mirror = self.archive.mirror
        source = sha256(f"{self.archive._base(self.suite)} {mirror.keyring}".encode()).hexdigest()[:8]
        return self.archive.cache.root / "apt" / f"{self.suite}-{self.arch}-{source}"

    def refresh(self, max_age: float, *, again: bool = True) -> str:
        """Have an index no older than ``max_age`` seconds if possible.

        :param again: whether to try what failed a short while ago.
        :returns: empty, or a sentence (without full stop) that says why there is no index.
        """
        if self._age("refreshed") < max_age:
            return ""
        progress = self.archive.progress
        with locked(self.path / "lock", f"another run that reads the index of {self.suite}", None, progress):
            if self._age("refreshed") < max_age:
                return ""
            usable = (self.path / "refreshed").exists()
            if self._age("trouble") < RETRY_AFTER and (usable or not again):
                return "" if usable else (self.path / "trouble").read_text()
            with host_trouble(self.archive.cache.root):
                self._write_config()
            progress(f"reading the index of {self.suite} for {self.arch}")
            done = self._apt("apt-get", "update", "--quiet", "-o", "APT::Update::Error-Mode=any")
            trouble, offline = self._judge_update(done)
            with host_trouble(self.archive.cache.root):
                if not trouble:
                    (self.path / "trouble").unlink(missing_ok=True)
                    (self.path / "refreshed").touch()
                    return ""
                (self.path / "trouble").write_text(trouble)
                if not (offline and usable):
                    (self.path / "refreshed").unlink(missing_ok=True)  # an index that may be forged is not used
                    return trouble
            days = self._age("refreshed") / 86400
            progress(f"{trouble}; using the index of {self.suite} from {days:.1f} days ago")
            return ""

    def kernels(self) -> list[Package]:
        """Kernel packages in the index as it stands, from a digest of it that is much smaller."""
        found = self._memo("packages", lambda: [asdict(each) for path in self._lists() for each in self._parse(path)])
        return [Package(**each) for each in found]

    def closure(self, names: Sequence[str], without: frozenset[str]) -> list[tuple[str, str, str]]:
        """Name, version and architecture of all packages that ``names`` need, dependencies first."""

        def ask() -> list[tuple[str, ...]]:
            done = self._apt("apt-get", "install", "--simulate", "--quiet", "--no-install-recommends", *names)
            if done.returncode:
                raise FetchError(f"{self.suite} cannot satisfy {' '.join(names)} for {self.arch}: {_reason(done)}")
            lines = re.findall(r"^Inst (\S+) \((\S+) .*\[(\w+)\]\)", done.stdout, re.MULTILINE)
            return [(name.partition(":")[0], version, arch) for name, version, arch in lines]

        rows = self._memo("closure-" + sha256(" ".join(names).encode()).hexdigest()[:16], ask)
        return [(name, version, arch) for name, version, arch in rows if name not in without]

    def download(self, triples: Sequence[tuple[str, str, str]]) -> None:
        """Bring packages into the cache that are not there yet."""
        archive = self.archive
        if not self._missing(triples):
            return
        with locked(self.path / "lock", f"another run that fetches from {self.suite}", None, archive.progress):
            missing = self._missing(triples)
            if not missing:
                return
            with host_trouble(archive.cache.root):
                self._write_config()  # for a root of an older version of ourselves
                scratch = self.path / "download"
                shutil.rmtree(scratch, ignore_errors=True)  # apt leaves half files here when it is killed
                scratch.mkdir()
            what = ", ".join(name for name, _, _ in missing) if len(missing) < 5 else f"{len(missing)} packages"
            archive.progress(f"fetching {what}")
            try:
                done = self._apt("apt-get", "download", "--quiet", *(f"{n}={v}" for n, v, _ in missing), cwd=scratch)
                if done.returncode:
                    raise self._download_error(done, what)
                for triple in missing:
                    self._publish(scratch / _filename(*triple))
            finally:
                shutil.rmtree(scratch, ignore_errors=True)

    def _publish(self, fetched: Path) -> None:
        def move(path: Path) -> None:
            shutil.move(fetched, path)

        self.archive.cache.file("debs", fetched.name, move, name=fetched.name)

    def _missing(self, triples: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
        return [triple for triple in triples if self.archive._cached(*triple) is None]

    def _age(self, stamp: str) -> float:
        try:
            return time.time() - (self.path / stamp).stat().st_mtime
        except OSError:
            return float("inf")

    def _write_config(self) -> None:
        path = self.path
        for directory in ("lists/partial", "archives/partial", *(f"etc/{name}" for name in _ETC_DIRECTORIES)):
            (path / directory).mkdir(parents=True, exist_ok=True)
        (path / "status").touch()
        mirror = self.archive.mirror
        (path / "sources.list").write_text(
            f"deb [signed-by={mirror.keyring}] {self.archive._base(self.suite)} {self.suite} main\n"
        )
        (path / "apt.conf").write_text(_CONFIG.format(path=path, arch=self.arch) + _host_transport())

    def _apt(self, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        # Our lock dies with us, so apt must too: else the next run would meet apt's own lock, which nobody waits for.
        return _run(["setpriv", "--pdeathsig", "KILL", *command], APT_CONFIG=str(self.path / "apt.conf"), cwd=cwd)

    def _lists(self) -> list[Path]:
        return sorted((self.path / "lists").glob("*_Packages*"))

    def _memo(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` makes of the index (JSON), kept for as long as the index stays the same."""
        # apt gives a list the server's date, which has whole seconds: only ctime tells two quick updates apart.
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
        with host_trouble(self.archive.cache.root):
            new = kept.with_name(f"{kept.name}.{os.getpid()}")
            new.write_text(json.dumps({"stamp": stamp, "value": value}))
            new.replace(kept)
        return value

    def _parse(self, path: Path) -> list[Package]:
        done = self._apt("/usr/lib/apt/apt-helper", "cat-file", str(path))
        if done.returncode:
            raise FetchError(f"the index of {self.suite} cannot be read: {_reason(done)}")
        found = []
        for match in _WANTED.finditer(done.stdout):
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

    def _judge_update(self, done: subprocess.CompletedProcess[str]) -> tuple[str, bool]:
        """What is wrong with an index as a sentence, and whether that is for want of a network."""
        text = done.stdout + done.stderr
        if done.returncode == 0:
            return "", False
        self._raise_if_full(text)
        suite = self.suite
        if found := re.search(r"is expired \(invalid since ([^)]*)\)", text):
            return f"the Release file of {suite} has expired ({found[1]} ago): its mirror is no longer updated", False
        if re.search(r"NO_PUBKEY|BADSIG|EXPKEYSIG|KEYEXPIRED|not signed|invalid signature|couldn't be verified", text):
            return f"the signature of {suite} does not verify with {self.archive.mirror.keyring}", False
        if re.search(r"does not have a Release file|404 ", text):
            return f"the mirror has no suite {suite}", False
        return f"the index of {suite} cannot be fetched ({_reason(done)})", True

    def _download_error(self, done: subprocess.CompletedProcess[str], what: str) -> Exception:
        self._raise_if_full(done.stdout + done.stderr)
        return FetchError(f"{what} cannot be fetched from {self.suite}: {_reason(done)}")

    def _raise_if_full(self, text: str) -> None:
        if re.search(r"No space left on device|don't have enough free space", text):
            raise HostError(disk_trouble(self.archive.cache.root, "is on a full file system"))


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
    """The host's own proxies and certificates, for apt.conf."""
    lines = _run(["apt-config", "dump"]).stdout.splitlines()
    return "".join(f"{line}\n" for line in lines if re.match(r"Acquire::https?(::[\w.-]+)*::(proxy|ca)", line, re.I))


def _filename(name: str, version: str, arch: str) -> str:
    """What ``apt-get download`` calls a package's file."""
    return f"{name}_{version.replace(':', '%3a')}_{arch}.deb"


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """apt's first complaint, without its decoration."""
    lines = [line for line in done.stderr.splitlines() if line.startswith(("E: ", "W: "))]
    errors = sorted(lines, key=lambda line: not line.startswith("E: "))
    return re.sub(r"\s+", " ", errors[0][3:]).strip() if errors else f"apt ended with status {done.returncode}"


def _run(command: Sequence[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LC_ALL": "C.UTF-8", **environment}
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=env,
            cwd=cwd,
            check=False,
        )
    except FileNotFoundError:
        raise HostError(
            f"this host has no {command[0]}, which Debian packages are fetched with: "
            "use a Debian or Ubuntu host, or give the kernel as a file"
        ) from None
