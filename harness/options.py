# SPDX-License-Identifier: GPL-2.0
"""Every option that names a kernel or shapes a guest, declared once for the pytest plug-in and for the commands."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of the command line, in the terms that argparse and pytest share."""

    #: with its dashes
    name: str
    help: str
    #: what stands for the value in the help; empty for a switch
    metavar: str = ""
    #: turns the value's text into a value
    type: Callable[[str], Any] = str
    default: Any = ""
    #: the values allowed; empty for any
    choices: tuple[str, ...] = ()
    #: may be given several times; the values make a list
    repeatable: bool = False

    def declare(self, add: Callable[..., Any], **more: Any) -> None:
        """Declare it.

        :param add: ``addoption`` of a pytest option group, or ``add_argument`` of an argparse parser.
        :param more: arguments for ``add`` that replace those of the table.
        """
        if self.repeatable:
            settings: dict[str, Any] = {"action": "append", "default": [], "metavar": self.metavar}
        elif self.choices:
            settings = {"choices": self.choices, "default": self.default}
        elif self.metavar:
            settings = {"type": self.type, "default": self.default, "metavar": self.metavar}
        else:
            settings = {"action": "store_true"}
        add(self.name, **{**settings, "help": self.help, **more})


KERNEL = Option(
    name="--kernel",
    metavar="SPEC",
    repeatable=True,
    help="a kernel to run the guest tests on: debian:VERSION, debian:SUITE, a build tree, an image, a .deb, "
    "ssh://USER@HOST, or one to build: git:PATH@REVISION, or a variant such as relocate-anon; +PATCHES and :PRESET "
    "may follow, and +- for the series on standard input. Repeat it to compare kernels.",
)
BUILD = Option(name="--build", help="build each source tree that --kernel names, in the cache")
PRESET = Option(
    name="--preset",
    metavar="PRESET",
    repeatable=True,
    help="configure the kernels that are built with this preset: fast, debug, kasan, kcsan, dwarf, or a page size such "
    "as 64k. Repeat it, or join several with colons.",
)
ARCH = Option(
    name="--arch",
    metavar="ARCH",
    repeatable=True,
    help="an architecture such as arm64, where the kernel leaves the choice open",
)
APPEND = Option(name="--append", metavar="PARAMS", help="parameters to add to the kernel's command line")
ISOLATE = Option(
    name="--isolate",
    choices=("test", "module", "kernel"),
    default="test",
    help="what gets a fresh guest of its own (default: every test that is not marked shared_guest)",
)
EXPECT_FINDINGS = Option(
    name="--expect-findings",
    help="expect tests marked as findings to fail, and fail them if they pass; for continuous integration",
)
COLD = Option(name="--cold", help="boot every guest instead of cloning a booted one")
KEEP = Option(name="--keep", help="stop at the first test that fails, and keep its guest for inspection")
GUEST_MEMORY = Option(
    name="--guest-memory", metavar="MIB", type=int, default=640, help="memory of a guest in MiB (default: 640)"
)
GUEST_CPUS = Option(name="--guest-cpus", metavar="N", type=int, default=1, help="virtual CPUs of a guest (default: 1)")
ICOUNT = Option(
    name="--icount",
    help="let the guests' clocks count instructions, which needs emulation, for guest_tests/test_costs.py; end with "
    "the table of costs",
)
ANSWER = Option(
    name="--answer",
    help="end with the answer to the project's question in words; runs the tests it needs unless others are named",
)
AUDIT = Option(
    name="--audit",
    choices=("off", "end", "each-move"),
    default="off",
    help="audit the guest's whole reverse map from its memory: at the end of each test that moved memory and after "
    "every failure, or after each move too (fetches the debug information of Debian kernels, 350 MB, once)",
)
RESULTS = Option(
    name="--results",
    metavar="FILE",
    help="write one line of JSON for each test to FILE as it ends; docs/results.md describes the format",
)
KTAP = Option(
    name="--ktap",
    metavar="FILE",
    help="write the results to FILE as KTAP, which the kernel's kunit.py parses; - for standard output",
)
HTML = Option(
    name="--html",
    metavar="FILE",
    help="write the results to FILE as one HTML page",
)
ARTIFACTS = Option(
    name="--artifacts",
    metavar="DIR",
    help="write the evidence of each failure to files in DIR, which must be empty (default: a directory of each run "
    "below ~/.local/state/mremap-harness/artifacts, of which the last ten are kept)",
)
FAIL_ON = Option(
    name="--fail-on",
    choices=("failed", "regressed"),
    default="failed",
    help="what makes the exit status 1: a test that failed (default), or one that regressed against the first kernel "
    "of its architecture",
)
BISECT = Option(
    name="--bisect",
    help="end with the statuses of `git bisect run`: 0 good, 1 bad, 125 no verdict, 128 and more to stop",
)
MUTANT = Option(
    name="--mutant",
    metavar="NAME",
    help="activate this deliberate bug in a kernel that is built with the preset mutants; harness mutants --list "
    "shows them",
)
EXPLORE = Option(
    name="--explore",
    metavar="N",
    type=int,
    default=0,
    help="also run N programs of the explorer as tests; docs/explore.md describes them",
)
EXPLORE_SEED = Option(
    name="--explore-seed", metavar="N", type=int, default=1, help="what these programs are made from (default: 1)"
)
RACE_SECONDS = Option(
    name="--race-seconds",
    metavar="N",
    type=float,
    default=2.0,
    help="how long each race of guest_tests/test_storms.py lasts (default: 2); from 10 on with 64 MB of memory",
)
RACE_SEED = Option(
    name="--race-seed", metavar="N", type=int, default=1, help="what decides the steps of these races (default: 1)"
)
KSELFTEST = Option(
    name="--kselftest",
    metavar="NAME",
    repeatable=True,
    help="run upstream's own test of this name, such as merge, instead of the guest tests; mm stands for all of them, "
    "docs/kselftest.md lists them. Repeat it for several.",
)
KSELFTEST_TREE = Option(
    name="--kselftest-tree",
    metavar="DIR",
    help="the kernel source tree that upstream's tests are compiled from (default: the source of the kernel, or "
    "Debian's package of it)",
)
DEBIAN_MIRROR = Option(
    name="--debian-mirror",
    metavar="URI",
    help="where Debian's packages come from (default: the mirror in the host's own apt configuration)",
)

USERLAND = Option(
    name="--userland",
    metavar="FILE",
    help="the guest's userland, for a host without apt: a file that `harness userland` made on a Debian machine. It is "
    "copied into the cache, so it need not be given again.",
)

#: What the pytest plug-in takes, in the order of its help.
OPTIONS = (
    KERNEL,
    BUILD,
    PRESET,
    ARCH,
    APPEND,
    ISOLATE,
    EXPECT_FINDINGS,
    COLD,
    KEEP,
    GUEST_MEMORY,
    GUEST_CPUS,
    ICOUNT,
    ANSWER,
    AUDIT,
    RESULTS,
    KTAP,
    HTML,
    ARTIFACTS,
    FAIL_ON,
    BISECT,
    EXPLORE,
    EXPLORE_SEED,
    RACE_SECONDS,
    RACE_SEED,
    MUTANT,
    KSELFTEST,
    KSELFTEST_TREE,
    DEBIAN_MIRROR,
    USERLAND,
)

#: Those that a result depends on, without the kernel's own.
_RESULT = (
    APPEND,
    GUEST_MEMORY,
    GUEST_CPUS,
    ICOUNT,
    AUDIT,
    EXPLORE,
    EXPLORE_SEED,
    RACE_SECONDS,
    RACE_SEED,
    MUTANT,
    KSELFTEST_TREE,
)

#: Those that shape a machine: see :class:`MachineOptions`.
MACHINE = (APPEND, GUEST_MEMORY, GUEST_CPUS, MUTANT, DEBIAN_MIRROR, USERLAND)


def again(value: Callable[[str], Any]) -> str:
    """The options that a result depends on, for a command that shows it again: each with a blank in front.

    :param value: gives the value of an option by its name. Options that have their default are left out.
    """
    given = {each: value(each.name) for each in _RESULT}
    return "".join(
        f" {each.name}" + ("" if chosen is True else f"={shlex.quote(str(chosen))}")
        for each, chosen in given.items()
        if chosen and chosen != each.default
    )


@dataclass(frozen=True, kw_only=True)
class MachineOptions:
    """What the user may choose about virtual machines."""

    #: parameters added to the kernel's command line
    append: str = ""
    #: guest memory in MiB
    memory: int = 640
    #: number of virtual CPUs
    cpus: int = 1
    #: whether the guests' clocks count instructions
    icount: bool = False
    #: the mutant that is active in guests, or "record"; empty for none
    mutant: str = ""
    #: the upstream tests that guests have; none if they have no upstream tests
    kselftest: tuple[str, ...] = ()
    #: the source of these tests; None for the kernel's own
    kselftest_tree: Path | None = None
    #: base URI of a Debian mirror; empty for the host's own
    debian_mirror: str = ""
    #: a file with the guest's userland; None makes it, or takes it from the cache
    userland: Path | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> MachineOptions:
        """From parsed options, by their names; those that a command does not have keep their defaults."""
        return cls(
            append=values["append"],
            memory=values["guest_memory"],
            cpus=values["guest_cpus"],
            icount=values.get("icount", False),
            mutant=values.get("mutant", ""),
            kselftest=tuple(values.get("kselftest", ())),
            kselftest_tree=_path(values.get("kselftest_tree", "")),
            debian_mirror=values["debian_mirror"],
            userland=_path(values["userland"]),
        )


def _path(text: str) -> Path | None:
    return Path(text).expanduser() if text else None


@dataclass(frozen=True)
class BuildOptions:
    """The command line options about kernels to build."""

    #: build every source tree, even if it contains a built kernel
    trees: bool = False
    #: presets and page size for kernels whose names have none
    words: tuple[str, ...] = ()
