# SPDX-License-Identifier: GPL-2.0
"""Assertions that the kernel's reverse walk finds pages, and the choice of probes that can run here.

``assert_found(moved)``
    is how a test that moved memory ends: every page of these mappings is found.
``assert_found_at(here, there)``
    is for one page that is mapped at several places, also in other processes.
``assert_found_by(probe, places, story)``
    is for tests about one kind of walk, or about each kind (:data:`every_probe`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import pytest

from guest_tests.mm import kpage, numa, pagemap, swap
from guest_tests.mm.mapping import PAGE_SIZE, Mapping
from guest_tests.mm.probes import PROBES, Answer, Place, Probe
from guest_tests.mm.probes.migration import MovePages, SoftOffline
from guest_tests.mm.probes.reclaim import Pageout
from guest_tests.support.swapping import page_out

# --- which probes can run here -----------------------------------------------------------------------------------

#: run a test with each probe; the ``probe`` fixture skips those that cannot run here
every_probe = pytest.mark.parametrize("probe", PROBES, ids=repr, indirect=True)

#: probes that migrate a page and leave it alive, the fastest first
_MIGRATING: Final[tuple[Probe, ...]] = (MovePages(), SoftOffline())


def usable(*probes: Probe) -> Probe:
    """The first of ``probes`` that can run here. Skips the test if none can, and says what each lacks."""
    missing = {}
    for probe in probes:
        reason = probe.missing()
        if reason is None:
            return probe
        missing[probe.name] = reason
    pytest.skip("; ".join(f"probe {name}: {reason}" for name, reason in missing.items()))


# --- every page of some mappings ---------------------------------------------------------------------------------

_TRIES: Final = 3


def assert_found(*mappings: Mapping, pageout: bool = True) -> None:
    """Make the kernel walk the reverse map of every folio of ``mappings``, and check the data again.

    All pages migrate to the other node, or are soft-offlined where there is one node only. Then all are swapped out
    that are mapped once.
    What did not follow is probed again by itself, with a control page, before it is called lost. Pages that are not
    present, and the shared zero page, have no reverse map and are left out.

    :param pageout: False for memory that cannot be swapped out: it is locked, or other processes map it too.
    :raises AssertionError: naming the page that was not found, with the probe's evidence.
    """
    swaps = pageout and swap.free_kb() > sum(mapping.length for mapping in mappings) >> 9
    migrates = any(probe.missing() is None for probe in _MIGRATING)
    for mapping in mappings:
        assert folios(mapping), f"no page is present in the mapping at {mapping.address:#x}: nothing to walk for"
        if not swaps:
            usable(*_MIGRATING)
        if migrates:
            _assert_migrates(mapping)
        if swaps:
            _assert_swaps(mapping, migrated=migrates)
        mapping.check()


def _assert_migrates(mapping: Mapping) -> None:
    waiting = folios(mapping)
    for _ in range(_TRIES if MovePages().missing() is None else 0):
        addresses = list(waiting)
        there = [next(node for node in numa.nodes() if node != here) for here in numa.nodes_of(addresses)]
        numa.move_pages(0, addresses, there, numa.MPOL_MF_MOVE_ALL)
        now = pagemap.pfns(mapping.address, mapping.pages)
        waiting = {each: pfn for each, pfn in waiting.items() if now[_index(mapping, each)] == pfn}
        if not waiting:
            return
    for address in waiting:
        _assert_complete(usable(*_MIGRATING), [Place(address)], _where(mapping, address))


def _assert_swaps(mapping: Mapping, *, migrated: bool) -> None:
    page_out(mapping)
    for address, pfn in folios(mapping).items():
        # MADV_PAGEOUT passes over pages that are mapped more than once, so that it says nothing of a page that KSM
        # has merged. The migration before has found its mappings.
        if migrated and kpage.Flag.KSM in kpage.flags(pfn) and kpage.mapcount(pfn) > 1:
            continue
        _assert_complete(Pageout(), [Place(address)], _where(mapping, address))


def _index(mapping: Mapping, address: int) -> int:
    return (address - mapping.address) // PAGE_SIZE


def _where(mapping: Mapping, address: int) -> str:
    return f"page {_index(mapping, address)} of the mapping at {mapping.address:#x}"


_TAIL: Final = int(kpage.Flag.COMPOUND_TAIL)
_COMPOUND: Final = int(kpage.Flag.COMPOUND_HEAD | kpage.Flag.COMPOUND_TAIL)
_ZERO: Final = int(kpage.Flag.ZERO_PAGE)


def folios(mapping: Mapping) -> dict[int, int]:
    """One address in every folio that is mapped, and the page frame there. The zero page is left out.

    The address in a large folio is that of its first mapped page.
    """
    found = {}
    last, last_is_large = -1, False
    # One file for all pages: kpage.flags() opens it for each.
    fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for index, entry in enumerate(pagemap.entries(mapping.address, mapping.pages)):
            pfn = entry.pfn
            if pfn is None:
                last = -1
                continue
            flags = int.from_bytes(os.pread(fd, 8, pfn * 8), "little")
            if not flags & _ZERO and not (flags & _TAIL and last_is_large and pfn == last + 1):
                found[mapping.page(index)] = pfn
            last, last_is_large = pfn, bool(flags & _COMPOUND)
    finally:
        os.close(fd)
    return found


# --- one page ----------------------------------------------------------------------------------------------------


def places_of(*mappings: Mapping) -> list[Place]:
    """Every page of ``mappings`` in this process, for a probe."""
    return [Place(address) for mapping in mappings for address in mapping.page_addresses]


def assert_found_at(*places: Place) -> None:
    """Make the kernel walk the reverse map of one page, and assert that it finds every place where it is mapped."""
    _assert_complete(usable(*_MIGRATING), places, str(places[0]))


def _assert_complete(probe: Probe, places: Sequence[Place], where: str) -> None:
    answer = probe.walk(places)
    assert not answer.lost, f"the kernel's reverse walk does not find {where}: {answer}"
    assert answer.complete, f"the probe cannot tell whether the kernel's reverse walk finds {where}: {answer}"


def assert_found_by(probe: Probe, places: Sequence[Place], story: str) -> Answer:
    """Assert that one kind of reverse walk finds the page at all ``places``. Skips if the probe cannot tell.

    :param story: what happened to the page; completes "after …".
    :raises AssertionError: naming the places that the walk did not find, and what the probe saw.
    """
    answer = probe.walk(places)
    if answer.inconclusive:
        pytest.skip(f"probe {answer.probe} cannot tell: {answer.inconclusive} ({answer.evidence})")
    lost = ", ".join(sorted(str(place) for place in answer.lost))
    assert answer.complete, (
        f"after {story}, the reverse walk of {answer.probe} does not find the page at {lost} (process:address), "
        f"though the same walk finds a page that never moved. Seen: {answer.evidence}"
    )
    return answer


def destroys(probe: Probe) -> bool:
    """Whether a walk of this probe leaves a page that can no longer be read."""
    return probe.name == "hwpoison"


def require_migration() -> None:
    """Skip the test unless move_pages() can move pages to another node."""
    usable(MovePages())
