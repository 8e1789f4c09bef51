# SPDX-License-Identifier: GPL-2.0
"""Audits of guests while their tests run: when they happen, which processes they cover, and that no finding is lost."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.probes import Answer, Place, Probe
from guest_tests.mm.probes.place import Page
from guest_tests.mm.proctree import Child
from guest_tests.support.audited import Audit, Watch
from guest_tests.support.observer import Observed


class Host:
    """Answers as the host does, and remembers what it was asked."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.wrong = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.labels.append(request["label"])
        finding = {"severity": "error", "sentence": "a page is lost"}
        return {"summary": "", "wrong": self.wrong, "findings": [finding] * self.wrong, "pages": []}


class NoProbe(Probe):
    """Never asked."""

    name = "no probe"

    def missing(self) -> str | None:
        raise NotImplementedError

    def force(self, page: Page) -> str:
        raise NotImplementedError

    def look(self, page: Page) -> Answer:
        raise NotImplementedError


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture(params=[False, True], ids=["end", "each-move"])
def watch(host: Host, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(syscalls, "mremap", lambda *_: 0)
    monkeypatch.setattr(Probe, "walk", lambda probe, places, control=None: probe.unable("it is none", ""))
    return Watch(Audit(host.ask), Observed(monkeypatch), each_move=request.param)


def move() -> None:
    syscalls.mremap(0, 0, 0, 0)


def wrong_before_a_probe(host: Host) -> None:
    """Something is wrong in the middle of a test, and heals."""
    move()
    host.wrong = 1
    NoProbe().walk([Place(0x1000)])
    host.wrong = 0


def test_moves_of_a_child_are_audited_while_it_is_there_and_in_the_end(host: Host, watch: Watch) -> None:
    with Child() as child:
        with child.fork() as grandchild:
            grandchild.call(move)
            assert host.labels == [], "a child has no link to the host"
        assert host.labels == [f"before the end of child {grandchild.pid}"]
    watch.over()
    assert host.labels == [f"before the end of child {grandchild.pid}", "at the end of the test"]


def test_a_child_that_moves_nothing_costs_nothing(host: Host, watch: Watch) -> None:
    with Child():
        pass
    watch.over()
    assert host.labels == []


def test_what_a_child_left_wrong_fails_the_test(host: Host, watch: Watch) -> None:
    with Child() as child:
        child.call(move)
        host.wrong = 1
    host.wrong = 0
    with pytest.raises(AssertionError, match="before the end of child"):
        watch.over()
    watch.over()


def test_what_was_wrong_before_a_probe_is_not_forgotten(host: Host, watch: Watch) -> None:
    wrong_before_a_probe(host)
    with contextlib.suppress(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            watch.over()  # a test that fails has its own word for it
    with pytest.raises(AssertionError, match=r"before no probe.*\n.*a page is lost"):
        watch.over()


def test_a_failure_of_another_reason_has_the_last_word(host: Host, watch: Watch) -> None:
    wrong_before_a_probe(host)
    watch.failed()
    watch.over()
