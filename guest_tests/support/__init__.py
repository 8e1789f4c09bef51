# SPDX-License-Identifier: GPL-2.0
"""What the tests share, on top of the library in :mod:`guest_tests.mm`.

=================  ==================================================================================================
module             holds
=================  ==================================================================================================
``checks``         assertions about system calls and memory: layout, refusals, accounting
``moves``          moves with each flag, and what a kernel without the flags must do instead
``found``          assertions that the kernel's reverse walk finds pages; which probes can run here
``swapping``       bring memory into swap and back
``stalled``        swap devices whose writes do not end before the test lets them
``holds``          references and pins that a test takes on pages
``folios``         large folios, huge pages, and the settings that produce them
``races``          threads that repeat a step
``ksm_scenes``     merged and moved pages, and what is asserted of them
``observer``       tells subscribers of the carve-outs, moves, walks and children of a test
``evidence``       a subscriber: what the memory looked like, for the report of a failure
``audited``        a subscriber: audits of the whole reverse map by the host
``fixtures``       the fixtures and hooks, as a pytest plug-in
=================  ==================================================================================================
"""
