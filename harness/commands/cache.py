# SPDX-License-Identifier: GPL-2.0
"""``harness cache``: shows what the caches hold, and removes what was not used for long."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Sequence
from itertools import groupby

from harness.commands.numbers import ago, size
from harness.host.pruning import Kept

#: What ``--prune`` without a time means.
_AGE = "30d"

_UNITS = {"h": 3600, "d": 86400, "w": 7 * 86400}

#: What the kinds are, for a person.
_WHAT = {
    "apt": "package lists",
    "builds": "kernels built here",
    "ccache": "object files; ccache limits them by itself",
    "configs": "configurations of kernels built here",
    "debs": "package files",
    "images": "kernel images, unpacked",
    "initrds": "initramfs of guests",
    "kernels": "Debian's kernels, unpacked",
    "kselftests": "upstream's tests, compiled",
    "layouts": "layouts of kernel structures, for the audit",
    "series": "patch series that standard input had",
    "sources": "kernel sources and output directories",
    "sysroots": "libraries that upstream's tests are linked with",
    "templates": "booted guests, which clones are made of",
    "userlands": "userlands of guests",
}


def age(text: str) -> float:
    """A time in seconds: hours, days, or weeks. What was used within the last hour may belong to a run that begins."""
    found = re.fullmatch(r"(\d{1,4})([hdw])", text)
    if not found or int(found[1]) < 1:
        raise ValueError
    return float(int(found[1]) * _UNITS[found[2]])


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "cache",
        help="show what the caches hold, and remove what was not used for long",
        description="Shows what the caches hold, kind by kind. All of it is made again when it is needed.",
        epilog="What a running process uses or makes is never removed. Exit status: 0, or 1 if something cannot be "
        "removed.",
    )
    parser.add_argument(
        "--prune",
        type=age,
        nargs="?",
        const=age(_AGE),
        metavar="AGE",
        help=f"remove what was not used for this time, such as 12h, 7d or 4w (default: {_AGE}; at least 1h)",
    )


def run(chosen: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    from harness.guests.template_store import TemplateStore
    from harness.host import pruning
    from harness.host.cache import Cache

    cache, templates = Cache(), TemplateStore()

    def kept() -> list[Kept]:
        return [*pruning.kept(cache), *templates.kept()]

    now, found = time.time(), kept()
    if chosen.prune is not None:
        for line in _prune(found, now - chosen.prune):
            print(line)
        found = kept()
    for line in table(found, now):
        print(line)
    print(f"\nin {cache.root}" + (f" and {templates.root}" if templates.root.is_dir() else ""))
    return 0


def _prune(found: Sequence[Kept], before: float) -> list[str]:
    lines = []
    for kind, of_kind in groupby(found, lambda each: each.kind):
        old = [each for each in of_kind if each.remove is not None and each.used < before]
        gone = [each for each in old if each.remove is not None and each.remove(before)]
        if gone:
            lines.append(f"removed {len(gone)} of {kind}: {size(sum(each.size for each in gone))}")
        if len(gone) < len(old):
            lines.append(f"left {len(old) - len(gone)} of {kind}, which are in use")
    return [*(lines or ["nothing is that old"]), ""]


def table(found: Sequence[Kept], now: float) -> list[str]:
    """One line for each kind, and one for all.

    :param now: in seconds since the epoch.
    """
    if not found:
        return ["the caches are empty"]
    lines = [f"{'kind':10}  {'number':>6}  {'size':>9}  last used"]
    for kind, grouped in groupby(found, lambda each: each.kind):
        of_kind = list(grouped)
        times = sorted((each.used for each in of_kind), reverse=True)
        used = ago(now - times[0])
        if times[1:] and ago(now - times[-1]) != used:
            used += f" to {ago(now - times[-1])}"
        what = f"  ({_WHAT[kind]})" if kind in _WHAT else ""
        number = str(len(of_kind)) if of_kind[0].remove else ""
        lines.append(f"{kind:10}  {number:>6}  {size(sum(each.size for each in of_kind)):>9}  {used}{what}")
    return [*lines, f"{'all':10}  {'':6}  {size(sum(each.size for each in found)):>9}"]
