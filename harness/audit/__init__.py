# SPDX-License-Identifier: GPL-2.0
"""Ground truth about the reverse map: an audit of all of a guest's memory, without forcing the kernel to do anything.

Probes force reverse walks and look at the effects. The audit freezes the guest, reads the kernel's own structures, and
does its walks again: for each present anonymous page-table entry of each process it proves that the walk from the page
leads back to the entry.

- :mod:`layout`, :mod:`debuginfo`: where this kernel keeps what is read, from its debug information
- :mod:`dump`, :mod:`memory`, :mod:`kdump`: the guest's memory, in place or from a dump
- :mod:`pagetable`, :mod:`kernel`, :mod:`rmap`: page tables, processes and VMAs, and the reverse map, as found there
- :mod:`walk`: the audit; :mod:`findings`: what it says; :mod:`neighbours`: why VMAs did not merge
- :mod:`live`: audits in the middle of tests; :mod:`command`: the command line; :mod:`picture`: for people
"""
