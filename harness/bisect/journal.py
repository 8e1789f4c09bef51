# SPDX-License-Identifier: GPL-2.0
"""The log of a bisect: a file of JSON lines, from which an interrupted bisect goes on.

The first line says what was asked. Each further line is one kernel with its verdict and the record of its tests. A line
is written as its kernel is done. ``docs/bisect.md`` describes the file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from harness import paths
from harness.bisect.step import Step
from harness.errors import UsageError
from harness.host import safe_text
from harness.host.cache import host_trouble
from harness.host.files import check_writable
from harness.report.state import State

#: Names the format in the first line of a file.
FORMAT = "mremap-harness bisect"

#: Grows when a reader of the format before would misunderstand the file.
VERSION = 1


def usual_path(question: Mapping[str, Any]) -> Path:
    """Where the log of a question is kept unless the user says otherwise."""
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:16]
    return paths.state_dir() / "bisect" / f"{digest}.jsonl"


class Journal:
    """An open log.

    :param path: the file; it is made if it does not exist.
    :param question: what is asked, as JSON has it.
    :param again: forget the verdicts in the file.
    :raises UsageError: if the file cannot be written, is no log of this question, or is in use.
    """

    def __init__(self, path: Path, question: Mapping[str, Any], *, again: bool = False) -> None:
        self.path = path
        check_writable(path)
        self._file: IO[str] = path.open("a+")
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another bisect writes {path}: wait for its end, or give --log another file"
                ) from None
            #: the steps so far by name
            self.steps = self._read(dict(question))
            if again:
                self._file.truncate(0)
                self.steps = {}
            if self._file.seek(0, os.SEEK_END) == 0:
                self._write({"format": FORMAT, "version": VERSION, "question": question})
        except BaseException:
            self._file.close()
            raise

    def add(self, step: Step) -> None:
        """Keep a step.

        :raises HostError: if the disk is full.
        """
        self.steps[step.name] = step
        self._write(asdict(step))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, data: Mapping[str, Any]) -> None:
        with host_trouble(self.path.parent):
            self._file.write(json.dumps(data) + "\n")
            self._file.flush()

    def _read(self, question: dict[str, Any]) -> dict[str, Step]:
        """The steps in the file. A last line that is incomplete is removed: its kernel is asked again."""
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if not text:
            return {}
        lines = whole.splitlines()
        try:
            head = json.loads(lines[0]) if lines else None
        except ValueError:
            head = None
        if not isinstance(head, dict) or head.get("format") != FORMAT:
            raise UsageError(f"{self.path} is no log of a bisect: give --log another file")
        if head.get("version") != VERSION:
            raise UsageError(
                f"{self.path} has version {head.get('version')} of the format, and this harness reads version "
                f"{VERSION}: use the harness that wrote it, or give --log another file"
            )
        asked = head.get("question")
        if asked != question:
            raise UsageError(
                f"{self.path} is the log of another bisect ({_difference(asked, question)}): give --log another file"
            )
        try:
            steps = [_step(json.loads(line)) for line in lines[1:]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UsageError(f"{self.path} is damaged: {error}; remove it, and start again") from None
        if whole != text:
            self._file.truncate(len(whole.encode()))
        return {step.name: step for step in steps}


def _step(data: Mapping[str, Any]) -> Step:
    return Step(
        name=_safe(data["name"]),
        state=State(data["state"]),
        message=_safe(data["message"]),
        seconds=float(data["seconds"]),
        results=str(data["results"]),
    )


def _safe(text: object) -> str:
    return safe_text.escape(str(text).partition("\n")[0])


def _difference(asked: object, question: Mapping[str, Any]) -> str:
    """In which parts two questions differ."""
    if not isinstance(asked, dict):
        return "it does not say of what"
    names = [name for name in {**asked, **question} if asked.get(name) != question.get(name)]
    return f"with another {', another '.join(map(_safe, names))}"
