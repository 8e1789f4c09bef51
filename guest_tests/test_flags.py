# SPDX-License-Identifier: GPL-2.0
"""The flags of mremap(), and bad input: rows 1 to 24.

A kernel without the relocation flags must refuse them with EINVAL before it looks at anything else, and change
nothing. Rules that hold for every kernel are also asserted without these flags, because a kernel that does not know a
flag refuses it for that reason alone. The rules are in check_mremap_params() and check_prep_vma() in mm/mremap.c of
Linux 7.3; 6.12 has them in mremap(2) itself, mremap_to() and vma_to_resize().
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable

import pytest

from guest_tests.mm import pagemap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, map_anonymous, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import (
    MREMAP_DONTUNMAP,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    MREMAP_MUST_RELOCATE_ANON,
    MREMAP_RELOCATE_ANON,
    PROT_READ,
)
from guest_tests.support.checks import expect_layout, fails, refused
from guest_tests.support.found import assert_found
from guest_tests.support.moves import move_or_refused

pytestmark = pytest.mark.shared_guest

#: distance of the misaligned addresses from a page boundary, in bytes
_OFF = 1024


@pytest.fixture
def source(area: CarveOut) -> Mapping:
    """Five faulted pages at the beginning of the carve-out."""
    return area.map(0, 5).fill()


def _mremap(old: int, old_pages: int, new_pages: int, flags: int, new: int = 0) -> Callable[[], int]:
    """A function that makes the raw system call; lengths in pages."""
    return lambda: syscalls.mremap(old, old_pages * PAGE_SIZE, new_pages * PAGE_SIZE, flags, new)


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
    fails(code, _mremap(shared.address, 5, 5, flags, area.page(20)), "a move of shared memory with both flags")
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
    call = _mremap(source.address, 5, 5, MREMAP_RELOCATE_ANON, new and area.page(new))
    refused(area, errno.EINVAL, call, "MREMAP_RELOCATE_ANON alone", source)


@pytest.mark.parametrize("new", [0, 20], ids=["without-address", "with-address"])
def test_must_relocate_needs_maymove(area: CarveOut, source: Mapping, new: int) -> None:
    """Row 7 (16-no-maymove): flag 16 without MAYMOVE, with and without a new address.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address, 5, 5, MREMAP_MUST_RELOCATE_ANON, new and area.page(new))
    refused(area, errno.EINVAL, call, "MREMAP_MUST_RELOCATE_ANON alone", source)


@pytest.mark.parametrize("flag", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])
def test_fixed_needs_maymove(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 8 (fixed-no-maymove): FIXED without MAYMOVE, with and without flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address, 5, 5, MREMAP_FIXED | flag, area.page(20))
    refused(area, errno.EINVAL, call, "MREMAP_FIXED without MREMAP_MAYMOVE", source)


# --- addresses and lengths ---------------------------------------------------------------------------------------

_PLAIN_AND_MUST = pytest.mark.parametrize("flag", [0, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "must"])
_PLAIN_AND_RELOCATE = pytest.mark.parametrize("flag", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])


@_PLAIN_AND_MUST
def test_a_misaligned_source(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 9 (src-misaligned): a move from 1024 bytes after the beginning of a page, plain and with flag 16.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address + _OFF, 4, 4, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(20))
    refused(area, errno.EINVAL, call, f"a move from {_OFF} bytes into a page", source)


@_PLAIN_AND_MUST
def test_a_misaligned_destination(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 10 (dst-misaligned): a move to 1024 bytes after the beginning of a page, plain and with flag 16.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(20) + _OFF)
    refused(area, errno.EINVAL, call, f"a move to {_OFF} bytes into a page", source)


@_PLAIN_AND_MUST
@pytest.mark.parametrize("to", [6, 9, 10, 11, 14])
def test_an_overlapping_destination(area: CarveOut, flag: int, to: int) -> None:
    """Row 11 (overlap): the destination overlaps the source by one page or more, at either end; plain and with flag 16.

    ::

        page     6        10        15
        source            |---------|
        to       |---------|                 one page in common
        to                         |---------|

    Every kernel: EINVAL, and nothing changes.
    """
    source = area.map(10, 5).fill()
    call = _mremap(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(to))
    refused(area, errno.EINVAL, call, f"a move of pages 10 to 14 onto {to} to {to + 4}", source)


@_PLAIN_AND_RELOCATE
def test_no_new_length(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 12 (new-len-0): a new length of 0, plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    refused(area, errno.EINVAL, _mremap(source.address, 5, 0, MREMAP_MAYMOVE | flag), "a new length of 0", source)


@_PLAIN_AND_RELOCATE
def test_no_old_length_of_private_memory(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 13 (old-len-0-private): an old length of 0, which would duplicate private memory; plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address, 0, 5, MREMAP_MAYMOVE | flag)
    refused(area, errno.EINVAL, call, "an old length of 0 for private memory", source)


def test_no_old_length_of_shared_memory(relocate: bool, area: CarveOut) -> None:
    """Row 14 (old-len-0-shared): an old length of 0 for shared memory, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes: shared memory cannot be relocated.
    """
    shared = area.map(0, 5, shared=True).fill()
    code = errno.EFAULT if relocate else errno.EINVAL
    # No fixed place: that would be unmapped before the kernel looks at the source.
    call = _mremap(shared.address, 0, 5, MREMAP_MAYMOVE | MREMAP_MUST_RELOCATE_ANON)
    refused(area, code, call, "duplicating shared memory with MREMAP_MUST_RELOCATE_ANON", shared)


def test_no_old_length_duplicates_shared_memory(relocate: bool, area: CarveOut) -> None:
    """Row 14 (old-len-0-shared): an old length of 0 for shared memory, without a flag and with flag 8.

    Unpatched: a plain call maps the memory a second time.
    Patched: the same with flag 8.
    """
    shared = area.map(0, 5, shared=True).fill()
    for flag in [0, MREMAP_RELOCATE_ANON] if relocate else [0]:
        address = syscalls.mremap(shared.address, 0, shared.length, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(20))
        assert pagemap.pfns(address, 5) == [None] * 5, "a duplicate begins without pages of its own"
        Mapping(address, 5, shared.contents).check()
        shared.check()


@_PLAIN_AND_RELOCATE
@pytest.mark.parametrize("pages", [4, 6], ids=["shrinking", "growing"])
def test_dontunmap_cannot_resize(area: CarveOut, source: Mapping, flag: int, pages: int) -> None:
    """Row 15 (du-resize): DONTUNMAP with a smaller and with a larger new length, plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    call = _mremap(source.address, 5, pages, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | flag)
    refused(area, errno.EINVAL, call, f"MREMAP_DONTUNMAP from 5 to {pages} pages", source)


@pytest.mark.parametrize("resized", [False, True], ids=["same-length", "growing"])
def test_a_source_that_is_not_mapped(relocate: bool, area: CarveOut, resized: bool) -> None:
    """Row 16 (hole): nothing is mapped at the source; plain and with flag 8.

    Unpatched: EFAULT for the plain call, EINVAL with flag 8.
    Patched: EFAULT for both.
    """
    area.hole(0, 5)
    pages = 6 if resized else 5
    call = _mremap(area.address, 5, pages, MREMAP_MAYMOVE)
    refused(area, errno.EFAULT, call, "mremap() of a hole")
    call = _mremap(area.address, 5, pages, MREMAP_MAYMOVE | MREMAP_RELOCATE_ANON)
    code = errno.EFAULT if relocate else errno.EINVAL
    refused(area, code, call, "mremap() of a hole with MREMAP_RELOCATE_ANON")


def test_growing_across_two_mappings(relocate: bool, area: CarveOut) -> None:
    """Row 17 (cross-vma-resize): a range of two mappings grows; plain and with flag 8.

    ::

        page     0         5        10
                 |rw-------|r--------|       two mappings
        old      |-------------------|
        new      |-----------------------|

    Unpatched: EFAULT for the plain call, EINVAL with flag 8; nothing changes.
    Patched: EFAULT for both; nothing changes.
    """
    first, second = area.map(0, 5).fill(), area.map(5, 5).fill(first_number=5)
    second.mprotect(PROT_READ)
    expect_layout(area, [(0, 5), (5, 5)], "different protections do not merge")
    call = _mremap(first.address, 10, 11, MREMAP_MAYMOVE)
    refused(area, errno.EFAULT, call, "growing two mappings at once", first, second)
    call = _mremap(first.address, 10, 11, MREMAP_MAYMOVE | MREMAP_RELOCATE_ANON)
    code = errno.EFAULT if relocate else errno.EINVAL
    refused(area, code, call, "growing two mappings at once with MREMAP_RELOCATE_ANON", first, second)


def _task_size(inside: int) -> int:
    """The end of the address space that a process may map, in bytes; found by trying.

    :param inside: an address below the end.
    """
    low, high = inside // PAGE_SIZE, (1 << 63) // PAGE_SIZE
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE | syscalls.MAP_FIXED_NOREPLACE
    while high - low > 1:
        middle = (low + high) // 2
        try:
            syscalls.munmap(syscalls.mmap(middle * PAGE_SIZE, PAGE_SIZE, syscalls.PROT_NONE, flags), PAGE_SIZE)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                high = middle
                continue
            if error.errno != errno.EEXIST:
                raise
        low = middle
    return high * PAGE_SIZE


@_PLAIN_AND_RELOCATE
@pytest.mark.parametrize("where", ["across-the-end", "at-the-end", "in-the-middle", "at-the-last-page"])
def test_a_destination_past_the_end(area: CarveOut, source: Mapping, flag: int, where: str) -> None:
    """Row 18 (dst-past-end): the destination lies across or behind the end of the address space; plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    end = _task_size(area.address)
    to = {
        "across-the-end": end - 4 * PAGE_SIZE,
        "at-the-end": end,
        "in-the-middle": 1 << 63,
        "at-the-last-page": -PAGE_SIZE,
    }[where]
    call = _mremap(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, to)
    refused(area, errno.EINVAL, call, f"a move {where} of the address space, which is {end:#x}", source)


def test_a_sealed_source(relocate: bool) -> None:
    """Row 19 (sealed): the source is sealed with mseal() (6.10); plain and with flag 8.

    Unpatched: EPERM for the plain call, EINVAL with flag 8; frames and data stay.
    Patched: EPERM for both; frames and data stay.
    """
    system.require_kernel(6, 10, "mseal")
    with Child() as child:  # sealed memory stays until its process ends
        child.call(_move_sealed, relocate)


def _move_sealed(relocate: bool) -> None:
    sealed, target = map_anonymous(5).fill(), map_anonymous(5)
    before = pagemap.pfns(sealed.address, 5)
    syscalls.mseal(sealed.address, sealed.length)
    for flag in (0, MREMAP_RELOCATE_ANON):
        code = errno.EINVAL if flag and not relocate else errno.EPERM
        call = _mremap(sealed.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, target.address)
        fails(code, call, f"a move of sealed memory with flag {flag}")
        sealed.check()
        assert pagemap.pfns(sealed.address, 5) == before, "a refused move changed the frames of sealed memory"


@_PLAIN_AND_RELOCATE
@pytest.mark.parametrize("old_length", [-1, -PAGE_SIZE, 1 << 63], ids=["all-ones", "last-page", "half"])
def test_a_huge_old_length(area: CarveOut, source: Mapping, flag: int, old_length: int) -> None:
    """Row 20 (huge-len): an old length that ends outside of the address space, plain and with flag 8.

    A length of all ones is rounded up to 0, which private memory must not have. The other lengths ask to shrink, which
    unmaps a range that ends outside of the address space.

    Every kernel: EINVAL, and nothing changes.
    """
    flags = MREMAP_MAYMOVE | flag
    for new in (source.length, PAGE_SIZE):
        refused(
            area,
            errno.EINVAL,
            lambda new=new: syscalls.mremap(source.address, old_length, new, flags),  # type: ignore[misc]
            f"an old length of {old_length & (1 << 64) - 1:#x}",
            source,
        )


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
