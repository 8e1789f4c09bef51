# SPDX-License-Identifier: GPL-2.0
"""A library that maps, fills, moves and inspects memory of the running kernel, with ctypes and nothing else.

=====================  ==============================================================================
:mod:`.syscalls`       raw system calls, constants, errno as :class:`OSError`
:mod:`.mapping`        carve-outs, mappings with the data that they should hold, moves
:mod:`.maps`           address ranges as the kernel shows them: maps, smaps, ``PROCMAP_QUERY``
:mod:`.pagemap`        pages of a process as the kernel shows them: pagemap, ``PAGEMAP_SCAN``
:mod:`.kpage`          page frames as the kernel shows them: kpageflags, kpagecount
:mod:`.ksm`            KSM: save and restore knobs, wait for scans, counters
:mod:`.numa`           nodes, ``move_pages``, memory policies
:mod:`.memcg`          memory control groups, version 2
:mod:`.swap`           swap areas
:mod:`.vmstat`         counters of the system and of processes
:mod:`.proctree`       trees of forked processes that run functions on request
:mod:`.sigbus`         SIGBUS for poisoned memory
:mod:`.userfault`      userfaultfd: registration, and the event of a move
:mod:`.system`         kernel release, configuration, and skips that say what is missing
:mod:`.waiting`        bounded waits, scaled to the speed of the machine
=====================  ==============================================================================
"""
