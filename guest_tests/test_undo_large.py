# SPDX-License-Identifier: GPL-2.0
"""Relocations of large folios that fail half way: rows 80 and 93.

Small entries map such a folio, one for each page. All of them have to move or none, because the folio has one index.
"""

from __future__ import annotations

from functools import partial

import pytest

from guest_tests.mm.mapping import PAGE_SIZE, carve_out
from guest_tests.mm.syscalls import MREMAP_MUST_RELOCATE_ANON
from guest_tests.support.checks import counted
from guest_tests.support.failing import failing_relocation
from guest_tests.support.folios import is_large, large_folio, mthp_size, stamp, thp
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused, refused_move

pytestmark = pytest.mark.shared_guest

#: small pages on either side of the large folio
_SIDE = 2
_FOLIOS = 2 * _SIDE + 1


def test_each_folio_in_turn(relocate: bool) -> None:
    """Rows 80 (mthp-inside) and 93 (undo-must): a range of small pages with a large folio between them is to move with
    flag 16, and each of its folios in turn is made to fail. In the end a folio is to fail that the range does not have.

    ::

        folio     1   2   3           4   5
                | p | p | F F F F F | p | p |

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT for each of the five folios, and nothing changes; the large folio is not split. The move for which
    the sixth is to fail succeeds, because a large folio counts once, and every page is found.
    """
    large = mthp_size() // PAGE_SIZE
    with carve_out(8 * large) as area:
        area.hole(4 * large, 4 * large)
        source = area.map(large - _SIDE, large + 2 * _SIDE)
        to = area.page(5 * large - _SIDE)
        folio = large_folio(source.part(_SIDE, large))
        with thp("madvise"):
            stamp(source)
        assert not is_large(source.page(0)), "the pages beside the large folio are not small"
        assert not is_large(source.page(source.pages - 1)), "the pages beside the large folio are not small"
        if not relocate:
            refused_move(relocate, area, source, to)
            assert_found(source)
            return
        with failing_relocation() as arm:
            for number in range(1, _FOLIOS + 1):
                with counted(relocate, relocated=0, undone=int(number > 1), refused_injected=1):
                    refused_move(relocate, area, source, to, arm=partial(arm, number))
                assert all(map(is_large, folio.page_addresses)), f"a failure at folio {number} split the large one"
            with counted(relocate, relocated=1, relocated_pages=source.pages, refused_injected=0):
                arm(_FOLIOS + 1)
                result = move_or_refused(relocate, area, source, to, MREMAP_MUST_RELOCATE_ANON)
        assert result is not None
        assert_found(result)
