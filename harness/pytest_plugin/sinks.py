# SPDX-License-Identifier: GPL-2.0
"""What files a run writes of its record of results.

``--results`` and the artifacts of failures are written as each test ends, other formats at the end.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from harness.errors import HostError, UsageError
from harness.report import record
from harness.report.record import Header, Item, Recording

if TYPE_CHECKING:  # most runs write none of it
    from harness.report.artifacts import Artifacts
    from harness.report.formats import Outputs

#: The options that name a file in another format.
_FORMATS = ("html", "ktap")


class Sink(Protocol):
    """Gets the lines of a record while they are made."""

    def begin(self, header: Header) -> None:
        """The first line: the kernels are known."""

    def add(self, item: Item) -> None:
        """The line of a test that has ended."""

    def end(self, recording: Recording) -> str:
        """The run is over. Gives a line for the person at the terminal, or nothing.

        :param recording: the whole record.
        """


class ResultsFile:
    """Writes each line as it is made, so that a crash loses one test at most.

    :param path: the file; an old one is replaced.
    :raises UsageError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("w")
        except OSError as error:
            raise UsageError(f"cannot write the results to {path}: {error.strerror}") from error

    def begin(self, header: Header) -> None:
        """See :class:`Sink`."""
        self._write(record.header_line(header))

    def add(self, item: Item) -> None:
        """See :class:`Sink`."""
        self._write(record.item_line(item))

    def end(self, recording: Recording) -> str:
        """See :class:`Sink`."""
        from harness.report import runs

        if recording.status is not None:
            self._write(record.end_line(recording.status, runs.merge([recording]).changes))
        self._file.close()
        return ""

    def _write(self, line: str) -> None:
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()
            raise HostError(f"cannot write the results to {self._path}: {error.strerror}") from error


class Formats:
    """Writes other formats at the end.

    :param outputs: which, and where.
    """

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def begin(self, header: Header) -> None:
        """See :class:`Sink`."""

    def add(self, item: Item) -> None:
        """See :class:`Sink`."""

    def end(self, recording: Recording) -> str:
        """See :class:`Sink`.

        :raises HostError: if the disk is full, or not writable.
        """
        from harness.report import runs

        if self._outputs.to_stdout:
            print()  # pytest is in the middle of a line
        self._outputs.write(runs.merge([recording]))
        return ""


class FailureFiles:
    """Writes the evidence of each failed test.

    :param directory: where to; None makes one below the user's state directory when the first test fails.
    :raises UsageError: if the directory is not empty, or cannot be made.
    """

    def __init__(self, directory: Path | None) -> None:
        self._artifacts = _artifacts(directory) if directory is not None else None

    def begin(self, header: Header) -> None:
        """See :class:`Sink`."""

    def add(self, item: Item) -> None:
        """See :class:`Sink`.

        :raises HostError: if the disk is full, or not writable.
        """
        if item.failed:
            self._artifacts = self._artifacts or _artifacts(None)
            self._artifacts.add(item)

    def end(self, recording: Recording) -> str:
        """See :class:`Sink`."""
        if self._artifacts is None or self._artifacts.path is None:
            return ""
        self._artifacts.close()
        return f"the evidence of the failures is in {self._artifacts.path}"


def _artifacts(directory: Path | None) -> Artifacts:
    from harness.report.artifacts import Artifacts

    return Artifacts(directory)


def sinks(config: pytest.Config) -> list[Sink]:
    """Those that the options ask for, and the files of failures, which each run writes.

    An old file of results is replaced only when nothing else is wrong with the options.

    :raises UsageError: if a file cannot be written.
    """
    there = config.invocation_params.dir
    artifacts = config.getoption("artifacts")
    found: list[Sink] = [FailureFiles(there / Path(artifacts).expanduser() if artifacts else None)]
    results = config.getoption("results")
    path = there / Path(results).expanduser() if results else None
    # Without a default, because pytest-html replaces one of the options: see plugin.py.
    wanted = {name: file for name in _FORMATS if (file := config.getoption(name, default=""))}
    if wanted:
        from harness.report.formats import STDOUT, Outputs

        named = {
            name: file if file == STDOUT else str(there / Path(file).expanduser()) for name, file in wanted.items()
        }
        found.append(Formats(Outputs(named, {"--results": path} if path else {})))
    if path:
        found.append(ResultsFile(path))
    return found[::-1]  # the results are complete before anything else is written
