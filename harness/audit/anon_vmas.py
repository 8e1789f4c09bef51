# SPDX-License-Identifier: GPL-2.0
"""Checks the anon_vmas: their interval trees, what uses them, and their counters."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping

from harness.audit.context import Context
from harness.audit.discrepancies import DiscrepancyKind, Severity
from harness.audit.kernel import Vma
from harness.audit.ledger import Values, Where
from harness.audit.rmap import AnonVma, Link


class AnonVmaChecks:
    """Checks the anon_vmas that were met; to be used after all VMAs have been checked.

    :param vmas: every VMA, by address of the vm_area_struct.
    :param may_list: whether the list of a link's VMA holds the link; True if that is unknown.
    :param ksm_references: by anon_vma: number of rmap items of KSM that hold a reference to it.
    """

    def __init__(
        self,
        context: Context,
        vmas: Mapping[int, Vma],
        may_list: Callable[[Link], bool],
        ksm_references: Counter[int],
    ) -> None:
        self._context = context
        self._vmas = vmas
        self._may_list = may_list
        self._ksm_references = ksm_references

    @property
    def _readable(self) -> Iterator[AnonVma]:
        return (each for each in self._context.rmap.anon_vmas.values() if each is not None)

    def check_trees(self) -> None:
        """Check the interval trees."""
        for anon_vma in self._readable:
            for problem in anon_vma.problems:
                self._note(
                    DiscrepancyKind.BROKEN_CHAIN,
                    anon_vma,
                    Values(expected="a consistent tree", actual=problem),
                    problem,
                )
            for link in anon_vma.links.values():
                if link.vma.at in self._vmas:  # check_users() reports a link of a VMA that does not exist
                    self._check_link(anon_vma, link)

    def _check_link(self, anon_vma: AnonVma, link: Link) -> None:
        name = f"the anon_vma_chain at {link.at:#x}"
        if link.anon_vma != anon_vma.at:
            self._note(
                DiscrepancyKind.BROKEN_CHAIN,
                anon_vma,
                Values(expected=f"{anon_vma.at:#x}", actual=f"{link.anon_vma:#x}"),
                f"its interval tree holds {name}, which points to anon_vma {link.anon_vma:#x}",
            )
            return
        if not self._may_list(link):
            self._note(
                DiscrepancyKind.BROKEN_CHAIN,
                anon_vma,
                Values(expected=f"{name} in the list of VMA {link.vma}", actual="not there"),
                f"its interval tree holds {name} of VMA {link.vma}, but the list of this VMA does not: it will stay "
                "in the tree when the VMA is freed",
            )
        below = [anon_vma.links[each].subtree_last for each in (link.left, link.right) if each in anon_vma.links]
        largest = max([link.last, *below])
        if link.subtree_last != largest:
            self._note(
                DiscrepancyKind.BROKEN_CHAIN,
                anon_vma,
                Values(expected=f"{largest:#x}", actual=f"{link.subtree_last:#x}"),
                f"in its interval tree, the rb_subtree_last of {name} of VMA {link.vma} is {link.subtree_last:#x}, but "
                f"the last index below it is {largest:#x}: searches may stop too early",
            )

    def check_users(self) -> None:
        """Check the VMAs that use each anon_vma, and its counters; only if all processes were checked."""
        users: dict[int, list[int]] = defaultdict(list)
        for vma in self._vmas.values():
            users[vma.anon_vma].append(vma.mm)
        in_use = [each for each in self._readable if each.links]
        children = Counter(each.parent for each in in_use)
        descendants = Counter(each.root for each in in_use if each.root != each.at)
        for anon_vma in self._readable:
            mms = users.get(anon_vma.at, [])
            self._check_vmas(anon_vma)
            self._check_counters(anon_vma, children[anon_vma.at], mms)
            self._check_refcount(anon_vma, descendants[anon_vma.at], mms)

    def _check_vmas(self, anon_vma: AnonVma) -> None:
        for link in anon_vma.links.values():
            if link.vma.at not in self._vmas:
                self._note(
                    DiscrepancyKind.STALE_RMAP_ITEM,
                    anon_vma,
                    Values(expected="a VMA of a process", actual=f"{link.vma.at:#x}"),
                    f"its interval tree leads to a VMA at {link.vma.at:#x} that belongs to no process",
                )

    def _check_counters(self, anon_vma: AnonVma, children: int, mms: Collection[int]) -> None:
        for what, found, name, counter in (
            ("VMAs", len(mms), "num_active_vmas", anon_vma.active),
            ("children", children, "num_children", anon_vma.children),
        ):
            if found != counter:
                self._note(
                    DiscrepancyKind.COUNT_MISMATCH,
                    anon_vma,
                    Values(expected=str(found), actual=str(counter)),
                    f"it has {found} {what}, but its {name} is {counter}",
                    mms=mms,
                )

    def _check_refcount(self, anon_vma: AnonVma, descendants: int, mms: Collection[int]) -> None:
        held_by_ksm = self._ksm_references[anon_vma.at]
        least = bool(anon_vma.links) + descendants + held_by_ksm
        if anon_vma.refcount < least:
            self._note(
                DiscrepancyKind.COUNT_MISMATCH,
                anon_vma,
                Values(expected=f"at least {least}", actual=str(anon_vma.refcount)),
                f"at least {least} references to it exist, but its refcount is {anon_vma.refcount}: it will be freed "
                "too early",
                self._context.ksm_severity() if held_by_ksm else Severity.ERROR,
                mms,
            )

    def _note(
        self,
        kind: DiscrepancyKind,
        anon_vma: AnonVma,
        values: Values,
        statement: str,
        severity: Severity = Severity.ERROR,
        mms: Collection[int] = (),
    ) -> None:
        """Note a discrepancy of an anon_vma; it is in motion if the lock of the anon_vma is held.

        :param mms: address spaces concerned, beside those of the VMAs in the tree.
        """
        if self._context.rmap.locked(anon_vma):
            severity = Severity.IN_MOTION
        concerned = frozenset(link.vma.mm for link in anon_vma.links.values()).union(mms)
        self._context.ledger.add(
            kind, Where(anon_vma.at, mms=concerned), values, f"anon_vma {anon_vma.at:#x}: {statement}", severity
        )
