# SPDX-License-Identifier: GPL-2.0
"""Tells subscribers what a test does: its carve-outs, moves, reverse walks and children.

The library in :mod:`guest_tests.mm` has no hooks. :class:`Observed` replaces the few functions that everything goes
through, for the time of one test, and is the only place that does so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import CarveOut
from guest_tests.mm.probes import Answer, Place, Probe
from guest_tests.mm.proctree import Child


class Observer:
    """A subscriber. Each method does nothing unless it is overridden.

    Children that the test forks inherit their parent's subscribers, and call them in their own process.
    """

    def area_failing(self, area: CarveOut) -> None:
        """The ``with`` block of a carve-out ends with an error; its memory is still there."""

    def area_closing(self, area: CarveOut) -> None:
        """A carve-out is about to be unmapped. An error raised here fails the test; the carve-out is unmapped."""

    def moving(self, call: str) -> None:
        """mremap() is about to be called.

        :param call: the call with its arguments, as text.
        """

    def moved(self, call: str, result: int | OSError) -> None:
        """mremap() has returned an address, or has failed."""

    def walking(self, probe: Probe, places: Sequence[Place]) -> None:
        """A probe is about to force a reverse walk."""

    def walked(self, answer: Answer, places: Sequence[Place]) -> None:
        """A probe has forced a reverse walk."""

    def child_closing(self, child: Child) -> None:
        """A child is about to be ended by its ``close()``. An error raised here fails the test; the child is ended."""


class Observed:
    """The test that runs now, as its observers see it.

    :param patch: undoes the observation when the test ends.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        #: the carve-outs that are open now, oldest first
        self.areas: list[CarveOut] = []
        self._observers: list[Observer] = []
        self._watch_moves(patch)
        self._watch_areas(patch)
        self._watch_walks(patch)
        self._watch_children(patch)

    def subscribe(self, observer: Observer) -> None:
        """Tell ``observer`` of everything from now on, after those that subscribed earlier."""
        self._observers.append(observer)

    def _watch_moves(self, patch: pytest.MonkeyPatch) -> None:
        mremap = syscalls.mremap

        def watched(old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
            call = f"mremap({old:#x}, {old_length:#x}, {new_length:#x}, {flags:#x}, {new:#x})"
            for each in self._observers:
                each.moving(call)
            try:
                address = mremap(old, old_length, new_length, flags, new)
            except OSError as error:
                for each in self._observers:
                    each.moved(call, error)
                raise
            for each in self._observers:
                each.moved(call, address)
            return address

        patch.setattr(syscalls, "mremap", watched)

    def _watch_areas(self, patch: pytest.MonkeyPatch) -> None:
        begin, leave, close = CarveOut.__init__, CarveOut.__exit__, CarveOut.close

        def watched_begin(area: CarveOut, pages: int) -> None:
            begin(area, pages)
            self.areas.append(area)

        def watched_leave(area: CarveOut, kind: type[BaseException] | None, *error: Any) -> None:
            # An assertion that fails in a `with` block is reported only when the area is gone.
            if kind is not None:
                for each in self._observers:
                    each.area_failing(area)
            leave(area, kind, *error)

        def watched_close(area: CarveOut) -> None:
            try:
                for each in self._observers:
                    each.area_closing(area)
            finally:
                close(area)
                if area in self.areas:
                    self.areas.remove(area)

        patch.setattr(CarveOut, "__init__", watched_begin)
        patch.setattr(CarveOut, "__exit__", watched_leave)
        patch.setattr(CarveOut, "close", watched_close)

    def _watch_walks(self, patch: pytest.MonkeyPatch) -> None:
        walk = Probe.walk

        def watched(probe: Probe, places: Sequence[Place], control: Sequence[Place] | None = None) -> Answer:
            for each in self._observers:
                each.walking(probe, places)
            answer = walk(probe, places, control)
            for each in self._observers:
                each.walked(answer, places)
            return answer

        patch.setattr(Probe, "walk", watched)

    def _watch_children(self, patch: pytest.MonkeyPatch) -> None:
        close = Child.close

        def watched(child: Child) -> None:
            try:
                for each in self._observers:
                    each.child_closing(child)
            finally:
                close(child)

        patch.setattr(Child, "close", watched)
