# SPDX-License-Identifier: GPL-2.0
"""Finds the Debian mirror that this host is configured for, and the keys that its archive is signed with."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from harness.debian.commands import run
from harness.debian.suites import ALIASES, CODENAMES
from harness.errors import HostError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR_VARIABLE = "MREMAP_HARNESS_DEBIAN_MIRROR"
KEYRING_VARIABLE = "MREMAP_HARNESS_DEBIAN_KEYRING"


@dataclass(frozen=True)
class Mirror:
    """A Debian archive, and the keys that must have signed it."""

    #: base URI of the main archive
    main: str
    #: base URI of the archive of security updates; empty if it is not known
    security: str
    keyring: Path

    def base(self, suite: str) -> str:
        """The base URI of the archive that holds a suite; empty if it is not known."""
        return self.security if suite.endswith("-security") else self.main


def host_mirror(mirror: str = "") -> Mirror:
    """The Debian mirror this host is configured for, unless the user names another.

    :param mirror: base URI of a Debian archive, the part before ``dists/``. If it is empty, the environment variable
        :data:`MIRROR_VARIABLE` decides, and then the configuration of apt.
    :raises HostError: if no mirror is configured, or its keys are not installed.
    """
    keys = Path(os.environ.get(KEYRING_VARIABLE, "") or KEYRING)
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
            continue  # an archive of another vendor
        if release not in (*ALIASES, *CODENAMES, "bullseye"):
            continue
        if suffix.startswith("security"):
            security = security or uri
        else:
            main = main or uri
    if not main:
        raise HostError(
            "this host's apt knows no Debian mirror to fetch packages from: "
            f"name one with --debian-mirror=URI, or in the environment with {MIRROR_VARIABLE}=URI"
        )
    return Mirror(main, security or (main + "-security" if main.endswith("/debian") else ""), keys)


def _host_sources() -> list[tuple[str, str, str]]:
    """URI, suite and component of each package source in the host's apt configuration.

    The files are read here because apt lists a source only after its index was fetched, and a new container has not
    fetched any.
    """
    done = run(["apt-config", "shell", "main", "Dir::Etc::sourcelist/f", "parts", "Dir::Etc::sourceparts/d"])
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
