# SPDX-License-Identifier: GPL-2.0
"""Starts a run with ``--kernel``: understands the options, and registers what they ask for as plug-ins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness import arch
from harness.arch import Architecture
from harness.errors import UsageError
from harness.judging.findings import Expect
from harness.kernels import grammar
from harness.kernels.kernel import BootSpec, SshSpec
from harness.kselftest import catalog
from harness.options import BuildOptions, MachineOptions
from harness.pytest_plugin import target
from harness.pytest_plugin.features import Answer, Comparison, Costs, ExpectedFindings, Gate
from harness.pytest_plugin.progress import TerminalProgress
from harness.pytest_plugin.session import GuestTests
from harness.pytest_plugin.testrun import Policy
from harness.pytest_plugin.upstream import Upstream

if TYPE_CHECKING:
    from harness.pytest_plugin.bisect import Bisect
    from harness.pytest_plugin.junit import JUnitEvidence
    from harness.pytest_plugin.record import Record


#: The key under which workers of pytest-xdist are told the names of the kernels.
WORKER_KERNELS = "mremap-harness kernels"


def start(config: pytest.Config, tests: Path) -> None:
    """Register the plug-ins of this run.

    :param tests: the directory of guest tests.
    :raises pytest.UsageError: if the options make no sense.
    """
    _refuse_debugger(config)
    if config.getoption("keep"):
        from harness.pytest_plugin.keep import Keep

        config.pluginmanager.register(Keep(config), "harness-keep")
    progress = TerminalProgress(config)
    try:
        # Host and guest make one item of each name.
        config.option.kselftest = catalog.choose(config.getoption("kselftest"))
        targets = target.targets(_specs(config), MachineOptions.of(vars(config.option)), progress)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    policy = Policy(
        isolation=config.getoption("isolate"),
        cold=config.getoption("cold"),
        keep=config.getoption("keep"),
        audit=config.getoption("audit"),
    )
    guests = GuestTests(targets, tests, _guest_args(config, tests), policy, progress)
    config.pluginmanager.register(guests, "harness-guests")
    record = _record(config, guests)
    features = {
        "harness-findings": _findings(config),
        "harness-comparison": Comparison(guests, config) if len(targets) > 1 else None,
        "harness-costs": Costs(guests) if config.getoption("icount") else None,
        "harness-answer": Answer(guests, config) if config.getoption("answer") else None,
        "harness-record": record,
        "harness-gate": _gate(config, guests, record),
        "harness-junit": _junit(config, guests),
        "harness-bisect": _bisect(config, guests, record),
        "harness-upstream": Upstream(config) if config.getoption("kselftest") else None,
    }
    for name, feature in features.items():
        if feature is not None:
            config.pluginmanager.register(feature, name)


def _findings(config: pytest.Config) -> ExpectedFindings | None:
    if config.getoption("expect_findings"):
        return ExpectedFindings(Expect.AS_RECORDED)
    # The answer asks whether they show.
    return ExpectedFindings(Expect.SHOWS_OR_NOT) if config.getoption("answer") else None


def _record(config: pytest.Config, guests: GuestTests) -> Record | None:
    """What makes the record of results; not in a worker of pytest-xdist, and not where nothing runs."""
    if hasattr(config, "workerinput") or config.getoption("collectonly"):
        return None
    from harness.pytest_plugin.sinks import sinks

    try:
        wanted = sinks(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    from harness.pytest_plugin.record import Record

    return Record(guests, config, wanted)


def _gate(config: pytest.Config, guests: GuestTests, record: Record | None) -> Gate | None:
    """What makes the exit status of the comparison.

    :raises pytest.UsageError: if no two kernels will be compared.
    """
    if config.getoption("fail_on") != "regressed":
        return None
    from harness.report import compare

    if not compare.baselines({label: each.arch for label, each in guests.targets.items()}):
        raise pytest.UsageError(
            "--fail-on=regressed compares kernels of one architecture: give --kernel twice, the baseline first"
        )
    return Gate(record) if record is not None else None


def _bisect(config: pytest.Config, guests: GuestTests, record: Record | None) -> Bisect | None:
    """What makes the exit status of ``--bisect``.

    :raises pytest.UsageError: if other options contradict.
    """
    if not config.getoption("bisect"):
        return None
    from harness.pytest_plugin import bisect

    bisect.check(config, len(guests.targets))
    return bisect.Bisect(guests, record) if record is not None else None


def _junit(config: pytest.Config, guests: GuestTests) -> JUnitEvidence | None:
    """What adds to ``--junitxml``; not in a worker of pytest-xdist."""
    if not config.getoption("xmlpath", default=None) or hasattr(config, "workerinput"):
        return None
    from harness.pytest_plugin.junit import JUnitEvidence

    return JUnitEvidence(config, guests)


def _refuse_debugger(config: pytest.Config) -> None:
    for option in ("usepdb", "trace"):
        if config.getoption(option, default=False):
            name = {"usepdb": "--pdb"}.get(option, f"--{option}")
            raise pytest.UsageError(
                f"{name} cannot stop inside a guest: use --keep to keep the guest of a failing test, or harness shell"
            )


def _specs(config: pytest.Config) -> list[BootSpec | SshSpec]:
    presets = tuple(word for each in config.getoption("preset") for word in each.split(":") if word)
    building = BuildOptions(config.getoption("build"), presets)
    wanted: list[Architecture | None] = [arch.find(name) for name in config.getoption("arch")]
    config.option.kernel = kernels = _with_series(config)
    return [spec for each in wanted or [None] for spec in grammar.parse_all(kernels, each, building)]


def _with_series(config: pytest.Config) -> list[str]:
    """The names of the kernels, with the file of a series that standard input has."""
    # The standard input of a worker of pytest-xdist is not the user's. See pytest_configure_node.
    texts: list[str] = getattr(config, "workerinput", {}).get(WORKER_KERNELS) or config.getoption("kernel")
    if not any("+-" in text for text in texts):
        return texts
    from harness.build import posted

    def read() -> bytes:
        capture = config.pluginmanager.get_plugin("capturemanager")
        if capture is None:
            return posted.standard_input()
        # At this point pytest has /dev/null in the place of standard input, and lets output pass.
        capture.suspend_global_capture(in_=True)
        try:
            return posted.standard_input()
        finally:
            capture.resume_global_capture()
            capture.suspend_global_capture()

    return posted.named(texts, read)


def _guest_args(config: pytest.Config, tests: Path) -> list[str]:
    """The options that shape what the guest's pytest reports."""
    args = [tests.name, f"--tb={config.getoption('tbstyle')}"]
    if config.getoption("showlocals", default=False):
        args.append("--showlocals")
    if config.getoption("audit") != "off":
        args.append(f"--audit={config.getoption('audit')}")
    if config.getoption("icount"):
        args.append("--icount")
    if config.getoption("explore"):
        args += [f"--explore={config.getoption('explore')}", f"--explore-seed={config.getoption('explore_seed')}"]
    args += [f"--race-{name}={config.getoption(f'race_{name}')}" for name in ("seconds", "seed")]
    args += [f"--kselftest={name}" for name in config.getoption("kselftest")]
    return args + ["-v"] * max(0, config.getoption("verbose"))
