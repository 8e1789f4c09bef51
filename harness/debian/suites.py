# SPDX-License-Identifier: GPL-2.0
"""Debian's suites: their names, and which of them are searched for kernels."""

from __future__ import annotations

from harness.errors import SpecError

#: the code name of Debian's stable release; the guest's userland is made from it
STABLE = "trixie"
#: other names of suites; these change with each Debian release
ALIASES = {"stable": STABLE, "oldstable": "bookworm", "testing": "forky", "unstable": "sid", "rc-buggy": "experimental"}
#: suites that are searched for a kernel version first
RELEASED = (
    "trixie", "trixie-security", "trixie-backports",
    "bookworm", "bookworm-security", "bookworm-backports",
)  # fmt: skip
#: suites that are searched if no released suite has the version; they change daily, and their indexes expire on mirrors
UNRELEASED = ("forky", "sid", "experimental")
#: code names of all releases
CODENAMES = tuple(name for name in (*RELEASED, *UNRELEASED) if "-" not in name)

_SUFFIXES = ("", "-security", "-updates", "-backports", "-proposed-updates", "-backports-sloppy")


def suites(name: str) -> tuple[str, ...]:
    """The suites that one name stands for: a release includes its security updates.

    :param name: a code name or alias, optionally with a suffix such as ``-backports``.
    :raises SpecError: if Debian has no suite of that name.
    """
    stem, dash, suffix = name.partition("-")
    stem = ALIASES.get(stem, stem)
    if name in ALIASES:
        stem, dash, suffix = ALIASES[name], "", ""
    full = stem + dash + suffix
    if stem not in CODENAMES or dash + suffix not in _SUFFIXES or (dash and stem in ("sid", "experimental")):
        known = ", ".join((*ALIASES, *RELEASED, *UNRELEASED))
        raise SpecError(f"Debian has no suite {name!r}: use one of {known}")
    return (full, f"{full}-security") if f"{full}-security" in RELEASED else (full,)
