# SPDX-License-Identifier: GPL-2.0
"""Runs pytest on guest tests that a test writes, in a process of its own, as a user would, and reads the results."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import paths
from harness.deadline import Deadline

#: What guest tests are run on where any kernel will do.
KERNEL = "debian:6.12"

#: A run that takes longer than this is stuck, however busy the host is.
_STUCK = 400.0


@dataclass(frozen=True)
class Case:
    """One test of a run, from the JUnit report."""

    #: the test's name without what is in brackets
    name: str
    #: what is in brackets
    parameters: str
    #: "passed", or the element's name: "failure", "error", "skipped"
    outcome: str
    #: why it did not pass, in one line
    message: str
    #: all it says, evidence included
    text: str
    properties: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The harness' own word for it."""
        return self.properties.get("verdict", "")


@dataclass(frozen=True)
class Outcome:
    """What a run left."""

    status: int
    #: stdout and stderr
    output: str
    cases: Sequence[Case]

    def __getitem__(self, name: str) -> Case:
        (case,) = (case for case in self.cases if case.name == name)
        return case

    @property
    def verdicts(self) -> dict[str, str]:
        """Verdict by test."""
        return {case.name: case.verdict for case in self.cases}

    def said(self, text: str) -> str:
        """The one line of the output that holds ``text``, or a few if it is said again."""
        lines = [line for line in self.output.splitlines() if text in line]
        assert lines, f"{text!r} is nowhere in:\n{self.output}"
        return "\n".join(dict.fromkeys(lines))


class Lab:
    """A directory with guest tests in ``checks/``, and a temporary directory of its own to look for left-overs in."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="lab-"))  # short: QEMU's sockets go below it
        self.tmp = self.root / "tmp"
        self.tmp.mkdir()
        (self.root / "checks").mkdir()
        (self.root / "pytest.ini").write_text("[pytest]\nguest_tests = checks\naddopts = --strict-markers\n")
        # Runs on the host, beside the guest tests.
        (self.root / "conftest.py").write_text(
            textwrap.dedent(
                """
                import os
                def pytest_collection_modifyitems(items):
                    if os.environ.get("LAB_ORDER") == "backwards":
                        items.reverse()
                """
            )
        )

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.root)

    def write(self, name: str, source: str) -> str:
        """Make one file of guest tests the only one; returns its path for pytest's command line."""
        for old in (self.root / "checks").glob("test_*.py"):
            old.unlink()
        (self.root / "checks" / name).write_text(textwrap.dedent(source))
        return f"checks/{name}"

    def start(
        self, *args: str, kernel: str = KERNEL, env: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Start pytest.

        :param kernel: for ``--kernel``; empty for none.
        :param env: on top of ours.
        :param wrapper: a command that runs pytest's.
        """
        (self.root / "junit.xml").unlink(missing_ok=True)
        # Whoever runs us in the background may have had SIGINT ignored, which a process inherits.
        # By its path: a test may give its pytest a PATH with nothing in it.
        interruptible = ["/usr/bin/env", "--default-signal=INT"]
        command = [*wrapper, *interruptible, sys.executable, "-m", "pytest", "--junitxml=junit.xml", *args]
        if "XDG_STATE_HOME" not in os.environ:
            # Of this user only the last ten runs with failures are kept. Ours must not push them out.
            command.append(f"--artifacts={tempfile.mkdtemp(prefix='artifacts-', dir=self.root)}")
        return subprocess.Popen(
            command + ([f"--kernel={kernel}"] if kernel else []),
            cwd=self.root,
            env=os.environ | {"TMPDIR": str(self.tmp), "PYTHONDONTWRITEBYTECODE": "1"} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> Outcome:
        """Wait for a run and read what it left."""
        try:
            output, _ = process.communicate(timeout=_STUCK)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=30)
            raise AssertionError(f"pytest did not end in {_STUCK:.0f} s:\n{output}") from None
        return Outcome(process.returncode, output, read_cases(self.root / "junit.xml"))

    def run(
        self, *args: str, kernel: str = KERNEL, env: Mapping[str, str] | None = None, wrapper: Sequence[str] = ()
    ) -> Outcome:
        """:meth:`start` and :meth:`finish`."""
        return self.finish(self.start(*args, kernel=kernel, env=env, wrapper=wrapper))

    def machines(self) -> dict[int, str]:
        """Process ids of the lab's QEMUs, with what their consoles show."""
        found = {}
        for proc in Path("/proc").iterdir():
            if not proc.name.isdigit():
                continue
            try:
                argv = (proc / "cmdline").read_bytes().decode(errors="replace").split("\0")
                alive = "State:\tZ" not in (proc / "status").read_text()
            except OSError:
                continue  # ended while we looked
            console = next((a.split("path=")[1].split(",")[0] for a in argv if a.startswith("file,id=console")), "")
            if alive and "qemu" in argv[0] and console.startswith(str(self.tmp)):
                found[int(proc.name)] = Path(console).read_text(errors="replace") if Path(console).exists() else ""
        return found

    def running(self) -> list[int]:
        """The QEMUs that are in the middle of a test."""
        return [pid for pid, console in self.machines().items() if "harness: begin" in console.rpartition(": end ")[2]]

    def left_over(self) -> list[str]:
        """What machines left in the temporary directory."""
        return sorted(path.name for path in self.tmp.glob("mremap-harness-*"))


def run_own_tests(report: Path, *args: str) -> Outcome:
    """Run pytest on the project's own guest tests; the output is what it wrote to stdout.

    :param report: where the JUnit report goes.
    """
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *args]
    done = subprocess.run(command, cwd=paths.PROJECT, capture_output=True, text=True, errors="replace", check=False)
    return Outcome(done.returncode, done.stdout, read_cases(report))


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Wait for something to become true.

    :raises DeadlineExceeded: if it does not.
    """
    deadline = Deadline.after(seconds)
    while not condition():
        deadline.check(what)
        time.sleep(0.05)


def read_cases(report: Path) -> list[Case]:
    """The tests in a JUnit report; none if it was not written."""
    return [_case(node) for node in ET.parse(report).iter("testcase")] if report.exists() else []


def _case(node: ET.Element) -> Case:
    name, _, parameters = node.get("name", "").partition("[")
    trouble = next((child for child in node if child.tag in ("failure", "error", "skipped")), None)
    return Case(
        name=name,
        parameters=parameters.removesuffix("]"),
        outcome="passed" if trouble is None else trouble.tag,
        message="" if trouble is None else trouble.get("message", ""),
        text="" if trouble is None else "".join(node.itertext()),
        properties={each.get("name", ""): each.get("value", "") for each in node.iter("property")},
    )
