# SPDX-License-Identifier: GPL-2.0
"""When guest tests request audits, and that every error which one of them finds fails the test."""

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
    """Answers requests for audits as the host does, and remembers their labels."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.wrong = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        self.labels.append(request["label"])
        discrepancy = {"severity": "error", "sentence": "rmap walks cannot find a page"}
        return {"summary": "", "wrong": self.wrong, "discrepancies": [discrepancy] * self.wrong, "pages": []}


class NoProbe(Probe):
    """A probe that is never used."""

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
    """An audit in the middle of a test finds an error, and later ones do not."""
    move()
    host.wrong = 1
    NoProbe().walk([Place(0x1000)])
    host.wrong = 0


def test_moves_of_a_child_are_audited_before_its_end_and_at_the_end_of_the_test(host: Host, watch: Watch) -> None:
    with Child() as child:
        with child.fork() as grandchild:
            grandchild.call(move)
            assert host.labels == [], "a child has no link to the host"
        assert host.labels == [f"before the end of child {grandchild.pid}"]
    watch.over()
    assert host.labels == [f"before the end of child {grandchild.pid}", "at the end of the test"]


def test_a_child_that_moves_nothing_causes_no_audit(host: Host, watch: Watch) -> None:
    with Child():
        pass
    watch.over()
    assert host.labels == []


def test_an_error_before_the_end_of_a_child_fails_the_test(host: Host, watch: Watch) -> None:
    with Child() as child:
        child.call(move)
        host.wrong = 1
    host.wrong = 0
    with pytest.raises(AssertionError, match="before the end of child"):
        watch.over()
    watch.over()


def test_an_error_before_a_probe_fails_the_test_later(host: Host, watch: Watch) -> None:
    wrong_before_a_probe(host)
    with contextlib.suppress(ZeroDivisionError):
        try:
            raise ZeroDivisionError
        finally:
            watch.over()  # a test that fails already keeps its own reason
    with pytest.raises(AssertionError, match=r"before no probe.*\n.*rmap walks cannot find a page"):
        watch.over()


def test_an_error_does_not_replace_another_reason_for_a_failure(host: Host, watch: Watch) -> None:
    wrong_before_a_probe(host)
    watch.failed()
    watch.over()
