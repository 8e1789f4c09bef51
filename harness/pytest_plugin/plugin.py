# SPDX-License-Identifier: GPL-2.0
"""The pytest plug-in: ``--kernel`` turns the tests below ``guest_tests/`` into tests that run inside guests.

Without ``--kernel`` it only keeps guest tests from running on the host. Every pytest run of every environment that has
the project installed imports this module, so it imports little: what a run with ``--kernel`` needs is imported in
``pytest_configure``.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from harness import options
from harness.markers import MARKERS
from harness.pytest_plugin import defaults


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("kernel", "tests inside Linux guests")
    for option in options.OPTIONS:
        # pytest-html has an option of that name. Without this, no pytest of the environment would start.
        if option is not options.HTML or find_spec("pytest_html") is None:
            option.declare(group.addoption, **_completed(option))
    defaults.declare(parser)
    parser.addini(
        "guest_tests", "the directory of the tests that run in guests (default: the project's own)", default=""
    )


def _completed(option: options.Option) -> dict[str, Any]:
    """What lets a shell complete an option, while a shell does so."""
    if "_ARGCOMPLETE" not in os.environ:
        return {}
    from harness.pytest_plugin import completion

    return completion.settings(option)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the hooks by which features take part in a run."""
    from harness.pytest_plugin import newhooks

    pluginmanager.add_hookspecs(newhooks)


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and with ``--kernel`` what runs guest tests."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not config.getoption("kernel"):
        if config.getoption("bisect"):
            raise pytest.UsageError("--bisect says what a kernel is: give --kernel, for example --kernel=. --build")
        return
    from harness.pytest_plugin import start

    # A project whose configuration names kernels has its other tests run as well.
    only_guest_tests = not (defaults.kernels_from_file(config) and config.getini("guest_tests"))
    if config.args_source is not config.ArgsSource.ARGS and only_guest_tests:
        config.args[:] = [str(guest_tests(config))]
    start.start(config, guest_tests(config))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, int, int]:
    """Take defaults from the configuration file. With ``--bisect``, end as ``git bisect run`` wants.

    That is a status at which it stops, where pytest's own is 2 to 5.
    """
    defaults.fill(config)
    if not config.getoption("bisect"):
        return (yield)
    from harness.pytest_plugin import bisect

    try:
        return bisect.stopping((yield))
    except pytest.UsageError as error:
        return bisect.refuse(error)


def guest_tests(config: pytest.Config) -> Path:
    """Where the guest tests live: the project's own directory, or the ini option's, relative to the root directory."""
    from harness import paths

    return Path(os.path.abspath(config.rootpath / (config.getini("guest_tests") or paths.GUEST_TESTS)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip guest tests without ``--kernel``: they must not touch the host's memory. Leave out what nobody asked for."""
    for marker in ("icount", "explore", "kselftest"):
        marked = [item for item in items if item.get_closest_marker(marker)]
        if marked and not config.getoption(marker):
            config.hook.pytest_deselected(items=marked)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if not config.getoption("kernel"):
        directory = guest_tests(config)
        for item in items:
            if item.path.is_relative_to(directory):
                item.add_marker(pytest.mark.skip(reason="runs in a guest: give --kernel, for example --kernel=debian:"))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker of pytest-xdist which kernels are tested: it parses the command line once more."""
    if kernels := node.config.getoption("kernel"):
        from harness.pytest_plugin import start

        node.workerinput[start.WORKER_KERNELS] = kernels


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """``-n auto``: as many guests as there are processors, and memory for what each may write."""
    if not config.getoption("kernel"):
        return None
    from harness.host import memory

    by_memory: int = memory.available() // config.getoption("guest_memory")
    return max(1, min(os.cpu_count() or 1, by_memory))
