# SPDX-License-Identifier: GPL-2.0
"""A library to place, fill, move and look at memory of a running kernel, by ctypes alone.

=====================  ==============================================================================
:mod:`.syscalls`       raw system calls, constants, errno as :class:`OSError`
:mod:`.mapping`        carve-outs, mappings that know what they should hold, moves
:mod:`.maps`           what the kernel says of address ranges: maps, smaps, ``PROCMAP_QUERY``
:mod:`.pagemap`        what it says of pages in a process: pagemap, ``PAGEMAP_SCAN``
:mod:`.kpage`          what it says of page frames: kpageflags, kpagecount
:mod:`.ksm`            KSM: knobs saved and restored, scans waited for, counters
:mod:`.numa`           nodes, ``move_pages``, memory policies
:mod:`.memcg`          memory control groups, version 2
:mod:`.swap`           swap areas
:mod:`.vmstat`         counters of the system and of processes
:mod:`.proctree`       trees of forked processes that run functions on request
:mod:`.sigbus`         learning of poisoned memory
:mod:`.userfault`      userfaultfd, as far as moving memory needs it
:mod:`.system`         kernel release, configuration, and skips that say what is missing
:mod:`.waiting`        bounded waits, scaled to the speed of the machine
=====================  ==============================================================================
"""
