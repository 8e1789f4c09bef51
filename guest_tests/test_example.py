# SPDX-License-Identifier: GPL-2.0
"""The smallest complete test of a move. :mod:`guest_tests` shows it as the example."""

from guest_tests.mm.mapping import CarveOut, move
from guest_tests.support.found import assert_found


def test_moved_pages_are_found(area: CarveOut) -> None:
    source = area.map(0, 5).fill()  # five pages at page 0 of the carve-out, each with its own data
    moved = move(source, area.page(20))  # to page 20
    moved.check()  # every byte has arrived
    assert_found(moved)  # the kernel's reverse walk finds every page
