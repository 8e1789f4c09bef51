# SPDX-License-Identifier: GPL-2.0
"""Whether a process learns of poisoned memory that it moves meanwhile."""

from __future__ import annotations

import pytest

from guest_tests.mm import pagemap, sigbus
from guest_tests.mm.mapping import PAGE_SIZE, carve_out, move
from guest_tests.mm.probes import offline
from guest_tests.mm.probes.poison import HwPoison
from guest_tests.mm.proctree import Child
from guest_tests.mm.waiting import wait_until
from guest_tests.support.folios import large_folio, mthp_size
from guest_tests.support.holds import Spliced
from guest_tests.support.moves import unknown_flags, ways


@ways
def test_poison_is_told_while_a_large_folio_moves(relocate: bool, flags: int) -> None:
    """Row 115 (rmap-hwpoison): a page of a large folio is poisoned while the folio moves. A pipe holds a reference to
    the folio, so that the kernel cannot split it.

    The kernel then walks the reverse map to find whom to signal, and leaves the page mapped (``kill_procs_now()``,
    mm/memory-failure.c). This walk took the anon_vma lock only, as that of 6.12 does; 7.3 holds the folio lock
    as well. A relocation rewrites the folio with the folio lock alone.

    ::

        folio    FFFFFFFF  -->        FFFFFFFF
                    |
                    poisoned by another process, which looks for those that map it

    Every kernel: the process gets SIGBUS for the page at its old or its new place, however it moves.
    """
    pages = mthp_size() // PAGE_SIZE
    if missing := HwPoison().missing():
        pytest.skip(missing)
    with carve_out(8 * pages) as area, Child() as poisoner, sigbus.Watch() as watch:
        source = large_folio(area.map(pages, pages))
        area.hole(4 * pages, pages)
        frame = pagemap.pfn(source.page(3))
        with Spliced(source.page(5)):
            poisoner.start(offline.offline, "hard", frame)
            wait_until(lambda: offline.poisoned(frame), f"frame {frame:#x} to be poisoned")
            result = source
            if flags and not relocate:
                unknown_flags(source, area.page(4 * pages), flags)
            else:
                result = move(source, area.page(4 * pages), flags)
            remark = poisoner.result()
            heard = watch.wait()
            result.unmap()  # reading poisoned memory kills, also when evidence is collected
    assert heard is not None, f"the process that maps the poisoned page was told nothing; the other one: {remark}"
    assert heard.address in (source.page(3), result.page(3)), f"the page is not where SIGBUS says: {heard}"
