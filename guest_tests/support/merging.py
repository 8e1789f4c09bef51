# SPDX-License-Identifier: GPL-2.0
"""Blocks of five pages that move to where they may merge, and what is asserted of every such move."""

from __future__ import annotations

from typing import Final

import pytest

from guest_tests.mm import pagemap
from guest_tests.mm.mapping import ZERO, CarveOut, Mapping
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused

#: pages in a block
BLOCK: Final = 5
#: where the source is before it moves: far from everything
AWAY: Final = 30

Layout = list[tuple[int, int]]
#: three blocks that did not merge
THREE: Final[Layout] = [(0, 5), (5, 5), (10, 5)]

#: run a test with a plain move and with flag 16
plain_or_must = pytest.mark.parametrize("flags", [0, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "must"])


def block(area: CarveOut, at: int, *, faulted: bool = True) -> Mapping:
    """Five pages at page ``at`` of the carve-out, faulted in or not."""
    mapping = area.map(at, BLOCK)
    return mapping.fill(seed=at) if faulted else mapping


def move_to_page(relocate: bool, area: CarveOut, source: Mapping, to: int, flags: int) -> Mapping | None:
    """Move to page ``to``, and assert that frames and data are the same; None if the flag was refused.

    The check of the data reads pages that were never touched. That maps the zero page and gives them no anon_vma.
    """
    before = pagemap.pfns(source.address, source.pages)
    moved = move_or_refused(relocate, area, source, area.page(to), flags)
    if moved is not None:
        for old, new in zip(before, pagemap.pfns(moved.address, moved.pages), strict=True):
            assert old in (None, new), f"the move changed a page frame from {old} to {new}"
    return moved


def still_works(*mappings: Mapping) -> None:
    """Assert that all data is right, that untouched memory can be faulted in, and that every page is found."""
    for number, mapping in enumerate(mappings):
        mapping.check()
        if all(content == ZERO for content in mapping.contents):
            mapping.fill(seed=100 + number)
    assert_found(*mappings)
