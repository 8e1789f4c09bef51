# SPDX-License-Identifier: GPL-2.0
"""Completes options in shells, by argcomplete. pytest calls it where a shell has registered it. No network is used."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from harness import options
from harness.options import Option


class _Append(argparse.Action):
    """As ``append``. argcomplete wants the completer in the action, and pytest takes actions only as classes."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


def kernels(prefix: str, **_: Any) -> list[str]:
    """What ``--kernel`` may be: variants, source packages, Debian's versions and suites, and presets after a colon."""
    from harness.build.variants import KernelConfigs
    from harness.debian import suites
    from harness.host.cache import Cache
    from harness.kernels import known

    definitions = KernelConfigs.load()
    names = [*definitions.variants, *known.names(Cache())]
    names += [f"debian:{each}" for each in (*suites.ALIASES, *suites.RELEASED, *suites.UNRELEASED)]
    source, colon, _rest = prefix.rpartition(":")
    if colon and source != "debian":
        names += [f"{source}:{each}" for each in sorted(definitions.words)]
    found = [each for each in names if each.startswith(prefix)]
    return found or _files(prefix)


def architectures(prefix: str, **_: Any) -> list[str]:
    """What ``--arch`` may be."""
    from harness.arch import ARCHITECTURES

    return [str(each) for each in ARCHITECTURES if str(each).startswith(prefix)]


def presets(prefix: str, **_: Any) -> list[str]:
    """What ``--preset`` may be."""
    from harness.build.variants import KernelConfigs

    return [each for each in sorted(KernelConfigs.load().words) if each.startswith(prefix)]


def _files(prefix: str) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter()(prefix))


_COMPLETERS: dict[Option, Callable[..., Iterable[str]]] = {
    options.KERNEL: kernels,
    options.ARCH: architectures,
    options.PRESET: presets,
}


def settings(option: Option) -> dict[str, Any]:
    """What an option is declared with, so that it is completed."""
    completer = _COMPLETERS.get(option)
    if completer is None:
        return {}
    return {"action": type("Completed", (_Append,), {"completer": staticmethod(completer)})}
