# SPDX-License-Identifier: GPL-2.0
"""The formats that results can be written in, and writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path

from harness.errors import UsageError
from harness.host import files
from harness.report.runs import Run

#: What stands for standard output where a file is asked for.
STDOUT = "-"

#: The module that writes each format. It is imported when it is needed.
_WRITERS = {
    "html": "harness.report.page",
    "junit": "harness.report.junit",
    "kcidb": "harness.report.kcidb",
    "ktap": "harness.report.ktap",
}


class Outputs:
    """The files that somebody asked for.

    :param wanted: name of the file by format; :data:`STDOUT` is possible.
    :param inputs: files that must not be overwritten.
    :param settings: what else a writer takes, by format.
    :raises UsageError: if one cannot be written, or would overwrite another one.
    """

    def __init__(
        self,
        wanted: Mapping[str, str],
        inputs: Mapping[str, Path] | None = None,
        settings: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        self._wanted = dict(wanted)
        self._settings = settings or {}
        if list(self._wanted.values()).count(STDOUT) > 1:
            raise UsageError("only one format can be written to standard output: give the others a file")
        paths = {f"--{name}": Path(file) for name, file in self._wanted.items() if file != STDOUT}
        for path in paths.values():
            files.check_writable(path)
        files.check_distinct({**(inputs or {}), **paths})

    @property
    def to_stdout(self) -> bool:
        """Whether one of them goes to standard output."""
        return STDOUT in self._wanted.values()

    def write(self, run: Run) -> None:
        """Write all of them.

        :raises UsageError: if a setting makes no sense.
        :raises HostError: if the disk is full, or not writable, or a package is missing.
        """
        texts = {name: _text(name, run, self._settings.get(name, {})) for name in self._wanted}
        for name, file in self._wanted.items():
            text = texts[name]
            if file == STDOUT:
                encoding = sys.stdout.encoding or "utf-8"
                sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
                sys.stdout.flush()
            else:
                files.write(Path(file), text)


def _text(name: str, run: Run, settings: Mapping[str, str]) -> str:
    write: Callable[..., str] = import_module(_WRITERS[name]).text
    return write(run, **settings)
