# SPDX-License-Identifier: GPL-2.0
"""Shows on pytest's terminal what takes long."""

from __future__ import annotations

import contextlib

import pytest

from harness.host.terminal import ProgressLine


class TerminalProgress:
    """Tells the person at pytest's terminal, or the log of a run without one.

    pytest makes its terminal reporter after plug-ins are configured, so that it is looked for when there is something
    to tell. A worker of pytest-xdist has none and tells nothing.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._line: ProgressLine | None = None

    def __call__(self, message: str) -> None:
        """Show one step."""
        reporter = self._reporter()
        if reporter is None:
            return
        if self._line is None:
            self._line = ProgressLine(
                lambda text: self._write(reporter, text), lambda: reporter._tw.fullwidth, in_place=bool(reporter.isatty)
            )
        self._line(message)

    def _write(self, reporter: pytest.TerminalReporter, text: str) -> None:
        capture = self._config.pluginmanager.get_plugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
            if self._line is not None and not self._line.shown:
                reporter.ensure_newline()  # behind a row of dots, say
            reporter.write(text, flush=True)

    def clear(self) -> None:
        """Take away what is shown in place, before anybody else writes."""
        if self._line is not None:
            self._line.clear()

    def _reporter(self) -> pytest.TerminalReporter | None:
        found = self._config.pluginmanager.get_plugin("terminalreporter")
        return found if isinstance(found, pytest.TerminalReporter) else None
