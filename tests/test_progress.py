# SPDX-License-Identifier: GPL-2.0
"""A line of progress is rewritten in place on a terminal, and rare everywhere else."""

from __future__ import annotations

import io

import pytest

from harness.host import terminal
from harness.host.terminal import ProgressLine


def line(written: list[str], *, in_place: bool, width: int = 40) -> ProgressLine:
    return ProgressLine(written.append, lambda: width, in_place=in_place)


def test_on_a_terminal_each_step_replaces_the_one_before_and_clear_takes_it_away() -> None:
    written: list[str] = []
    progress = line(written, in_place=True)
    progress("fetching")
    progress("unpacking")
    progress.clear()
    progress.clear()
    assert written == ["\r\x1b[Kharness: fetching", "\r\x1b[Kharness: unpacking", "\r\x1b[K"]


def test_a_line_never_reaches_the_last_column() -> None:
    written: list[str] = []
    line(written, in_place=True)("x" * 100)
    (shown,) = written
    assert len(shown.removeprefix("\r\x1b[K")) == 39
    assert shown.endswith("…")


def test_without_a_terminal_short_work_is_silent_and_long_work_is_told_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    written: list[str] = []
    progress = line(written, in_place=False)
    progress("fetching")
    now[0] += 21
    progress("building, 10 of 2000 files")
    progress("building, 11 of 2000 files")
    now[0] += 19
    progress("building, 500 of 2000 files")
    now[0] += 2
    progress("building, 600 of 2000 files")
    progress.clear()
    assert written == ["harness: building, 10 of 2000 files\n", "harness: building, 600 of 2000 files\n"]


def test_a_dumb_terminal_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    written: list[str] = []
    line(written, in_place=True)("fetching")
    assert written == []


def test_a_file_is_no_terminal_and_may_belong_to_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for only_terminal, told in ((False, "harness: building\n"), (True, "")):
        out = io.StringIO()
        progress = ProgressLine.on(out, only_terminal=only_terminal)
        progress("fetching")
        now[0] += 30
        progress("building")
        assert out.getvalue() == told
