# SPDX-License-Identifier: GPL-2.0
"""Merged and moved pages that several tests share, and what they assert of them.

A move un-merges what it moves (``prep_move_vma()``, mm/mremap.c). Afterwards KSM merges the moved page again, at an
address that does not fit the page offset of its mapping. From then on ``rmap_item->address`` and the index that the
reverse walk needs differ by the distance of the move. Most tests of KSM ask whether each kind of walk copes with that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from guest_tests.mm import kpage, ksm, memcg, pagemap, swap, syscalls
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.probes import Place
from guest_tests.mm.proctree import Child
from guest_tests.support.found import places_of
from guest_tests.support.holds import Spliced
from guest_tests.support.swapping import reclaim_group

#: the byte that fills the pages that KSM is to merge
SAME = 0x77


# --- scenes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two equal pages of this process, one of which a test moves."""

    #: the page that never moves
    stayed: Mapping
    #: the page that moves
    moved: Mapping

    @property
    def places(self) -> list[Place]:
        """Both, for a probe."""
        return places_of(self.stayed, self.moved)

    def check(self) -> None:
        """Assert that both still hold their data."""
        self.stayed.check()
        self.moved.check()


def equal_pair(area: CarveOut, at: int = 0, *, dontfork: bool = True) -> Pair:
    """Two equal pages of one mergeable mapping of three, not yet merged; the third page is free for a move.

    :param at: the carve-out's page where the mapping begins.
    :param dontfork: keep children from inheriting the mapping, as Hugh Dickins's recipe does.
    """
    trio = area.map(at, 3)
    trio.madvise(syscalls.MADV_MERGEABLE)
    if dontfork:
        trio.madvise(syscalls.MADV_DONTFORK)
    return Pair(trio.part(0).fill_same(SAME), trio.part(1).fill_same(SAME))


def hugh(area: CarveOut, controlled: Ksm, at: int = 0, *, dontfork: bool = True) -> Pair:
    """Hugh Dickins's scene: of two equal pages the second is moved onto the third, and KSM merges them afterwards.

    ::

                   at  at+1 at+2
        before    | A | A |   |     one mapping
                        `---.
        after     | A |   | A |     KSM merges; the right mapping has the page offset of at+1

    (02e1b8df-d568-8cbb-b8f6-46d5476d9d75@google.com)
    """
    pair = equal_pair(area, at, dontfork=dontfork)
    pair = Pair(pair.stayed, move(pair.moved, area.page(at + 2)))
    controlled.scan()
    assert_merged(pair.places)
    return pair


def move_and_merge(pair: Pair, to: int, controlled: Ksm, flags: int = 0) -> Pair:
    """Move one page of a merged pair, assert that this un-merges it, and let KSM merge both again.

    :param to: the new address.
    :param flags: further ``MREMAP_*`` flags.
    """
    pair = Pair(pair.stayed, move(pair.moved, to, flags))
    assert_unmerged(pair.moved, [pair.stayed])
    controlled.scan()
    assert_merged(pair.places)
    return pair


@contextmanager
def pair_in_two_children(area: CarveOut) -> Iterator[tuple[Pair, Child, Child]]:
    """An equal pair of which the first child maps only ``stayed``, the second only ``moved``, and this process none.

    ::

        first child    | A | . | . |
        second child   | . | A | . |
    """
    pair = equal_pair(area, dontfork=False)
    with Child() as first, Child() as second:
        pair.stayed.unmap()
        pair.moved.unmap()
        first.call(pair.moved.unmap)
        second.call(pair.stayed.unmap)
        yield pair, first, second


@contextmanager
def in_swap_cache(area: CarveOut, controlled: Ksm) -> Iterator[Pair]:
    """A merged pair that is swapped out, but whose page stays in the swap cache until the block ends.

    Reclaim writes pages to a slow device in the background, and until that is done they stay in the swap cache. The
    guest's swap device writes at once, so a pipe keeps the page there.

    Read the page that stayed last: the last read frees the swap slot, unless it copies the page (do_swap_page()). A
    kernel without the findings of :mod:`guest_tests.test_ksm_swap` copies the other page.
    """
    memcg.require_memcg()
    swap.require_swap()
    pair = equal_pair(area)
    controlled.scan()
    frame = assert_merged(pair.places)
    with Spliced(pair.stayed.address):
        reclaim_group(pair.places)
        assert kpage.Flag.SWAPCACHE in kpage.flags(frame), f"not in the swap cache: {kpage.describe(frame)}"
        yield pair


# --- what is asserted --------------------------------------------------------------------------------------------


def assert_merged(places: Sequence[Place]) -> int:
    """Assert that all ``places`` map one and the same KSM page.

    :returns: its page frame number.
    :raises AssertionError: naming which frame each place maps instead.
    """
    seen = {place: pagemap.entry(place.address, place.pid) for place in places}
    frames = {entry.pfn for entry in seen.values()}
    shown = ", ".join(f"{place} {entry}" for place, entry in seen.items())
    assert len(frames) == 1, f"the places should share one page, but they map {len(frames)}: {shown}"
    (frame,) = frames
    assert frame is not None, f"no page is present: {shown}"
    # Whether a page is a KSM page is a property of its frame, so one look is enough. On 6.12 it reads all of smaps.
    assert ksm.is_ksm(places[0].address, places[0].pid), f"the page is shared, but it is not a KSM page: {shown}"
    return frame


def assert_unmerged(mapping: Mapping, others: Iterable[Mapping] = ()) -> None:
    """Assert that every page of ``mapping`` is present, has a frame of its own, and is not a KSM page.

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
