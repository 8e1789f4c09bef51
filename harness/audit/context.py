# SPDX-License-Identifier: GPL-2.0
"""What all checks of one audit share."""

from __future__ import annotations

from collections import Counter

from harness.audit.discrepancies import Severity
from harness.audit.folios import Folios
from harness.audit.kernel import Kernel
from harness.audit.ledger import Ledger
from harness.audit.rmap import ReverseMap


class Context:
    """The kernel under audit, what was read of it so far, and what was found so far."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.memory = kernel.memory
        self.layout = kernel.layout
        self.rmap = ReverseMap(kernel)
        self.folios = Folios(kernel)
        self.ledger = Ledger(kernel)
        #: how much was examined, by the names of :class:`harness.audit.result.Counts`
        self.counts: Counter[str] = Counter()

    def ksm_severity(self, severity: Severity = Severity.ERROR) -> Severity:
        """The severity of a discrepancy in KSM's structures: an error is "in motion" while KSM is at work.

        A page is marked as a KSM page before it has a stable node, and an item is removed from its list before the
        node's counter is decremented. Both happen under ksm_thread_mutex alone (try_to_merge_one_page() and
        remove_rmap_item_from_tree(), mm/ksm.c).
        """
        return Severity.IN_MOTION if severity is Severity.ERROR and self.kernel.ksm_at_work else severity
