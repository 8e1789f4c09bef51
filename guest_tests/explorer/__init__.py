# SPDX-License-Identifier: GPL-2.0
"""The guest's side of the explorer: runs programs and checks what they left.

=====================  ==============================================================================
:mod:`.arena`          the arena: where programs have their memory
:mod:`.calls`          rows of system calls by machine code
:mod:`.kinds`          which operations the kernel has
:mod:`.actions`        does one step of a program, in the process that calls
:mod:`.children`       the processes that a program forks
:mod:`.walks`          forced walks of the reverse map after a program
:mod:`.oracles`        what else is checked after a program: bytes, layout, accounts, marks, KSM
:mod:`.executor`       runs one program from beginning to end
:mod:`.serve`          runs programs for the host
=====================  ==============================================================================
"""
