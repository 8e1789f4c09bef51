# SPDX-License-Identifier: GPL-2.0
"""Scenes of merged and moved pages that several tests share, and what is asserted of them.

A move un-merges what it moves (``prep_move_vma()``, mm/mremap.c). What makes these scenes interesting comes later:
KSM merges the moved page again, at an address that no longer fits the page offset of its mapping. From then on
``rmap_item->address`` and the index that the reverse walk needs differ by the distance of the move.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pytest

from guest_tests.mm import kpage, ksm, memcg, pagemap, syscalls
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.probes import PROBES, Answer, Place, Probe

#: for tests that ask every probe
every_probe = pytest.mark.parametrize("probe", PROBES, ids=repr)

#: what the pages hold that KSM is to merge
SAME = 0x77


def usable(probe: Probe) -> Probe:
    """The probe, or a skip that says what this kernel or machine lacks for it."""
    if reason := probe.missing():
        pytest.skip(f"probe {probe}: {reason}")
    return probe


@contextmanager
def own_group() -> Iterator[None]:
    """A control group of our own where there are such: reclaim needs one that is there before the memory.

    Without CONFIG_MEMCG the probes that need it skip.
    """
    with memcg.Memcg("ksm") if memcg.available() else nullcontext() as group:
        if group is not None:
            group.enter()
        yield


# --- scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One page at two addresses of this process, one of which was moved there."""

    #: one page that never moved
    stayed: Mapping
    #: one page that did, or will
    moved: Mapping

    @property
    def places(self) -> list[Place]:
        """Both, for a probe."""
        return places_of(self.stayed, self.moved)

    def check(self) -> None:
        """Assert that both still hold what they should."""
        self.stayed.check()
        self.moved.check()


def equal_pair(area: CarveOut, at: int = 0, *, dontfork: bool = True) -> Pair:
    """Two equal pages of one mergeable mapping of three, before KSM looks at them; the third is free for a move.

    :param dontfork: keep children from inheriting them, as Hugh Dickins's recipe does.
    """
    trio = area.map(at, 3)
    trio.madvise(syscalls.MADV_MERGEABLE)
    if dontfork:
        trio.madvise(syscalls.MADV_DONTFORK)
    return Pair(trio.part(0).fill_same(SAME), trio.part(1).fill_same(SAME))


def hugh(area: CarveOut, controlled: Ksm, at: int = 0, *, dontfork: bool = True) -> Pair:
    """Hugh Dickins's scene: of two equal pages the second is moved onto the third, and only then KSM merges them.

    ::

                   at  at+1 at+2
        before    | A | A |   |     one mapping
                        `---.
        after     | A |   | A |     KSM merges; the right mapping has the page offset of at+1

    :param dontfork: keep children from inheriting it, as the original recipe does.
    """
    pair = equal_pair(area, at, dontfork=dontfork)
    pair = Pair(pair.stayed, move(pair.moved, area.page(at + 2)))
    controlled.scan()
    assert_merged(pair.places)
    return pair


@contextmanager
def referenced(address: int) -> Iterator[None]:
    """One more reference to the page at ``address``, held by a pipe (vmsplice(2)).

    Reclaim then unmaps the page and leaves it in the swap cache: it cannot free it (``is_page_cache_freeable()``,
    mm/vmscan.c). On a slow swap device every page is in this state while it is written.
    """
    vector = (ctypes.c_size_t * 2)(address, PAGE_SIZE)
    reader, writer = os.pipe()
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.vmsplice(writer, ctypes.byref(vector), ctypes.c_ulong(1), ctypes.c_uint(0)) != PAGE_SIZE:
            code = ctypes.get_errno()
            raise OSError(code, f"vmsplice() of the page at {address:#x} failed: {errno.errorcode.get(code, code)}")
        yield
    finally:
        os.close(reader)
        os.close(writer)


def swap_out(places: Sequence[Place]) -> None:
    """Have the kernel reclaim our control group until no page is present at ``places``.

    :raises AssertionError: if one still is in the end.
    """
    group = memcg.current()
    for _ in range(8):
        try:
            (group / "memory.reclaim").write_text((group / "memory.current").read_text())
        except OSError as error:
            if error.errno != errno.EAGAIN:  # less than asked for: the page tables tell
                raise
        if all(pagemap.entry(place.address, place.pid).swap for place in places):
            return
    shown = ", ".join(f"{place} {pagemap.entry(place.address, place.pid)}" for place in places)
    raise AssertionError(f"reclaim of {group} does not unmap the page: {shown}")


def read_back(*mappings: Mapping) -> None:
    """Read pages of our control group that were swapped out, and let no page of them stay in the swap cache.

    Poisoned pages in there are treated differently (``me_swapcache_dirty()``, mm/memory-failure.c). A fault frees the
    swap slot that it was the last to use if the group is short of swap (``should_try_to_free_swap()``, mm/memory.c).
    """
    limit = memcg.current() / "memory.swap.max"
    limit.write_text("0")
    try:
        for mapping in mappings:
            mapping.touch_read()
    finally:
        limit.write_text("max")
    for place in places_of(*mappings):
        state = kpage.describe(pagemap.pfn(place.address))
        assert kpage.Flag.SWAPCACHE not in kpage.flags_at(place.address), f"still in the swap cache: {place} {state}"


# --- what is asserted --------------------------------------------------------------------------------------------


def places_of(*mappings: Mapping) -> list[Place]:
    """Every page of ``mappings`` in this process, for a probe."""
    return [Place(address) for mapping in mappings for address in mapping.page_addresses]


def assert_merged(places: Sequence[Place]) -> int:
    """Assert that all ``places`` map one and the same KSM page; returns its frame number.

    :raises AssertionError: naming who maps what instead.
    """
    seen = {place: pagemap.entry(place.address, place.pid) for place in places}
    frames = {entry.pfn for entry in seen.values()}
    shown = ", ".join(f"{place} {entry}" for place, entry in seen.items())
    assert len(frames) == 1, f"the places should share one page, but they map {len(frames)}: {shown}"
    (frame,) = frames
    assert frame is not None, f"no page is present: {shown}"
    # One look is enough, for being KSM's is a property of the frame: on 6.12 a look reads all of smaps.
    assert ksm.is_ksm(places[0].address, places[0].pid), f"the page is shared, but it is not KSM's: {shown}"
    return frame


def assert_unmerged(mapping: Mapping, others: Iterable[Mapping] = ()) -> None:
    """Assert that every page of ``mapping`` is present, has a frame of its own, and is not KSM's.

    :param others: more mappings of this process that must not share a frame with it.
    """
    frames = pagemap.pfns(mapping.address, mapping.pages)
    elsewhere = {frame for other in others for frame in pagemap.pfns(other.address, other.pages)}
    merged = ksm.merged(mapping.address, mapping.pages)
    for index, (frame, is_merged) in enumerate(zip(frames, merged, strict=True)):
        where = f"page {index} of the mapping at {mapping.address:#x}"
        assert frame is not None, f"{where} is not present"
        assert not is_merged, f"{where} (pfn {frame:#x}) is still a KSM page"
        assert frames.count(frame) == 1, f"{where} shares pfn {frame:#x} with another page of the mapping"
        assert frame not in elsewhere, f"{where} shares pfn {frame:#x} with another mapping"


def assert_found(probe: Probe, places: Sequence[Place], story: str) -> Answer:
    """Assert that the reverse walk finds the page at all ``places``; a probe that cannot tell is a skip that says why.

    :param story: what happened to the page; completes "after …".
    :raises AssertionError: naming the places that the walk lost, and what the probe saw.
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
    """Whether the page cannot be read after a walk of this probe."""
    return probe.name == "hwpoison"
