# SPDX-License-Identifier: GPL-2.0
"""The audit: checks the whole reverse map of a guest by reading the guest's memory.

A probe makes the kernel walk the reverse map of one page, and looks for the effects. The audit makes the kernel do
nothing. It stops the guest, reads the kernel's structures, and repeats the rmap walks itself. For each present
anonymous page-table entry of each process it proves that the walk from the page finds the entry. It also checks the
opposite direction: everything in the reverse map must lead to something that exists, and the kernel's counters must be
right.

Reading a guest:

- :mod:`layout`: the offsets and sizes of the kernel's structures, from debug information
- :mod:`debuginfo`: finds that debug information
- :mod:`dump`: stops a running guest to read its memory
- :mod:`memory`, :mod:`kdump`: memory by address, in ELF dumps and in compressed dumps
- :mod:`pagetable`: page-table formats
- :mod:`chain`: linked lists
- :mod:`kernel`: processes, VMAs and locks
- :mod:`folios`: folios
- :mod:`rmap`: anon_vmas, KSM's stable nodes, and the rmap walks

Checking it:

- :mod:`walk`: the audit, from beginning to end
- :mod:`spaces`: all address spaces and their VMAs
- :mod:`vma_links`: the links of VMAs to anon_vmas
- :mod:`entries`: the page tables of each process
- :mod:`pages`: each page-table entry
- :mod:`anon_vmas`, :mod:`stable_nodes`, :mod:`mapcounts`: the opposite direction
- :mod:`neighbours`: why two adjacent VMAs are not merged
- :mod:`context`: what these checks share
- :mod:`ledger`: where they note discrepancies

Reporting:

- :mod:`discrepancies`, :mod:`result`: what an audit returns
- :mod:`live`: audits while a test runs
- :mod:`picture`: a drawing of the audited memory
"""
