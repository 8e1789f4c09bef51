# SPDX-License-Identifier: GPL-2.0
"""What tests of moves say again and again: this call is refused and changes nothing; memory looks like that; the
reverse map finds every page that moved."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import pytest

from guest_tests.mm import kpage, maps, pagemap, syscalls, system
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Mapping, move
from guest_tests.mm.probes import Place, Probe
from guest_tests.mm.probes.migration import MovePages, SoftOffline

#: what maps shows of a carve-out where nothing has been put
_RESERVED: Final = "---s"
#: cheap probes that leave the page alive, the cheapest first
_PROBES: Final[tuple[Probe, ...]] = (MovePages(), SoftOffline())

# --- layout ------------------------------------------------------------------------------------------------------


def layout(area: CarveOut) -> list[tuple[int, int]]:
    """The mappings of a carve-out as (first page, pages), reservation left out: ``[(0, 5), (10, 5)]``.

    :raises AssertionError: if the kernel's two accounts of them, text and ``PROCMAP_QUERY`` (6.11), differ.
    """
    found = [vma for vma in maps.vmas_between(area.address, area.end) if vma.perms != _RESERVED]
    if system.release() >= (6, 11, 0):
        for vma in found:
            queried = maps.query(vma.start)
            assert queried is not None, f"PROCMAP_QUERY finds nothing at {vma.start:#x}, but maps has {vma}"
            assert (queried.start, queried.end) == (vma.start, vma.end), f"PROCMAP_QUERY says {queried}, maps {vma}"
    return [((vma.start - area.address) // PAGE_SIZE, vma.length // PAGE_SIZE) for vma in found]


def expect_layout(area: CarveOut, wanted: list[tuple[int, int]], why: str) -> None:
    """Assert that a carve-out holds exactly the mappings ``wanted``, as :func:`layout` gives them."""
    actual = layout(area)
    assert actual == wanted, f"{why}: expected mappings (first page, pages) {wanted}, the kernel has {actual}"


# --- refusals ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """Everything user space can see of a carve-out: what a refused call must not change."""

    #: its mappings
    vmas: list[maps.Vma]
    #: one for each page
    entries: list[pagemap.Entry]

    @classmethod
    def of(cls, area: CarveOut) -> State:
        """The state of ``area`` now."""
        return cls(maps.vmas_between(area.address, area.end), pagemap.entries(area.address, area.pages))

    def expect(self, area: CarveOut, during: str) -> None:
        """Assert that ``area`` is in this state still: VMA for VMA, frame for frame."""
        now = State.of(area)
        assert now.vmas == self.vmas, (
            f"{during} changed mappings: {[str(vma) for vma in self.vmas]} became {[str(vma) for vma in now.vmas]}"
        )
        changed = [
            f"page {index}: {old} became {new}"
            for index, (old, new) in enumerate(zip(self.entries, now.entries, strict=True))
            if old != new
        ]
        assert not changed, f"{during} changed pages of the carve-out: {'; '.join(changed)}"


def fails(code: int, call: Callable[[], object], what: str) -> None:
    """Assert that a system call fails with one error and no other.

    :param what: names the call in messages.
    """
    try:
        result = call()
    except OSError as error:
        got = errno.errorcode.get(error.errno or 0, f"error {error.errno}")
    else:
        got = f"success ({result:#x})" if isinstance(result, int) else f"success ({result!r})"
    assert got == errno.errorcode[code], f"{what} gave {got}, expected {errno.errorcode[code]}"


def refused(area: CarveOut, code: int, call: Callable[[], object], what: str, *watched: Mapping) -> None:
    """Assert that a call fails with ``code`` and leaves ``area`` as it was: mappings, frames and every byte.

    :param what: names the call in messages.
    :param watched: mappings whose bytes are compared.
    """
    before = State.of(area)
    fails(code, call, what)
    before.expect(area, f"{what}, though it was refused,")
    for mapping in watched:
        mapping.check()


def relocate_or_refused(
    supported: bool, area: CarveOut, source: Mapping, to: int | None, flags: int, *, pages: int | None = None
) -> Mapping | None:
    """Move with a relocation flag, where the kernel knows it; else assert that the kernel refuses with EINVAL.

    :param supported: the ``relocate`` fixture.
    :param flags: as :func:`guest_tests.mm.mapping.move`, which adds ``MREMAP_MAYMOVE``.
    :returns: the moved mapping, its data checked; None where the kernel refused, with nothing changed.
    """
    if supported:
        return move(source, to, flags, pages=pages).check()
    what = f"mremap() with flags {flags | syscalls.MREMAP_MAYMOVE:#x} on a kernel that does not relocate"
    refused(area, errno.EINVAL, lambda: move(source, to, flags, pages=pages), what, source)
    return None


# --- reverse map -------------------------------------------------------------------------------------------------


def check_rmap(*mappings: Mapping) -> None:
    """Make the kernel walk the reverse map of every page of ``mappings``, and check the data once more afterwards.

    Every page migrates to the other node; the first page of each mapping is also soft-offlined, which walks for
    another reason. Where there is one node only, every page is soft-offlined. Pages that are not present, or that are
    the shared zero page, have no reverse map and are left out.

    :raises AssertionError: naming the page that was not found, with the probe's evidence.
    """
    missing = {probe.name: probe.missing() for probe in _PROBES}
    usable = [probe for probe in _PROBES if missing[probe.name] is None]
    if not usable:
        reasons = "; ".join(f"{name} {reason}" for name, reason in missing.items())
        pytest.skip(f"all else held, but nothing here can walk the reverse map: {reasons}")
    for mapping in mappings:
        pages = [address for address in mapping.page_addresses if _mapped(address)]
        assert pages, f"no page is present in the moved mapping at {mapping.address:#x}: nothing to walk for"
        for address in pages:
            for probe in usable if address == pages[0] else usable[:1]:
                _walk(probe, mapping, address)
        mapping.check()


def _mapped(address: int) -> bool:
    pfn = pagemap.entry(address).pfn
    return pfn is not None and kpage.Flag.ZERO_PAGE not in kpage.flags(pfn)


def _walk(probe: Probe, mapping: Mapping, address: int) -> None:
    answer = probe.walk([Place(address)])
    where = f"page {(address - mapping.address) // PAGE_SIZE} of the mapping at {mapping.address:#x}"
    assert not answer.lost, f"the kernel's reverse walk does not find {where}: {answer}"
    assert answer.complete, f"whether the kernel's reverse walk finds {where} cannot be told: {answer}"
