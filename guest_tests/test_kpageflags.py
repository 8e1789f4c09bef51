# SPDX-License-Identifier: GPL-2.0
"""Whether /proc/kpageflags is right about KSM, which other tests would like to rely on."""

from __future__ import annotations

import pytest

from guest_tests.mm import kpage, pagemap
from guest_tests.mm.mapping import CarveOut


@pytest.mark.shared_guest
@pytest.mark.finding("kpageflags-ksm", match="never merged")
def test_a_page_that_was_never_merged_is_not_called_ksm(area: CarveOut) -> None:
    """No row: /proc/kpageflags is read for a page that KSM never merged.

    Since dee3d0bef2b0 (6.10) stable_page_flags() (fs/proc/page.c) tests ``mapping & PAGE_MAPPING_KSM``, but that mask
    has two bits, one of which every anonymous page has. 81401cebfc15 (7.2) tests for both.

    Every kernel: KPF_KSM is not set. This fails from 6.10 on until that fix: finding kpageflags-ksm.
    """
    page = area.map(0, 1).fill(1)
    frame = pagemap.pfns(page.address, 1)[0]
    assert frame is not None
    flags = kpage.flags(frame)
    assert kpage.Flag.ANON in flags, f"PFN {frame:#x} is anonymous, but its flags are {flags!r}"
    assert kpage.Flag.KSM not in flags, f"PFN {frame:#x} was never merged, yet its flags are {flags!r}"
