# SPDX-License-Identifier: GPL-2.0
"""Writes and reads a record of results: a file of JSON lines, one for each test, that survives a crash of the run.

``docs/results.md`` describes the format. What a guest sent is escaped and bounded here, also where pytest's reports are
safe already: a reader of the file may show it as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from harness import __version__
from harness.errors import UsageError
from harness.host import safe_text
from harness.judging.verdict import Verdict
from harness.report import results
from harness.report.results import Facts, Outcome, Result

#: Names the format in the first line of a file.
FORMAT = "mremap-harness results"

#: Grows when a reader of the format before would misunderstand the file.
VERSION = 1

#: The limit for one section of evidence, in characters. The end is kept: that is where the failure happened.
SECTION_LIMIT = 64 << 10

#: The limit for the sections of one test.
SECTIONS_LIMIT = 32

#: The limit for a line when a file is read, in characters. None that is written here comes near it.
LINE_LIMIT = 64 << 20

#: The limit for times when a file is read, in seconds since the epoch: the year 9999, the last that a date can name.
_LATEST = 253_402_300_800.0

#: The limit for all properties that one test recorded, in characters of JSON.
PROPERTIES_LIMIT = 64 << 10


@dataclass(frozen=True, kw_only=True)
class KernelFacts:
    """What the first line says of one kernel."""

    label: str
    #: as given to ``--kernel``
    spec: str
    #: empty while it is not known: of a board, or of a kernel that could not be had
    release: str = ""
    #: the upstream version, which the release may hide: Debian's 6.1.0-56 is 6.1.192
    version: str = ""
    arch: str = ""
    provenance: str = ""
    #: "kvm" or "tcg"; empty for a board
    accelerator: str = ""
    #: compiler and linker with their versions; this and the next two are empty for a kernel that was not built here
    compiler: str = ""
    #: names of the presets and the page size
    configuration: str = ""
    #: digest of the patches as KCIDB defines it; empty also if there are none
    patchset_hash: str = ""


#: What the first line has in a place of its own, where readers that do not know it do not look.
_BUILD = ("compiler", "configuration", "patchset_hash")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first line."""

    #: the harness's version
    harness: str
    #: pytest's command line
    command: tuple[str, ...]
    #: when the run began, in seconds since the epoch on the host's clock
    started: float
    kernels: tuple[KernelFacts, ...]


@dataclass(frozen=True, kw_only=True)
class Item:
    """The line of one test on one kernel."""

    #: the label of its kernel; empty if it is not known
    label: str
    #: the test's id without the label
    test: str
    #: a word of :class:`harness.report.results.Outcome`
    outcome: str
    #: a word of :class:`harness.judging.verdict.Verdict`
    verdict: str
    #: whether pytest counts it as failed: a passed test is one if it is a finding that no longer shows
    failed: bool
    #: the first line of why it did not pass
    message: str = ""
    #: when it began, in seconds since the epoch on the host's clock; 0 if that is not known
    start: float = 0.0
    #: seconds it took on the host, without getting its guest
    duration: float = 0.0
    #: "clone", "cold boot" or "board"; empty if no guest could be had
    guest: str = ""
    #: the name of the finding that the test shows when its outcome is "xfailed"; empty for an ordinary test
    finding: str = ""
    #: what the test recorded, by name; a name may come again
    properties: tuple[tuple[str, Any], ...] = ()
    #: how many properties were left out, because they are no JSON or beyond the limit
    left_out: int = 0
    #: titles and texts of the evidence, if it failed
    sections: tuple[tuple[str, str], ...] = ()

    @property
    def module(self) -> str:
        """The file that the test is in."""
        return self.test.partition("::")[0]

    @property
    def result(self) -> Result:
        """What became of it, as far as a line has it: enough to compare kernels, and for the answer."""
        facts = Facts(label=self.label, test=self.test, finding=self.finding)
        return Result(facts, Outcome(self.outcome), self.message, self.properties)


@dataclass(frozen=True)
class Recording:
    """A record that was read."""

    header: Header
    items: Sequence[Item] = ()
    #: the exit status of the run; None if it was cut short, so that tests are missing
    status: int | None = None
    #: whether the last line was incomplete, and was left out
    cut: bool = False
    #: what a reader should be told about the file, in sentences
    notes: Sequence[str] = field(default_factory=tuple)


def header(command: Iterable[str], started: float, kernels: Iterable[KernelFacts]) -> Header:
    """The first line of a run that begins now."""
    return Header(
        harness=__version__,
        command=tuple(command),
        started=round(started, 3),
        kernels=tuple(kernels),
    )


def header_line(head: Header) -> str:
    """The first line, as it is written."""
    kernels = [asdict(each) for each in head.kernels]
    builds = {each["label"]: {name: value for name in _BUILD if (value := each.pop(name))} for each in kernels}
    told = {label: build for label, build in builds.items() if build}
    return _line({"format": FORMAT, "version": VERSION, **asdict(head), "kernels": kernels, "builds": told})


def item_line(item: Item) -> str:
    """The line of a test, as it is written."""
    return _line(asdict(item))


def end_line(status: int, changes: Iterable[Mapping[str, str]] = ()) -> str:
    """The last line of a run that was not cut short.

    :param status: pytest's exit status.
    :param changes: what other kernels change about tests.
    """
    return _line({"exit_status": status, "changes": list(changes)})


def item(reports: Sequence[pytest.TestReport], start: float, duration: float) -> Item | None:
    """The line of a test from the reports of its phases; None if it is no guest test.

    :param start: seconds since the epoch.
    :param duration: in seconds.
    """
    decoded = results.decode(reports)
    if not decoded:
        return None
    result = decoded[0]
    failures = [report for report in reports if report.failed]
    properties, left_out = _bounded(result.records)
    return Item(
        label=result.facts.label,
        test=safe_text.escape(result.facts.test),
        outcome=str(result.outcome),
        verdict=results.verdict(reports),
        failed=bool(failures),
        # A finding that no longer shows has passed as far as the kernel is concerned, and still has a message.
        message=result.message or (results.message(failures[0]) if failures else ""),
        start=round(start, 3),
        duration=round(duration, 3),
        guest=result.facts.guest,
        finding=result.facts.finding,
        properties=properties,
        left_out=left_out,
        sections=tuple(_sections(failures)),
    )


def lost_item(label: str, test: str, message: str, start: float, duration: float) -> Item:
    """The line of a test whose process died, so that it has no reports."""
    return Item(
        label=label,
        test=safe_text.escape(test),
        outcome=str(Outcome.MISS),
        verdict="MISS",
        failed=True,
        message=safe_text.escape(message),
        start=round(start, 3),
        duration=round(duration, 3),
    )


def read(path: Path) -> Recording:
    """Read a file.

    :raises UsageError: if it is no record of results, or a newer version wrote it.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"cannot read the results {path}: {why}") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Recording:
    """Understand the text of a file.

    :param name: what to call it in messages.
    :raises UsageError: see :func:`read`.
    """
    lines = text.split("\n")
    cut = lines.pop() != ""
    head = _header(lines[0] if lines else "", name)
    items: list[Item] = []
    status: int | None = None
    for number, line in enumerate(lines[1:], 2):
        try:
            if len(line) > LINE_LIMIT:
                raise ValueError(f"it is longer than {LINE_LIMIT >> 20} Mi characters")
            data = json.loads(line, parse_constant=_refuse)
            if "exit_status" in data:
                status = int(data["exit_status"])
            else:
                items.append(_item(data))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"{name} is damaged in line {number}: {error}; run the tests again") from None
    notes = [f"the last line of {name} is incomplete and was left out"] if cut else []
    if status is None:
        notes.append(f"{name} was cut short after {len(items)} tests: its run did not come to its end")
    return Recording(head, items, status, cut, notes)


def _header(line: str, name: str) -> Header:
    try:
        data = json.loads(line) if len(line) <= LINE_LIMIT else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise UsageError(f"{name} is no record of results: give a file that pytest --results=FILE wrote")
    if data.get("version") != VERSION:
        raise UsageError(
            f"{name} has version {data.get('version')} of the format, and this harness reads version {VERSION}: "
            "use the harness that wrote it, or run the tests again"
        )
    try:
        return Header(
            harness=_safe(data["harness"]),
            command=tuple(map(_safe, data["command"])),
            started=_finite(data["started"]),
            kernels=tuple(_kernel(each, data.get("builds", {})) for each in data["kernels"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{name} is damaged in line 1: {error}; run the tests again") from None


def _kernel(data: Mapping[str, Any], builds: Mapping[str, Mapping[str, Any]]) -> KernelFacts:
    build = builds.get(str(data["label"]), {})
    told = {**data, **{name: build[name] for name in _BUILD if name in build}}
    return KernelFacts(**{key: _safe(value) for key, value in told.items()})


def _item(data: Mapping[str, Any]) -> Item:
    """The line of a test, as it was read.

    :raises ValueError, TypeError: if it is none.
    """
    made = Item(**data)
    Outcome(made.outcome)
    if not isinstance(made.test, str) or not isinstance(made.failed, bool):
        raise ValueError("no line of a test")
    return Item(
        label=_safe(made.label),
        test=_safe(made.test),
        outcome=made.outcome,
        verdict=str(Verdict(made.verdict)),
        failed=made.failed,
        message=_safe(made.message),
        start=_finite(made.start),
        duration=_finite(made.duration),
        guest=_safe(made.guest),
        finding=_safe(made.finding),
        properties=tuple((_safe(key), _escaped(value)) for key, value in made.properties),
        left_out=int(made.left_out),
        sections=tuple((_safe(title), _safe(text)) for title, text in made.sections),
    )


def _refuse(constant: str) -> Any:
    """NaN and the like, which Python's reader accepts and JSON has not.

    :raises ValueError: always.
    """
    raise ValueError(f"{constant} is no JSON")


def _safe(text: object) -> str:
    """Text of a file, which may come from anywhere. What was written here is escaped already, and stays as it is."""
    return safe_text.escape(str(text), columns=LINE_LIMIT)


def _finite(value: Any) -> float:
    """A number of a file.

    :raises ValueError: if it is none that a clock can show.
    """
    number = float(value)
    if not 0 <= number < _LATEST:
        raise ValueError(f"{number} is no time")
    return number


def _bounded(records: Sequence[tuple[str, Any]]) -> tuple[tuple[tuple[str, Any], ...], int]:
    """What a test recorded as far as it is JSON and within the limit, and how many properties are left out."""
    kept: list[tuple[str, Any]] = []
    room = PROPERTIES_LIMIT
    for name, value in records:
        try:
            size = len(name) + len(json.dumps(value, allow_nan=False))
        except (ValueError, TypeError, RecursionError):
            continue
        if size <= room:
            kept.append((safe_text.escape(name), _escaped(value)))
            room -= size
    return tuple(kept), len(records) - len(kept)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return safe_text.escape(value)
    if isinstance(value, list | tuple):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {safe_text.escape(str(name)): _escaped(each) for name, each in value.items()}
    return value


def _sections(failures: Sequence[pytest.TestReport]) -> Iterator[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for report in failures:
        found[f"failure in {report.when}", report.longreprtext] = None
        found.update(dict.fromkeys(report.sections))
    for title, text in list(found)[:SECTIONS_LIMIT]:
        shown = text if len(text) <= SECTION_LIMIT else f"(cut)\n{text[-SECTION_LIMIT:]}"
        yield safe_text.escape(title), safe_text.escape(shown)


def _line(data: Mapping[str, Any]) -> str:
    # ASCII only, so that a line can be counted and cut by bytes.
    return json.dumps(data, allow_nan=False) + "\n"
