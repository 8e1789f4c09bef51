# SPDX-License-Identifier: GPL-2.0
"""The flags of mremap(): rows 1 to 8 and 21 to 24.

A kernel without the relocation flags must refuse them with EINVAL before it looks at anything else, and change
nothing. Rules that hold for every kernel are also asserted without these flags, because a kernel that does not know a
flag refuses it for that reason alone. The rules are in check_mremap_params() in mm/mremap.c of Linux 7.3; 6.12 has them
in mremap(2) itself.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

from guest_tests.mm import pagemap
from guest_tests.mm.mapping import CarveOut, Mapping, move
from guest_tests.mm.syscalls import (
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MREMAP_MUST_RELOCATE_ANON,
    MREMAP_RELOCATE_ANON,
)
from guest_tests.support.checks import expect_layout, fails, refused
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused, mremap_call

pytestmark = pytest.mark.shared_guest


def _moves_or_is_refused(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Move ``source`` to page 20 with relocation flags; assert success, or EINVAL and no change."""
    before = pagemap.pfns(source.address, source.pages)
    moved = move_or_refused(relocate, area, source, area.page(20), flags)
    if moved is not None:
        expect_layout(area, [(20, 5)], "five pages were moved to page 20")
        assert pagemap.pfns(moved.address, moved.pages) == before, "relocation changed the page frames"
        assert_found(moved)


def _stays_or_is_refused(relocate: bool, area: CarveOut, source: Mapping, flags: int) -> None:
    """Call mremap() with relocation flags, the same length and no place; assert success, or EINVAL and no change."""
    stayed = move_or_refused(relocate, area, source, None, flags)
    if stayed is not None:
        assert stayed.address == source.address, f"nothing asked for a move, but it moved to {stayed.address:#x}"
        expect_layout(area, [(0, 5)], "nothing asked for a move")


# --- the flags themselves ----------------------------------------------------------------------------------------


def test_the_flag_in_place(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 1 (probe): mremap() of five faulted pages with flag 8 and MAYMOVE, to the same length and no given place.

    Unpatched: EINVAL, and nothing changes. This call tells the two kinds of kernels apart.
    Patched: success; the mapping stays where it is.
    """
    _stays_or_is_refused(relocate, area, source, MREMAP_RELOCATE_ANON)


def test_the_flag_with_a_move(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 1 (probe): five faulted pages move to a given place with flag 8.

    Unpatched: EINVAL, and nothing changes.
    Patched: the pages move with their frames, and every page is found.
    """
    _moves_or_is_refused(relocate, area, source, MREMAP_RELOCATE_ANON)


def test_the_must_flag_in_place(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 2 (probe-must): the call of row 1 without a place, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: success; the mapping stays where it is.
    """
    _stays_or_is_refused(relocate, area, source, MREMAP_MUST_RELOCATE_ANON)


def test_the_must_flag_with_a_move(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 2 (probe-must): five faulted pages move to a given place with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: the pages move with their frames, and every page is found.
    """
    _moves_or_is_refused(relocate, area, source, MREMAP_MUST_RELOCATE_ANON)


def test_both_flags_together(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 3 (both-bits): five faulted pages move with flags 8 and 16 together.

    Unpatched: EINVAL, and nothing changes.
    Patched: the two flags may be combined: the pages move with their frames, and every page is found.
    """
    _moves_or_is_refused(relocate, area, source, MREMAP_RELOCATE_ANON | MREMAP_MUST_RELOCATE_ANON)


def test_both_flags_together_mean_must(relocate: bool, area: CarveOut) -> None:
    """Row 3 (both-bits): shared memory, which cannot be relocated, moves with flags 8 and 16 together.

    Unpatched: EINVAL.
    Patched: EFAULT, as for flag 16 alone.
    """
    shared = area.map(0, 5, shared=True).fill()
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_RELOCATE_ANON | MREMAP_MUST_RELOCATE_ANON
    code = errno.EFAULT if relocate else errno.EINVAL
    fails(code, mremap_call(shared.address, 5, 5, flags, area.page(20)), "a move of shared memory with both flags")
    shared.check()


def test_the_next_free_bit_is_unknown(area: CarveOut, source: Mapping) -> None:
    """Row 4 (unknown-32): a move with the flag 32, which no kernel knows.

    Every kernel: EINVAL, and nothing changes.
    """
    refused(area, errno.EINVAL, lambda: move(source, area.page(20), 32), "a move with the unknown flag 32", source)


@pytest.mark.parametrize("bit", [31, 40, 63])
def test_high_bits_are_unknown(area: CarveOut, source: Mapping, bit: int) -> None:
    """Row 5 (high-bit): a move with bit 31, 40 or 63 set in the flags.

    ``flags`` is an unsigned long. The mask of known flags is an int that is extended with its sign (mm/mremap.c), so
    that the upper 32 bits are checked on every 64-bit kernel.

    Every kernel: EINVAL, and nothing changes.
    """
    refused(area, errno.EINVAL, lambda: move(source, area.page(20), 1 << bit), f"a move with unknown bit {bit}", source)


@pytest.mark.parametrize("new", [0, 20], ids=["without-address", "with-address"])
def test_relocating_needs_maymove(area: CarveOut, source: Mapping, new: int) -> None:
    """Row 6 (8-no-maymove): flag 8 without MAYMOVE, with and without a new address.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address, 5, 5, MREMAP_RELOCATE_ANON, new and area.page(new))
    refused(area, errno.EINVAL, call, "MREMAP_RELOCATE_ANON alone", source)


@pytest.mark.parametrize("new", [0, 20], ids=["without-address", "with-address"])
def test_must_relocate_needs_maymove(area: CarveOut, source: Mapping, new: int) -> None:
    """Row 7 (16-no-maymove): flag 16 without MAYMOVE, with and without a new address.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address, 5, 5, MREMAP_MUST_RELOCATE_ANON, new and area.page(new))
    refused(area, errno.EINVAL, call, "MREMAP_MUST_RELOCATE_ANON alone", source)


@pytest.mark.parametrize("flag", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])
def test_fixed_needs_maymove(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 8 (fixed-no-maymove): FIXED without MAYMOVE, with and without flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address, 5, 5, MREMAP_FIXED | flag, area.page(20))
    refused(area, errno.EINVAL, call, "MREMAP_FIXED without MREMAP_MAYMOVE", source)


# --- combinations that once went wrong ---------------------------------------------------------------------------


def test_every_flag_at_once(relocate: bool, area: CarveOut) -> None:
    """Row 21 (0xf-syzkaller): two faulted pages move with MAYMOVE, FIXED, DONTUNMAP and flag 8.

    The series of June 2025 slept in atomic context here (reported by Yi Lai, aFEAPOozHsR1/PLI@ly-workstation). On a
    kernel with debug options that is a complaint on the console, which fails the test.

    Unpatched: EINVAL, and nothing changes.
    Patched: the pages move, the source stays mapped and reads as zero, every page is found, and there is no complaint.
    """
    source = area.map(0, 2).fill()
    moved = move_or_refused(relocate, area, source, area.page(20), MREMAP_DONTUNMAP | MREMAP_RELOCATE_ANON)
    if moved is not None:
        source.check()  # all zero now
        expect_layout(area, [(0, 2), (20, 2)], "MREMAP_DONTUNMAP keeps the source mapped")
        assert_found(moved)


def test_the_c_library_may_refuse_by_itself(
    relocate: bool, area: CarveOut, source: Mapping, record_property: Callable[[str, object], None]
) -> None:
    """Row 22 (glibc-wrapper): the C library's mremap() is called with flag 8.

    Newer libraries refuse flags that they do not know. What the library did is recorded as a property of the report.

    Unpatched: the wrapper fails with EINVAL, and the memory is whole.
    Patched: the wrapper moves the memory, or fails with EINVAL; the raw system call moves it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
    flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_RELOCATE_ANON
    ctypes.set_errno(0)
    result = libc.mremap(source.address, source.length, source.length, flags, area.page(20))
    moved = result == area.page(20)
    outcome = "moved" if moved else errno.errorcode.get(ctypes.get_errno(), f"returned {result}")
    record_property("mremap() of the C library with MREMAP_RELOCATE_ANON", outcome)
    if moved:
        assert relocate, "the C library's mremap() moved memory with a flag that this kernel refuses"
        Mapping(area.page(20), 5, source.contents).check()
    else:
        assert outcome == "EINVAL", f"the C library's mremap() failed with {outcome}, expected a move or EINVAL"
        source.check()
        _moves_or_is_refused(relocate, area, source, MREMAP_RELOCATE_ANON)  # the raw call is not filtered


def test_growing_in_place_relocates_nothing(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 23 (inplace-must): a mapping with free space behind it grows with flag 16.

    ::

        page     0         5        10
                 |---------|  hole
        then     |-------------------|

    Unpatched: EINVAL; a plain call grows it in place.
    Patched: it grows in place with the same frames.
    """
    area.hole(5, 10)
    before = pagemap.pfns(source.address, 5)
    grown = move_or_refused(relocate, area, source, None, MREMAP_MUST_RELOCATE_ANON, pages=10)
    if grown is None:
        grown = move(source, None, pages=10).check()  # the same without the flag
    assert grown.address == source.address, "there was room in place, but it moved"
    expect_layout(area, [(0, 10)], "five pages grew to ten in place")
    assert pagemap.pfns(grown.address, 5) == before, "growing in place changed frames"


def test_shrinking_relocates_nothing(relocate: bool, area: CarveOut, source: Mapping) -> None:
    """Row 24 (shrink-must): a mapping shrinks with flag 16.

    Unpatched: EINVAL; a plain call shrinks it in place.
    Patched: it shrinks in place with the same frames.
    """
    before = pagemap.pfns(source.address, 3)
    shrunk = move_or_refused(relocate, area, source, None, MREMAP_MUST_RELOCATE_ANON, pages=3)
    if shrunk is None:
        shrunk = move(source, None, pages=3).check()
    assert shrunk.address == source.address, "shrinking must not move"
    expect_layout(area, [(0, 3)], "five pages shrank to three")
    assert pagemap.pfns(shrunk.address, 3) == before, "shrinking changed frames"
