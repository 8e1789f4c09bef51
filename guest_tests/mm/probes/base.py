# SPDX-License-Identifier: GPL-2.0
"""What a probe is, and what it answers.

A probe makes the kernel walk the reverse map of one page for a reason of the kernel's own (migration, reclaim, poison,
ageing) and then looks at every place where the page is mapped: the walk *found* a place if its effect is seen there.
The answer rests on effects alone, so that a probe which walks nothing can never answer "found".

"Lost" needs more care, because a walk that was refused for another reason has no effect either. So before a place is
called lost, the same probe is asked about a control page in the same state that nobody moved. If that one is not found
either, the answer is inconclusive and says why.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

from guest_tests.mm.ksm import is_ksm
from guest_tests.mm.pagemap import Entry
from guest_tests.mm.probes.control import merged_control, plain_control
from guest_tests.mm.probes.place import Page, Place, changes, observe


@dataclass(frozen=True)
class Answer:
    """What one probe says of one page.

    A place is in ``found``, or in ``lost``, or in neither where the probe cannot tell.
    """

    #: the name of the probe
    probe: str
    #: the places where the effect of the walk was seen
    found: frozenset[Place]
    #: the places where it was not seen, although a control page showed it
    lost: frozenset[Place]
    #: what was seen at each place: addresses, frame numbers, errors
    evidence: str
    #: why the probe cannot tell; empty where it can
    inconclusive: str = ""

    @property
    def complete(self) -> bool:
        """Whether every place was found."""
        return bool(self.found) and not self.lost and not self.inconclusive

    def __str__(self) -> str:
        verdict = f"inconclusive: {self.inconclusive}" if self.inconclusive else f"{len(self.lost)} lost"
        return f"{self.probe}: {len(self.found)} found, {verdict} ({self.evidence})"


class Probe(ABC):
    """Forces reverse walks of one kind."""

    #: names the probe in test ids and reports; never changes
    name: ClassVar[str]
    #: whether a walk may leave a page frame unusable until the next boot
    consumes_pages: ClassVar[bool] = False

    def __repr__(self) -> str:
        return self.name

    @abstractmethod
    def missing(self) -> str | None:
        """What this kernel or machine lacks for the probe (a CONFIG, a node, swap, a version), or None."""

    def refuse(self, page: Page) -> str | None:
        """Why this very page cannot be probed, or None."""
        return None

    @abstractmethod
    def force(self, page: Page) -> str:
        """Make the kernel walk. Returns a remark for the evidence, such as the error it ended with."""

    @abstractmethod
    def look(self, page: Page) -> Answer:
        """Force walks of ``page`` and see what came of them at each place."""

    def ask(self, places: Sequence[Place]) -> Answer:
        """One look at the page at ``places[0]`` without any control."""
        before = observe(places)
        pfn = before[places[0]].pfn
        if pfn is None:
            return self.unable(f"no page is present at {places[0]}", changes(before, before))
        page = Page(pfn, tuple(places), before)
        reason = self.refuse(page)
        return self.look(page) if reason is None else self.unable(reason, changes(before, before))

    def walk(self, places: Sequence[Place], control: Sequence[Place] | None = None) -> Answer:
        """Which of ``places`` does the kernel find when it walks the reverse map of the page at the first of them?

        :param places: where that page is mapped; the first must have a page present. A place that maps another page
            is answered "lost".
        :param control: places of another page in the same state that was never moved. It is only touched when something
            seems lost, and then shares the fate of the page: moved, swapped out, poisoned. By default one is made at
            that moment, which runs ksmd if the page is KSM's; bring your own where that would disturb the test.
        """
        # Asked before the walk: afterwards the page may be gone.
        merged = is_ksm(places[0].address, places[0].pid)
        answer = self.ask(places)
        if not answer.lost or answer.inconclusive:
            return answer
        wanted: AbstractContextManager[Sequence[Place]]
        wanted = nullcontext(control) if control is not None else merged_control() if merged else plain_control()
        with wanted as unmoved:
            check = self.ask(unmoved)
        if check.complete:
            return replace(answer, evidence=f"{answer.evidence}; control page found: {check.evidence}")
        reason = check.inconclusive or "the same walk does not find an unmoved control page either"
        return replace(answer, lost=frozenset(), inconclusive=f"{reason} ({check.evidence})")

    def unable(self, reason: str, evidence: str) -> Answer:
        """The answer of a probe that cannot tell."""
        return Answer(self.name, frozenset(), frozenset(), evidence, reason)


class EffectProbe(Probe):
    """A probe whose forcing step changes the page-table entry of every place it finds."""

    #: How often the step is repeated while places are missing: the kernel may refuse for a moment, because a page is in
    #: a batch on its way to an LRU list or was referenced lately. Repeating cannot make a lost place look found: for
    #: that the effect must be seen at that very place.
    tries: ClassVar[int] = 3

    @abstractmethod
    def followed(self, page: Page, after: Mapping[Place, Entry]) -> frozenset[Place]:
        """The places where the effect is seen in ``after``."""

    def settle(self, page: Page) -> str:
        """Clean up after the walk. Returns a remark for the evidence."""
        return ""

    def look(self, page: Page) -> Answer:
        """See :meth:`Probe.look`."""
        wanted = frozenset(page.places)
        remarks: list[str] = []
        found: frozenset[Place] = frozenset()
        after: Mapping[Place, Entry] = page.before
        for _ in range(self.tries):
            remarks.append(self.force(page))
            after = observe(page.places)
            found = self.followed(page, after)
            if found == wanted:
                break
        remarks.append(self.settle(page))
        evidence = "; ".join([changes(page.before, after), *dict.fromkeys(filter(None, remarks))])
        return Answer(self.name, found, wanted - found, evidence)
