# SPDX-License-Identifier: GPL-2.0
"""Folios: finds the folio of a frame number, and reads what the kernel stores about it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from harness.audit.kernel import Kernel
from harness.audit.memory import Unreadable

#: the low bits of folio->mapping of anonymous pages and of KSM pages (include/linux/page-flags.h)
ANON, KSM = 1, 3


@dataclass(slots=True)
class Folio:
    """A folio, as its struct pages describe it."""

    #: the address of its first struct page
    at: int
    #: the frame number of its first page
    pfn: int
    mapping: int
    index: int
    #: its size in pages
    pages: int
    #: the number of page-table entries that map it, by the kernel's own counter
    mapcount: int
    locked: bool
    #: the number of page-table entries that the audit found for it
    seen: int = 0


class Folios:
    """The folios of a guest. Each is read once."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._known: dict[int, Folio | None] = {}

    def __iter__(self) -> Iterator[Folio]:
        """The folios read so far."""
        return (each for each in self._known.values() if each is not None)

    def of(self, pfn: int) -> Folio:
        """The folio that a frame belongs to.

        :param pfn: the frame number.
        :raises Unreadable: if there is no such frame.
        """
        page = self._kernel.page(pfn)
        offset = self._kernel.layout.offsets.get(
            "page.compound_head", self._kernel.layout.offsets.get("page.compound_info", 8)
        )
        link = self._kernel.memory.u64(page + offset)
        if link & 1:
            # From 7.0 on this may be a mask instead of an address: the address of the tail page, masked with it, is
            # that of the head page. As a number, the mask is larger than any address of a struct page.
            page = link - 1 if link - 1 <= page else page & (link - 1)
        if page not in self._known:
            self._known[page] = None
            self._known[page] = self._read(page)
        found = self._known[page]
        if found is None:
            raise Unreadable(page)
        return found

    def _read(self, page: int) -> Folio:
        layout = self._kernel.layout
        data = self._kernel.memory.read(page, layout.sizes["page"])
        (flags,) = struct.unpack_from("<Q", data, layout["page.flags"])
        (mapping,) = struct.unpack_from("<Q", data, layout["folio.mapping"])
        (index,) = struct.unpack_from("<Q", data, layout["folio.index"])
        (mapcount,) = struct.unpack_from("<i", data, layout["folio._mapcount"])
        pages = 1
        if flags >> layout.flags["PG_head"] & 1:
            order = self._kernel.memory.u64(page + layout["folio._flags_1"]) & 0xFF
            mapcount = self._kernel.memory.s32(page + layout["folio._large_mapcount"])
            pages = 1 << min(order, 20)
        locked = bool(flags >> layout.flags["PG_locked"] & 1)
        return Folio(page, self._kernel.pfn(page), mapping, index, pages, mapcount + 1, locked)
