# SPDX-License-Identifier: GPL-2.0
"""A pytest session in the guest that runs what the host asks for, and reports to the host alone."""

from __future__ import annotations

import gc
import importlib
import json
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol

from harness.agent import mutants, protocol
from harness.agent.channel import Channel

#: Asks the host to audit this guest's memory; for guest tests.
AUDIT = pytest.StashKey[Callable[[dict[str, Any]], dict[str, Any]]]()


class Exchange:
    """What a function that the host called talks to the host with."""

    def __init__(self, link: Channel) -> None:
        self._link = link

    def say(self, data: dict[str, Any]) -> None:
        """Send a message. A forked process may do this as well, while this one waits for it."""
        self._link.send(protocol.Say(data))

    def hear(self) -> dict[str, Any]:
        """Wait for the next message of the host."""
        message = self._link.receive()
        if not isinstance(message, protocol.Tell):
            raise protocol.BadFrame(f"{message.kind} comes in the middle of a call")
        return message.data


class HostDriven:
    """Replaces pytest's loop over the items by the host's wishes."""

    def __init__(self, link: Channel, handlers: Mapping[str, Callable[[Any], protocol.Message]]) -> None:
        self._link = link
        self._handlers = handlers
        self._errors: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config: pytest.Config) -> None:
        """Silence the terminal: the host has its own. (`-p no:terminal` would remove the options reports depend on.)"""
        config.pluginmanager.unregister(name="terminalreporter")
        self._config = config
        config.stash[AUDIT] = self.audit

    def audit(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Have the host freeze this guest at this instant and audit its memory; returns what it found."""
        self._link.send(protocol.Audit(wanted))
        answer = self._link.receive()
        if not isinstance(answer, protocol.Audited):
            raise protocol.BadFrame(f"{answer.kind} comes in the middle of a test")
        return answer.data

    def pytest_addoption(self, parser: pytest.Parser) -> None:
        """Take over the host's options that tests here must know."""
        parser.addoption("--audit", choices=("off", "end", "each-move"), default="off")
        parser.addoption("--icount", action="store_true")
        parser.addoption("--explore", type=int, default=0)
        parser.addoption("--explore-seed", type=int, default=1)
        parser.addoption("--race-seconds", type=float, default=2.0)
        parser.addoption("--race-seed", type=int, default=1)
        parser.addoption("--kselftest", action="append", default=[])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what went wrong for the host."""
        if report.failed:
            self._errors.append(f"{report.nodeid}: {report.longreprtext}")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Serve the host; never returns on a port, which never ends."""
        items = {item.nodeid: item for item in session.items}
        # What collection made stays for good: later collections need not look at it again (0.14 s each under TCG).
        gc.collect()
        gc.freeze()
        self._link.send(protocol.Collected(list(items), self._errors))
        while True:
            try:
                message = self._link.receive()
            except EOFError:
                return True
            if isinstance(message, protocol.Run):
                self._run(items[message.nodeid], items.get(message.next_nodeid), message.marker)
            elif isinstance(message, protocol.Call):
                self._link.send(protocol.Returned(call(self._link, message)))
            else:
                self._link.send(self._handlers[message.kind](message))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        """Record with the last phase which mutants' places the test reached."""
        if call.when == "teardown" and mutants.active():
            item.user_properties.append((mutants.PROPERTY, " ".join(mutants.reached())))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send each phase's report at once: the guest may not live to see the next."""
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._link.send(protocol.Report(_json_safe(data)))

    def _run(self, item: pytest.Item, next_item: pytest.Item | None, marker: str) -> None:
        if active := mutants.active():
            mutants.select(active)  # what an earlier test reached is forgotten
        mark(f"begin {marker}")
        runtestprotocol(item, nextitem=next_item)
        mark(f"end {marker}")
        self._link.send(protocol.Finished(item.nodeid, int(Path("/proc/sys/kernel/tainted").read_text())))


def call(link: Channel, wanted: protocol.Call) -> str:
    """Call a function for the host; returns the traceback if it fails."""
    module, _, name = wanted.function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(Exchange(link), wanted.data)
    except Exception:
        return traceback.format_exc()
    return ""


def _json_safe(data: Any) -> dict[str, Any]:
    # Properties may hold anything; what JSON cannot say is said as text.
    result: dict[str, Any] = json.loads(json.dumps(data, default=str))
    return result


def mark(text: str) -> None:
    """Leave a line in the kernel's log, and so on the console, at a level the console prints."""
    try:
        with open("/dev/kmsg", "w") as log:
            log.write(f"<4>harness: {text}\n")
    except PermissionError:
        pass  # a board where we are not root has no console we could read either


def run_pytest(
    link: Channel, args: list[str], directory: Path, handlers: Mapping[str, Callable[[Any], protocol.Message]]
) -> None:
    """Collect in ``directory`` and serve the host until it hangs up.

    :param handlers: answers to messages that have nothing to do with tests, by kind.
    """
    own = [f"--rootdir={directory}", "-c", str(directory / "pytest.ini"), "-p", "no:cacheprovider"]
    plugin = HostDriven(link, handlers)
    pytest.main([*own, *args], plugins=[plugin])
