# SPDX-License-Identifier: GPL-2.0
"""Tests of the shared checks: each is shown a situation that it must not accept."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guest_tests.mm import kpage, pagemap, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, carve_out, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import PROT_READ, PROT_WRITE
from guest_tests.mm.waiting import wait_until
from guest_tests.support.checks import expect_layout, fails, layout, refused
from guest_tests.support.evidence import Evidence, describe
from guest_tests.support.folios import huge_page, pmd_size, stamp, thp
from guest_tests.support.found import assert_found
from guest_tests.support.holds import Spliced
from guest_tests.support.observer import Observed
from guest_tests.support.stalled import stalled_swaps
from guest_tests.support.swapping import assert_pages_out

pytestmark = pytest.mark.shared_guest


def _refuse() -> None:
    raise OSError(errno.EINVAL, "refused")


def test_two_mappings_are_told_from_one(area: CarveOut) -> None:
    area.map(0, 10)
    assert layout(area) == [(0, 10)]
    area.map(3, 2, prot=PROT_READ)
    wanted = r"expected .* \[\(0, 10\)\], the kernel has \[\(0, 3\), \(3, 2\), \(5, 5\)\]"
    with pytest.raises(AssertionError, match=wanted):
        expect_layout(area, [(0, 10)], "one protection")


def test_a_success_is_no_failure() -> None:
    with pytest.raises(AssertionError, match=r"the call gave success \(0x10\), expected EINVAL"):
        fails(errno.EINVAL, lambda: 16, "the call")


def test_one_error_is_not_another() -> None:
    fails(errno.EINVAL, _refuse, "the call")
    with pytest.raises(AssertionError, match="the call gave EINVAL, expected EFAULT"):
        fails(errno.EFAULT, _refuse, "the call")


def test_a_refusal_that_unmaps_is_noticed(area: CarveOut) -> None:
    source = area.map(0, 5).fill()

    def call() -> None:
        area.hole(20, 1)
        _refuse()

    with pytest.raises(AssertionError, match="changed mappings"):
        refused(area, errno.EINVAL, call, "the call", source)


def test_a_refusal_that_copies_a_page_is_noticed(area: CarveOut) -> None:
    """The mapping is where it was, with the same data, but one page was copied."""
    source = area.map(0, 5).fill()
    before = pagemap.pfn(source.page(2))

    def call() -> None:
        ctypes.memmove(source.page(2), ctypes.string_at(source.page(2), 1), 1)
        _refuse()

    # The child keeps the old frame in use, so that the copy cannot get the same frame again.
    with Child(), pytest.raises(AssertionError, match=r"changed pages of the carve-out: .*page 2: "):
        refused(area, errno.EINVAL, call, "the call", source)
    assert pagemap.pfn(source.page(2)) != before, "the test needs a page that was copied"


def test_a_refusal_that_changes_a_byte_is_noticed(area: CarveOut) -> None:
    source = area.map(0, 5).fill()

    def call() -> None:
        ctypes.memset(source.page(3) + 17, 0xA5, 1)
        _refuse()

    with pytest.raises(AssertionError, match=r"page 3 .* offset 17"):
        refused(area, errno.EINVAL, call, "the call", source)


def test_a_refusal_that_splits_a_large_folio_is_noticed() -> None:
    control = Path("/sys/kernel/debug/split_huge_pages")
    system.require_file(str(control), "DEBUG_FS")
    with _huge_page() as (area, source):

        def call() -> None:
            control.write_text(f"{os.getpid()},{source.address:#x},{source.end:#x},0")
            _refuse()

        with pytest.raises(AssertionError, match=rf"split large folios with {source.pages} pages"):
            refused(area, errno.EINVAL, call, "the call", source)


def test_a_refusal_that_splits_a_huge_mapping_is_noticed() -> None:
    """A part of the memory has another protection for a moment. Small entries map the same huge page after that."""
    with _huge_page() as (area, source):

        def call() -> None:
            source.part(3, 1).mprotect(PROT_READ)
            source.part(3, 1).mprotect(PROT_READ | PROT_WRITE)
            _refuse()

        with pytest.raises(AssertionError, match=rf"changed what PMDs map .*: {source.length >> 10} kB became 0 kB"):
            refused(area, errno.EINVAL, call, "the call", source)


@contextmanager
def _huge_page() -> Iterator[tuple[CarveOut, Mapping]]:
    """A carve-out with a huge page in a mapping of its own."""
    pages = pmd_size() // PAGE_SIZE
    with thp(), carve_out(2 * pages) as area:
        source = area.map(0, pages)
        huge_page(source, source.address)
        yield area, stamp(source)


def test_a_page_that_cannot_follow_is_noticed(area: CarveOut) -> None:
    """A page that a pipe holds a reference to cannot migrate, which looks as if its mapping was not found."""
    mapping = area.map(0, 3).fill()
    assert_found(mapping)
    refused = pytest.raises(AssertionError, match="reverse walk does not find page 1 of the mapping")
    with Spliced(mapping.page(1)), refused:
        assert_found(mapping)
    assert_found(mapping)


def test_there_must_be_something_to_walk_for(area: CarveOut) -> None:
    with pytest.raises(AssertionError, match="nothing to walk for"):
        assert_found(area.map(0, 3).touch_read())


def test_evidence_tells_mappings_frames_and_moves() -> None:
    with pytest.MonkeyPatch.context() as patch:
        evidence = Evidence(Observed(patch))
        with carve_out(10) as area:
            source = area.map(0, 2).fill()
            frame = pagemap.pfn(source.address)
            move(source, area.page(5))
            with pytest.raises(OSError, match="EINVAL"):
                move(source, area.page(5), 32)
            before, moves, after = [text for _, text in evidence.sections()]
    assert f"page 0: pfn {frame:#x} " in before
    assert f"page 5: pfn {frame:#x} " in after
    assert [line.rpartition(" = ")[2] for line in moves.splitlines()] == [hex(area.page(5)), "EINVAL"]


def test_evidence_outlives_a_carve_out_that_a_failure_closed() -> None:
    with pytest.MonkeyPatch.context() as patch:
        evidence = Evidence(Observed(patch))
        area = carve_out(4)
        frame = pagemap.pfn(area.map(1, 1).fill().address)
        with pytest.raises(OSError, match="refused"), area:
            _refuse()
        assert f"page 1: pfn {frame:#x} " in evidence.sections()[0][1]


def test_evidence_is_bounded(area: CarveOut) -> None:
    for at in range(0, 40, 2):
        area.map(at, 1).fill()
    lines = describe([area] * 6).splitlines()
    assert lines[-1].endswith("more lines")
    assert len(lines) < 150


def test_a_stalled_swap_device_keeps_pages_under_writeback(area: CarveOut) -> None:
    source = area.map(0, 1).fill()
    with stalled_swaps(4) as (go_on,):
        assert_pages_out(source)
        frame = pagemap.pfn(source.touch_read().address)
        assert kpage.Flag.WRITEBACK in kpage.flags(frame), f"not under writeback: {kpage.describe(frame)}"
        go_on()
        wait_until(lambda: kpage.Flag.WRITEBACK not in kpage.flags(frame), "the end of writeback")
    source.check()
