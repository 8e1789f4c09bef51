# SPDX-License-Identifier: GPL-2.0
"""What gives out guests: the same to its user for virtual machines and for a board."""

from __future__ import annotations

from typing import Protocol

from harness.agent import protocol
from harness.guests.guest import Guest, Patience


class GuestSource(Protocol):
    """The guests of one kernel, all with the same tests."""

    #: how long to wait for what
    patience: Patience
    #: why guests are not made as asked, in a sentence; empty if they are
    obstacle: str

    @property
    def origin(self) -> str:
        """How guests come into being, for reports: "clone", "cold boot" or "board"."""

    @property
    def slowdown(self) -> float:
        """How many times longer guest work may take than with hardware virtualisation."""

    def fresh(self) -> tuple[Guest, protocol.Collected]:
        """A guest that has run no test, and the tests it has collected.

        :raises BootError: if the kernel does not reach the agent, or the board cannot be reached.
        :raises HostError: if this host lacks something for it.
        """

    def facts(self, guest: Guest) -> list[str]:
        """Lines that describe the machine a guest ran on, for reports."""

    def start_ahead(self) -> None:
        """Prepare the next guest now, if that saves time."""

    def close(self) -> None:
        """End what no test uses."""
