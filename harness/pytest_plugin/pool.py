# SPDX-License-Identifier: GPL-2.0
"""Which guest a test gets: a fresh one, or one that it shares with other tests."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal

import pytest

from harness.guests.guest import Guest
from harness.guests.source import GuestSource

#: What gets a guest of its own.
Isolation = Literal["test", "module", "kernel"]


class Fate(Enum):
    """What becomes of a guest after a test."""

    #: it waits for the next test that may share it
    SHARED = auto()
    ENDED = auto()
    #: it stays alive for a person, until :meth:`Pool.close`
    KEPT = auto()


@dataclass
class Lease:
    """A guest in use."""

    guest: Guest
    #: the tests it has collected
    nodeids: frozenset[str]
    #: what went wrong when it collected them
    errors: list[str]
    #: the tests with the same scope share it; None if it is for one test
    scope: str | None
    #: the kernel's taint bits after the last test
    taint: int
    fate: Fate = Fate.SHARED
    #: whether its processors stand still
    paused: bool = False

    def pause(self) -> None:
        """Stop its processors, unless a person has it."""
        if not self.paused and self.fate is not Fate.KEPT:
            self.guest.pause()
            self.paused = True

    def resume(self) -> None:
        """Let it run again."""
        if self.paused:
            self.guest.resume()
            self.paused = False


class Pool:
    """The guests of one kernel that are in use.

    :param source: where fresh guests come from.
    :param isolation: what gets a guest of its own.
    """

    def __init__(self, source: GuestSource, isolation: Isolation) -> None:
        self.source = source
        self._isolation = isolation
        #: by scope. One that shared tests share waits here while an isolated test has its own.
        self._leases: dict[str | None, Lease] = {}

    def scope(self, item: pytest.Item) -> str | None:
        """What the guest that runs ``item`` may be shared with; None for nothing."""
        if self._isolation == "kernel":
            return ""
        if self._isolation == "module":
            return str(item.path)
        return "shared" if item.get_closest_marker("shared_guest") else None

    def lease(self, scope: str | None) -> Lease:
        """The guest that tests of this scope share, or a fresh one. All others are paused.

        :raises HarnessError: if there is none to be had; see :meth:`GuestSource.fresh`.
        """
        for other in self._leases.values():
            if other.scope != scope:
                other.pause()
        if scope is not None and scope in self._leases:
            lease = self._leases[scope]
            lease.resume()
            return lease
        if self._isolation == "module":
            self.end_all()  # the tests of the module before are over
        guest, collected = self.source.fresh()
        assert guest.ready is not None
        lease = Lease(guest, frozenset(collected.nodeids), collected.errors, scope, guest.ready.tainted)
        self._leases[scope] = lease
        return lease

    def settle(self, lease: Lease, fate: Fate) -> None:
        """Do with a guest what its last test decided."""
        lease.fate = fate
        if fate is Fate.ENDED:
            del self._leases[lease.scope]
            lease.guest.close()

    def end_all(self) -> None:
        """End every guest in use, those that were kept included."""
        for lease in list(self._leases.values()):
            self.settle(lease, Fate.ENDED)

    def close(self) -> None:
        """End every guest, and what was prepared for the next."""
        self.end_all()
        self.source.close()
