# SPDX-License-Identifier: GPL-2.0
"""Addresses and lengths that mremap() must refuse, with and without the relocation flags: rows 9 to 20.

A kernel without these flags refuses them with EINVAL before it looks at anything else. The other rules are in
check_mremap_params() and check_prep_vma() in mm/mremap.c of Linux 7.3; 6.12 has them in mremap(2) itself, mremap_to()
and vma_to_resize().
"""

from __future__ import annotations

import errno

import pytest

from guest_tests.mm import pagemap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, map_anonymous
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
from guest_tests.support.moves import mremap_call

pytestmark = pytest.mark.shared_guest

#: distance of the misaligned addresses from a page boundary, in bytes
_OFF = 1024

_PLAIN_AND_MUST = pytest.mark.parametrize("flag", [0, MREMAP_MUST_RELOCATE_ANON], ids=["plain", "must"])
_PLAIN_AND_RELOCATE = pytest.mark.parametrize("flag", [0, MREMAP_RELOCATE_ANON], ids=["plain", "relocate"])


@_PLAIN_AND_MUST
def test_a_misaligned_source(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 9 (src-misaligned): a move from 1024 bytes after the beginning of a page, plain and with flag 16.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address + _OFF, 4, 4, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(20))
    refused(area, errno.EINVAL, call, f"a move from {_OFF} bytes into a page", source)


@_PLAIN_AND_MUST
def test_a_misaligned_destination(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 10 (dst-misaligned): a move to 1024 bytes after the beginning of a page, plain and with flag 16.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(20) + _OFF)
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
    call = mremap_call(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, area.page(to))
    refused(area, errno.EINVAL, call, f"a move of pages 10 to 14 onto {to} to {to + 4}", source)


@_PLAIN_AND_RELOCATE
def test_no_new_length(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 12 (new-len-0): a new length of 0, plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    refused(area, errno.EINVAL, mremap_call(source.address, 5, 0, MREMAP_MAYMOVE | flag), "a new length of 0", source)


@_PLAIN_AND_RELOCATE
def test_no_old_length_of_private_memory(area: CarveOut, source: Mapping, flag: int) -> None:
    """Row 13 (old-len-0-private): an old length of 0, which would duplicate private memory; plain and with flag 8.

    Every kernel: EINVAL, and nothing changes.
    """
    call = mremap_call(source.address, 0, 5, MREMAP_MAYMOVE | flag)
    refused(area, errno.EINVAL, call, "an old length of 0 for private memory", source)


def test_no_old_length_of_shared_memory(relocate: bool, area: CarveOut) -> None:
    """Row 14 (old-len-0-shared): an old length of 0 for shared memory, with flag 16.

    Unpatched: EINVAL, and nothing changes.
    Patched: EFAULT, and nothing changes: shared memory cannot be relocated.
    """
    shared = area.map(0, 5, shared=True).fill()
    code = errno.EFAULT if relocate else errno.EINVAL
    # No fixed place: that would be unmapped before the kernel looks at the source.
    call = mremap_call(shared.address, 0, 5, MREMAP_MAYMOVE | MREMAP_MUST_RELOCATE_ANON)
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
    call = mremap_call(source.address, 5, pages, MREMAP_MAYMOVE | MREMAP_DONTUNMAP | flag)
    refused(area, errno.EINVAL, call, f"MREMAP_DONTUNMAP from 5 to {pages} pages", source)


@pytest.mark.parametrize("resized", [False, True], ids=["same-length", "growing"])
def test_a_source_that_is_not_mapped(relocate: bool, area: CarveOut, resized: bool) -> None:
    """Row 16 (hole): nothing is mapped at the source; plain and with flag 8.

    Unpatched: EFAULT for the plain call, EINVAL with flag 8.
    Patched: EFAULT for both.
    """
    area.hole(0, 5)
    pages = 6 if resized else 5
    call = mremap_call(area.address, 5, pages, MREMAP_MAYMOVE)
    refused(area, errno.EFAULT, call, "mremap() of a hole")
    call = mremap_call(area.address, 5, pages, MREMAP_MAYMOVE | MREMAP_RELOCATE_ANON)
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
    call = mremap_call(first.address, 10, 11, MREMAP_MAYMOVE)
    refused(area, errno.EFAULT, call, "growing two mappings at once", first, second)
    call = mremap_call(first.address, 10, 11, MREMAP_MAYMOVE | MREMAP_RELOCATE_ANON)
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
    call = mremap_call(source.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, to)
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
        call = mremap_call(sealed.address, 5, 5, MREMAP_MAYMOVE | MREMAP_FIXED | flag, target.address)
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
