# SPDX-License-Identifier: GPL-2.0
"""What runs inside the guest: the tests, and the library they are written with (:mod:`guest_tests.mm`).

Needs Python 3.11 or newer, its standard library and pytest, nothing else. Importing any module here has no side
effects, so that the host can collect the tests of a guest it has not booted yet.
"""
