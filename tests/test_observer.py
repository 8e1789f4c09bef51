# SPDX-License-Identifier: GPL-2.0
"""Who is told what a guest test does, in which order, and that nothing is left open when a subscriber objects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guest_tests.mm import syscalls
from guest_tests.mm.mapping import CarveOut
from guest_tests.support.evidence import Evidence
from guest_tests.support.observer import Observed, Observer


class Diary(Observer):
    """Writes down what it is told."""

    def __init__(self, lines: list[str], name: str, objects: bool = False) -> None:
        self._lines, self._name, self._objects = lines, name, objects

    def area_failing(self, area: CarveOut) -> None:
        self._lines.append(f"{self._name}: failing")

    def area_closing(self, area: CarveOut) -> None:
        self._lines.append(f"{self._name}: closing")
        assert not self._objects, "an objection"

    def moving(self, call: str) -> None:
        self._lines.append(f"{self._name}: {call}")

    def moved(self, call: str, result: int | OSError) -> None:
        self._lines.append(f"{self._name}: {result}")


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Observed]:
    def mremap(old: int, old_length: int, new_length: int, flags: int, new: int = 0) -> int:
        if flags:
            raise OSError(22, "refused")
        return new

    monkeypatch.setattr(syscalls, "mremap", mremap)
    with pytest.MonkeyPatch.context() as patch:
        yield Observed(patch)


def test_every_subscriber_is_told_in_the_order_of_subscription(observed: Observed) -> None:
    lines: list[str] = []
    for name in ("first", "second"):
        observed.subscribe(Diary(lines, name))
    syscalls.mremap(1, 2, 3, 0, 5)
    call = "mremap(0x1, 0x2, 0x3, 0x0, 0x5)"
    assert lines == [f"first: {call}", f"second: {call}", "first: 5", "second: 5"]


def test_a_refused_move_is_told_and_still_raised(observed: Observed) -> None:
    lines: list[str] = []
    observed.subscribe(Diary(lines, "it"))
    with pytest.raises(OSError, match="refused"):
        syscalls.mremap(1, 2, 3, 32)
    assert lines[1:] == ["it: [Errno 22] refused"]


def test_a_carve_out_is_closed_even_if_a_subscriber_objects(observed: Observed) -> None:
    observed.subscribe(Diary([], "it", objects=True))
    area = CarveOut(1)
    assert observed.areas == [area]
    with pytest.raises(AssertionError, match="an objection"):
        area.close()
    assert observed.areas == []


def test_an_error_inside_of_a_carve_out_is_told_while_it_is_there(observed: Observed) -> None:
    lines: list[str] = []
    observed.subscribe(Diary(lines, "it"))
    with pytest.raises(ZeroDivisionError), CarveOut(1):
        raise ZeroDivisionError
    assert lines == ["it: failing", "it: closing"]


def test_evidence_has_a_move_that_an_audit_objects_to(observed: Observed) -> None:
    class Objects(Observer):
        def moved(self, call: str, result: int | OSError) -> None:
            raise AssertionError("the reverse map is wrong")

    evidence = Evidence(observed)
    observed.subscribe(Objects())
    with pytest.raises(AssertionError, match="the reverse map is wrong"):
        syscalls.mremap(1, 2, 3, 0, 5)
    assert ("moves", "mremap(0x1, 0x2, 0x3, 0x0, 0x5) = 0x5") in evidence.sections()
