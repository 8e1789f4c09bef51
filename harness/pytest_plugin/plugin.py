# SPDX-License-Identifier: GPL-2.0
"""The pytest plug-in: ``--kernel`` turns the tests below ``guest_tests/`` into tests that run inside guests.

Without ``--kernel`` it does nothing but keep guest tests from running on the host. Imports are kept light: this module
is loaded by every pytest run of every environment the project is installed in.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.markers import MARKERS

if TYPE_CHECKING:
    from harness.pytest_plugin.runner import Runner

_RUNNERS = pytest.StashKey[dict[str, "Runner"]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options."""
    group = parser.getgroup("kernel", "tests inside Linux guests")
    group.addoption(
        "--kernel",
        action="append",
        default=[],
        metavar="SPEC",
        help="a kernel to run the guest tests on: debian:VERSION, debian:SUITE, a build tree, an image, a .deb, "
        "ssh://USER@HOST, or one to build: git:PATH@REVISION, or a variant such as relocate-anon; +PATCHES and :PRESET "
        "may follow. Repeat it to compare kernels.",
    )
    group.addoption("--build", action="store_true", help="build each source tree that --kernel names, in the cache")
    group.addoption(
        "--preset",
        action="append",
        default=[],
        metavar="PRESET",
        help="what is built is configured so: fast, debug, kasan, dwarf, or a page size such as 64k. Repeat it, or "
        "join them with colons.",
    )
    group.addoption(
        "--arch", action="append", default=[], metavar="ARCH", help="x86_64 or arm64, where the kernel leaves it open"
    )
    group.addoption("--append", default="", metavar="PARAMS", help="more for the kernel's command line")
    group.addoption(
        "--isolate",
        choices=("test", "module", "kernel"),
        default="test",
        help="what gets a fresh guest of its own (default: every test that is not marked shared_guest)",
    )
    group.addoption(
        "--expect-findings", action="store_true", help="tests marked as findings must fail; for continuous integration"
    )
    group.addoption("--cold", action="store_true", help="boot every guest instead of cloning a booted one")
    group.addoption(
        "--keep", action="store_true", help="stop at the first test that fails, and keep its guest to look into"
    )
    group.addoption("--guest-memory", type=int, default=640, metavar="MIB", help="memory of a guest (default: 640)")
    group.addoption("--guest-cpus", type=int, default=1, metavar="N", help="virtual CPUs of a guest (default: 1)")
    group.addoption(
        "--icount",
        action="store_true",
        help="let guests' clocks count instructions, under emulation even where there is KVM, for "
        "guest_tests/test_costs.py; end with the table of costs",
    )
    group.addoption(
        "--answer", action="store_true", help="end with the answer of guest_tests/test_question.py in words"
    )
    group.addoption(
        "--audit",
        choices=("off", "end", "each-move"),
        default="off",
        help="audit the guest's whole reverse map from its memory: at the end of each test that moved memory and on "
        "every failure, or after each move too (fetches Debian kernels' debug information, 350 MB, once)",
    )
    parser.addini(
        "guest_tests", "the directory of the tests that run in guests (default: the project's own)", default=""
    )
    group.addoption(
        "--debian-mirror",
        default="",
        metavar="URI",
        help="where Debian's packages come from (default: the mirror in the host's own apt configuration)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Understand the kernels, and point pytest at the guest tests unless told otherwise."""
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if not config.getoption("kernel"):
        return
    if config.getoption("keep"):
        from harness.pytest_plugin import keep

        keep.check(config)
    if config.args_source is not config.ArgsSource.ARGS:
        config.args[:] = [str(guest_tests(config))]
    config.stash[_RUNNERS] = _runners(config)


def guest_tests(config: pytest.Config) -> Path:
    """Where the guest tests live: the project's own directory, or the ini option's, relative to the root directory."""
    from harness import paths

    return config.rootpath / (config.getini("guest_tests") or paths.PROJECT / "guest_tests")


def _runners(config: pytest.Config) -> dict[str, Runner]:
    from harness import arch
    from harness.build.naming import Building
    from harness.errors import UsageError
    from harness.kernels import grammar, kernel
    from harness.machine.provision import Options
    from harness.pytest_plugin.runner import Runner

    options = Options(
        append=config.getoption("append"),
        memory=config.getoption("guest_memory"),
        cpus=config.getoption("guest_cpus"),
        icount=config.getoption("icount"),
        debian_mirror=config.getoption("debian_mirror"),
    )
    building = Building(config.getoption("build"), _words(config.getoption("preset")))
    try:
        specs: list[kernel.BootSpec | kernel.SshSpec] = []
        wanted: list[arch.Architecture | None] = [arch.find(name) for name in config.getoption("arch")]
        for each in wanted or [None]:
            specs += grammar.parse_all(config.getoption("kernel"), each, building)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    if options.icount and any(isinstance(spec, kernel.SshSpec) for spec in specs):
        raise pytest.UsageError("--icount needs a virtual machine, whose clock can count: leave out ssh:// kernels")
    runners: dict[str, Runner] = {}
    for spec in specs:
        runners[spec.label] = Runner(
            spec,
            options,
            guest_tests(config),
            isolation=config.getoption("isolate"),
            cold=config.getoption("cold"),
            keep=config.getoption("keep"),
            pytest_args=_guest_args(config),
            markers=list(MARKERS),
            progress=_progress(config),
            audit=config.getoption("audit"),
        )
    return runners


def _words(presets: list[str]) -> tuple[str, ...]:
    return tuple(word for each in presets for word in each.split(":") if word)


def _guest_args(config: pytest.Config) -> list[str]:
    """The options that shape what the guest's pytest reports."""
    args = [guest_tests(config).name, f"--tb={config.getoption('tbstyle')}"]
    if config.getoption("showlocals", default=False):
        args.append("--showlocals")
    if config.getoption("audit") != "off":
        args.append(f"--audit={config.getoption('audit')}")
    if config.getoption("icount"):
        args.append("--icount")
    return args + ["-v"] * max(0, config.getoption("verbose"))


def _progress(config: pytest.Config) -> Callable[[str], None]:
    """A function that tells a person, and nobody else, what takes so long."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")

    def say(message: str) -> None:
        if reporter is not None and reporter.isatty:
            reporter.ensure_newline()
            reporter.write_line(f"harness: {message}")

    return say


def pytest_sessionstart(session: pytest.Session) -> None:
    """Fetch the kernels before anything runs, so that a wrong name is a usage error."""
    from harness.errors import UsageError

    if session.config.getoption("collectonly", default=False):
        return
    for runner in session.config.stash.get(_RUNNERS, {}).values():
        try:
            runner.provision()
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End all guests."""
    for runner in session.config.stash.get(_RUNNERS, {}).values():
        runner.close()


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say which kernels run, and how."""
    lines = []
    for runner in config.stash.get(_RUNNERS, {}).values():
        if "provisioned" in vars(runner):
            kernel, machine = runner.provisioned
            accelerator = machine.accelerator
            lines.append(f"kernel {runner.spec.label}: {kernel.release}, {kernel.provenance}")
            lines.append(f"  under {accelerator.name}: {accelerator.reason}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what went other than planned, compare the kernels, and give the answer in words where it was asked for."""
    if _RUNNERS not in config.stash:
        return
    from harness.pytest_plugin.runner import OBSTACLE

    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    reports = [report for report in reports if isinstance(report, pytest.TestReport)]
    for obstacle in dict.fromkeys(
        value for report in reports for name, value in report.user_properties if name == OBSTACLE
    ):
        terminalreporter.write_line(f"harness: {obstacle}")
    from harness.report import compare

    kernels = {label: runner.spec.arch for label, runner in config.stash[_RUNNERS].items()}
    width, verbose = config.get_terminal_writer().fullwidth, config.getoption("verbose") > 0
    for section in compare.sections(reports, kernels, width, verbose=verbose):
        terminalreporter.section(section.title)
        for each in section.lines:
            terminalreporter.write_line(each.text, **each.markup)
    if config.getoption("icount"):
        from harness.report import costs

        for title, lines in costs.sections(reports, kernels):
            terminalreporter.section(title)
            for line in lines:
                terminalreporter.write_line(line)
    if not config.getoption("answer"):
        return
    from harness.report import answer

    for runner in config.stash.get(_RUNNERS, {}).values():
        if "provisioned" not in vars(runner):
            continue
        kernel, machine = runner.provisioned
        again = f"{runner.again} guest_tests/test_question.py --answer"
        seen = answer.records(reports, runner.spec.label)
        terminalreporter.section("Does mremap() break KSM's reverse map?")
        for line in answer.answer(f"{kernel.release} ({kernel.arch}, {machine.accelerator.name})", seen, again):
            terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Multiply guest tests by kernels."""
    runners = metafunc.config.stash.get(_RUNNERS, None)
    if not runners or not _is_guest_test(metafunc.definition):
        return
    from harness.pytest_plugin.runner import KERNEL_PARAMETER

    metafunc.fixturenames.append(KERNEL_PARAMETER)
    metafunc.parametrize(KERNEL_PARAMETER, list(runners), ids=list(runners), scope="session")


def _is_guest_test(item: pytest.Item) -> bool:
    return item.path.is_relative_to(guest_tests(item.config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a kernel, guest tests must not touch the host's memory management; without --icount, none counts."""
    if not config.getoption("icount"):
        counting = [item for item in items if item.get_closest_marker("icount")]
        if counting:
            config.hook.pytest_deselected(items=counting)
            items[:] = [item for item in items if not item.get_closest_marker("icount")]
    if _RUNNERS not in config.stash:
        for item in items:
            if _is_guest_test(item):
                item.add_marker(pytest.mark.skip(reason="runs in a guest: give --kernel, for example --kernel=debian:"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run guest tests in a guest of their kernel."""
    runners = item.config.stash.get(_RUNNERS, None)
    if not runners or not _is_guest_test(item):
        return None
    from harness.pytest_plugin.runner import kernel_label
    from harness.report import compare

    label = kernel_label(item)
    following = nextitem if nextitem is not None and kernel_label(nextitem) == label else None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runners[label].run(item, following)
    if item.config.getoption("expect_findings"):
        from harness.judging import findings

        findings.expect(item, reports, runners[label].release)
    for report in reports:
        report.user_properties.append((compare.PROPERTY, label))
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    failures = [report.longreprtext for report in reports if report.failed]
    if (guest := runners[label].kept) is not None and failures:
        from harness.pytest_plugin import keep

        keep.wait(runners[label], guest, "\n".join(failures), item.config)
        item.session.shouldfail = "--keep stops at the first test that fails"
    runners[label].let_go()
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """``-n auto``: as many guests as there are processors, and memory for what each may write."""
    if not config.getoption("kernel"):
        return None
    from harness.host import memory

    by_memory: int = memory.available() // config.getoption("guest_memory")
    return max(1, min(os.cpu_count() or 1, by_memory))
