# SPDX-License-Identifier: GPL-2.0
"""Which guest a test gets, and what becomes of those that wait meanwhile. No test here boots."""

from __future__ import annotations

from typing import cast

from harness.agent import protocol
from harness.guests.guest import Guest
from harness.guests.source import GuestSource
from harness.pytest_plugin.pool import Fate, Pool

READY = protocol.Ready(
    release="6.12", machine="x86_64", python="3.13", page_size=4096, tainted=0, uptime=1.0, mutant=""
)


class FakeGuest:
    """Remembers what is done to it."""

    def __init__(self) -> None:
        self.ready = READY
        self.done: list[str] = []

    def pause(self) -> None:
        self.done.append("paused")

    def resume(self) -> None:
        self.done.append("resumed")

    def close(self) -> None:
        self.done.append("closed")


class FakeSource:
    """Gives out guests that do nothing."""

    def fresh(self) -> tuple[FakeGuest, protocol.Collected]:
        return FakeGuest(), protocol.Collected([], [])


def pool() -> Pool:
    return Pool(cast(GuestSource, FakeSource()), "test")


def done(guest: Guest) -> list[str]:
    return cast(FakeGuest, guest).done


def test_a_shared_guest_is_paused_while_another_has_a_test() -> None:
    guests = pool()
    shared = guests.lease("shared")
    guests.settle(shared, Fate.SHARED)
    for _ in range(2):
        guests.settle(guests.lease(None), Fate.ENDED)
    assert done(shared.guest) == ["paused"]
    assert guests.lease("shared") is shared
    assert done(shared.guest) == ["paused", "resumed"]


def test_a_shared_guest_is_not_paused_between_two_tests_of_its_own() -> None:
    guests = pool()
    shared = guests.lease("shared")
    guests.settle(shared, Fate.SHARED)
    assert guests.lease("shared") is shared
    assert done(shared.guest) == []


def test_a_guest_that_a_person_has_is_not_paused() -> None:
    guests = pool()
    kept = guests.lease("shared")
    guests.settle(kept, Fate.KEPT)
    guests.lease(None)
    assert done(kept.guest) == []
