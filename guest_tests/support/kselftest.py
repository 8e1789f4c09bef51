# SPDX-License-Identifier: GPL-2.0
"""Runs upstream's test programs, which the host has put into this guest, and judges what they print and how they end.

What a program prints is not trusted: its length, the number of its subtests and its time are limited.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import json
import os
import platform
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from guest_tests.mm import system, vmstat, waiting
from guest_tests.support import ktap
from guest_tests.support.folios import knob
from guest_tests.support.ktap import Verdict

#: where the host puts programs, and the table that describes the tests (harness/kselftest/contents.py)
DIRECTORY: Final = Path("/harness/kselftest")

#: exit status of a program that skips everything (KSFT_SKIP in kselftest.h)
_SKIP: Final = 4
#: limits: bytes that a program may print, and subtests that are reported one by one; the host takes 1023 reports
_MOST_BYTES: Final = 4 << 20
_MOST_REPORTED: Final = 1000
#: subtests that failed whose messages are kept
_MOST_SAID: Final = 5
#: bytes of stderr that are kept
_STDERR: Final = 4096
#: of the memory that a guest is given, the kernel keeps up to this share to itself
_KEPT: Final = 0.1

#: Called with each subtest as it is told of, and with why its failure is known; empty if it is not.
Tell = Callable[[ktap.Result, str], None]


class Broken(Exception):
    """The test says nothing of the kernel: its program cannot be run, or prints no sound KTAP."""


@dataclass
class Outcome:
    """How a program ended."""

    #: names of subtests by verdict; known failures are expected ones
    subtests: dict[Verdict, list[str]] = field(default_factory=lambda: {verdict: [] for verdict in Verdict})
    #: why the whole test failed, in sentences
    failures: list[str] = field(default_factory=list)
    #: what the program printed with the first subtests that failed
    said: list[str] = field(default_factory=list)
    #: why the whole test was skipped
    skipped: str = ""

    def counts(self) -> str:
        """The numbers of subtests, as a report shows them."""
        return ", ".join(f"{len(names)} {verdict.value}" for verdict, names in self.subtests.items() if names)


@dataclass(frozen=True)
class Test:
    """A row of the host's table, see harness/kselftest/catalog.py."""

    __test__ = False

    #: where the program comes from
    source: str
    fields: dict[str, Any]

    def require(self) -> None:
        """Skip the test if this machine or kernel has not what the program needs."""
        memory = self.fields["memory"]
        if (total := vmstat.meminfo()["MemTotal"] >> 10) < memory * (1 - _KEPT):
            pytest.skip(f"needs {memory} MiB of memory, this guest has {total}: give --guest-memory={memory}")
        system.require_cpus(self.fields["cpus"])
        system.require_config(*self.fields["config"])
        system.require_nodes(self.fields["nodes"])

    def known(self, subtest: str) -> str:
        """Why the failure of a subtest is known; empty if it is not."""
        for each in self.fields["known"]:
            here = each["machine"] in ("", platform.machine()) and (
                not each["most_cpus"] or (os.cpu_count() or 1) <= each["most_cpus"]
            )
            here = here and not (each["without"] and system.has_config(each["without"]))
            if here and fnmatch.fnmatchcase(subtest, each["subtest"]):
                return str(each["reason"])
        return ""


def find(name: str) -> Test:
    """The test that ``--kselftest`` names. Skips if its program is not here.

    :raises Broken: if its program does not compile.
    """
    if not DIRECTORY.is_dir():
        pytest.skip("needs a guest that the host has given upstream's tests: give --kselftest")
    table = _table()
    fields = table["tests"][name]
    if reason := table["missing"].get(fields["program"]):
        pytest.skip(f"{reason} ({table['source']})")
    if reason := table["broken"].get(fields["program"]):
        raise Broken(f"{fields['program']} of {table['source']} does not compile: {reason}")
    return Test(table["source"], fields)


def run(test: Test, tell: Tell) -> Outcome:
    """Run a test to its end.

    :raises Broken: if the program says nothing of the kernel.
    """
    outcome, reader = Outcome(), ktap.Reader()

    def take(line: str) -> None:
        if (result := reader.line(line)) is None:
            return
        known = test.known(result.name) if result.verdict is Verdict.FAILED else ""
        outcome.subtests[Verdict.XFAILED if known else result.verdict].append(result.name)
        if result.verdict is Verdict.FAILED and not known and result.diagnostics and len(outcome.said) < _MOST_SAID:
            outcome.said.append("\n".join([f"{result.name}:", *result.diagnostics]))
        if reader.count <= _MOST_REPORTED:
            tell(result, known)

    program, args = test.fields["program"], test.fields["args"]
    limit = waiting.patience(test.fields["seconds"])
    with _settings(test.fields["settings"]):
        ended = _execute(program, args, limit, take)
    _judge(program, ended, reader, outcome, limit)
    return outcome


def _judge(program: str, ended: _Ended, reader: ktap.Reader, outcome: Outcome, limit: float) -> None:
    """Say what the end of a program means."""
    said = "\n".join([*reader.said[-10:], ended.stderr]).strip()
    last = f"\nIt said last:\n{said}" if said else ""
    if ended.status is None:
        outcome.failures.append(f"{program} did not end in {limit:.0f} s, after {reader.count} subtests{last}")
    elif ended.flooded:
        raise Broken(f"{program} printed more than {_MOST_BYTES >> 20} MiB, and was ended")
    elif ended.status < 0:
        name = signal.Signals(-ended.status).name
        outcome.failures.append(f"{program} was ended by {name}, after {reader.count} subtests{last}")
    elif reader.gave_up and reader.plan != reader.count:  # some say so as well when all was run and something failed
        outcome.failures.append(f"{program} gave up after {reader.count} subtests: {reader.gave_up}{last}")
    elif ended.status == _SKIP:
        outcome.skipped = reader.skipped or said.partition("\n")[0] or "it gives no reason"
    elif trouble := reader.unfinished():
        raise Broken(f"{program} ended with status {ended.status}, and {trouble}{last}")
    elif reader.skipped:
        outcome.skipped = reader.skipped
    elif outcome.subtests[Verdict.SKIPPED] and reader.count == len(outcome.subtests[Verdict.SKIPPED]):
        outcome.skipped = f"it skipped each of {reader.count} subtests: {outcome.subtests[Verdict.SKIPPED][0]}"
    elif ended.status and not any(outcome.subtests[each] for each in (Verdict.FAILED, Verdict.XFAILED)):
        outcome.failures.append(f"{program} ended with status {ended.status}, and no subtest failed{last}")
    if failed := outcome.subtests[Verdict.FAILED]:
        more = f" and {len(failed) - 20} more" if len(failed) > 20 else ""
        noun = "subtests" if len(failed) > 1 else "subtest"
        outcome.failures.insert(0, f"{len(failed)} {noun} failed: {', '.join(failed[:20])}{more}")
        outcome.failures += outcome.said


@contextlib.contextmanager
def _settings(wanted: Mapping[str, str]) -> Iterator[None]:
    """Write to files of the kernel that exist, and write back in the end what they held."""
    with contextlib.ExitStack() as stack:
        for path, value in wanted.items():
            if Path(path).exists():
                stack.enter_context(knob(path, value))
        yield


@dataclass(frozen=True)
class _Ended:
    #: the exit status, negative for a signal; None if it was ended because its time was over
    status: int | None
    #: whether it printed too much
    flooded: bool
    #: the end of what it printed to stderr
    stderr: str


def _execute(program: str, args: list[str], seconds: float, take: Callable[[str], None]) -> _Ended:
    """Run a program with what it starts, in a directory of its own.

    :param take: called with each line that it prints.
    """
    with tempfile.TemporaryDirectory(prefix="kselftest-") as directory:
        # ksm_functional_tests starts itself again by this name.
        Path(directory, program).symlink_to(DIRECTORY / program)
        try:
            process = subprocess.Popen(
                [f"./{program}", *args],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=directory,
                env={"PATH": os.environ.get("PATH", os.defpath), "HOME": directory, "LC_ALL": "C"},
                start_new_session=True,
            )
        except OSError as error:
            raise Broken(f"{program} cannot be started: {error.strerror}") from error
        with process:
            # If memory runs out, this program is to end, and not the agent.
            with contextlib.suppress(OSError):
                Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
            try:
                flooded, stderr, late = _read(process, time.monotonic() + seconds, take)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return _Ended(None if late else process.returncode, flooded, stderr)


def _read(process: subprocess.Popen[bytes], until: float, take: Callable[[str], None]) -> tuple[bool, str, bool]:
    """Read what a program prints until it ends.

    :param until: point in time of the monotonic clock.
    :returns: whether it printed too much, the end of stderr, and whether its time was over.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    total, rest, stderr = 0, b"", b""
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        # A child that was left behind may hold the pipes open after the end.
        while selector.get_map():
            ended = process.poll() is not None
            ready = selector.select(0.0 if ended else min(0.2, max(0.0, until - time.monotonic())))
            if ended and not ready:
                break
            for key, _ in ready:
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stderr:
                    stderr = (stderr + data)[-_STDERR:]
                else:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        take(line.decode(errors="replace"))
                total += len(data)
            if total > _MOST_BYTES:
                return True, "", False
            if not ended and time.monotonic() > until:
                return False, stderr.decode(errors="replace"), True
    if rest:
        take(rest.decode(errors="replace"))
    # Both pipes may be closed while the program goes on.
    try:
        process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False, stderr.decode(errors="replace"), True
    return False, stderr.decode(errors="replace"), False


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((DIRECTORY / "tests.json").read_text())
    return table
