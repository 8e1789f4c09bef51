# SPDX-License-Identifier: GPL-2.0
"""Control pages: memory in the same state as the page under test, that nobody moved."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

from guest_tests.mm import pagemap
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import map_anonymous
from guest_tests.mm.probes.place import Place

_seeds = itertools.count(1 << 20)


@contextmanager
def plain_control() -> Iterator[list[Place]]:
    """One anonymous page that only this process maps."""
    mapping = map_anonymous(1).fill(next(_seeds))
    try:
        yield [Place(mapping.address)]
    finally:
        mapping.unmap()


@contextmanager
def merged_control() -> Iterator[list[Place]]:
    """One page that KSM merged at two addresses of this process. Making it lets ksmd scan everything.

    :raises AssertionError: if KSM does not merge it.
    """
    # Three pages, the middle one left out, so that the two are no neighbours.
    mapping = map_anonymous(3)
    content = map_anonymous(1).fill(next(_seeds))
    try:
        for index in (0, 2):
            mapping.write(index, content.read(0))
        with Ksm() as ksm:
            ksm.merge(mapping.part(0), mapping.part(2))
        places = [Place(mapping.page(0)), Place(mapping.page(2))]
        frames = {pagemap.pfn(place.address) for place in places}
        assert len(frames) == 1, f"KSM merged two equal pages to different frames: {frames}"
        yield places
    finally:
        content.unmap()
        mapping.unmap()
