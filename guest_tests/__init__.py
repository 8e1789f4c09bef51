# SPDX-License-Identifier: GPL-2.0
"""What runs inside the guest: the tests, and the libraries they are written with.

:mod:`guest_tests.mm` has the system calls, memory, processes and probes. :mod:`guest_tests.support` has what tests
share: fixtures, scenes and assertions. ``TESTS.md`` is the table of all tests. This is a complete test, the one in
``test_example.py``::

    from guest_tests.mm.mapping import CarveOut, move
    from guest_tests.support.found import assert_found


    def test_moved_pages_are_found(area: CarveOut) -> None:
        source = area.map(0, 5).fill()  # five pages at page 0 of the carve-out, each with its own data
        moved = move(source, area.page(20))  # to page 20
        moved.check()  # every byte has arrived
        assert_found(moved)  # the kernel's reverse walk finds every page

A test that gives flags takes the fixture ``relocate`` and moves with ``support.moves.move_or_refused()``, so that it
runs on kernels that do not know the flags as well.

Needs Python 3.11 or newer, its standard library and pytest, nothing else. Importing a module here has no side effects,
so that the host can collect the tests of a guest that it has not booted yet.
"""
