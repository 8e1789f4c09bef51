# SPDX-License-Identifier: GPL-2.0
"""Uprobes in mappings that move to where they merge.

A uprobe replaces an instruction of a file by a breakpoint. Each process that maps the place privately gets an anonymous
page with the breakpoint as soon as it maps it (uprobe_mmap(), kernel/events/uprobes.c).

When a moved mapping merges with its neighbour, the neighbour grows over a place with a uprobe. Until 2b12d06c37fd ("mm:
fix uprobe pte be overwritten when expanding vma", 6.16) the kernel put a fresh breakpoint page there, and then moved
the page-table entries of the source over it: the fresh page was lost, and was counted as MM_ANONPAGES until the process
ended. The kernel then says "Bad rss-counter state", for which the harness fails the test.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from guest_tests.mm import kpage, maps, pagemap, syscalls, system, vmstat
from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Content, Mapping, move
from guest_tests.mm.proctree import Child
from guest_tests.mm.syscalls import MAP_FIXED, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE, PROT_EXEC, PROT_READ
from guest_tests.support.checks import expect_layout
from guest_tests.support.found import assert_found

pytestmark = pytest.mark.shared_guest

#: a machine instruction that does nothing, by ``uname -m``; a uprobe is put on one
_NOP: Final = {"x86_64": b"\x90", "aarch64": b"\x1f\x20\x03\xd5", "riscv64": b"\x13\x00\x00\x00"}
#: the perf events that are uprobes (CONFIG_UPROBE_EVENTS)
_PMU: Final = "/sys/bus/event_source/devices/uprobe/type"
#: sizeof(struct perf_event_attr) in the version that added no field after it which is needed (PERF_ATTR_SIZE_VER5)
_ATTR_SIZE: Final = 112
#: pages of code in the file
_PAGES: Final = 15
#: How often a mapping moves away and back. RssAnon may be wrong by some pages: each CPU keeps up to 32 of them to
#: itself (lib/percpu_counter.c), and before 6.2 each thread up to 64.
_ROUNDS: Final = 200


@contextmanager
def _uprobe(path: str, offset: int) -> Iterator[None]:
    """A uprobe at byte ``offset`` of a file, in this process only, until the block ends."""
    kind = int(Path(_PMU).read_text())
    name = ctypes.create_string_buffer(path.encode())
    attr = ctypes.create_string_buffer(_ATTR_SIZE)
    # include/uapi/linux/perf_event.h: type, size; config1 is the path and config2 the offset
    struct.pack_into("=II", attr, 0, kind, _ATTR_SIZE)
    struct.pack_into("=QQ", attr, 56, ctypes.addressof(name), offset)
    fd = syscalls.call("perf_event_open", ctypes.addressof(attr), 0, -1, -1, 0)
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _code(pages: int) -> Iterator[int]:
    """A file of instructions that do nothing."""
    fd = syscalls.memfd_create("code")
    try:
        nop = _NOP[platform.machine()]
        os.write(fd, nop * (pages * PAGE_SIZE // len(nop)))
        yield fd
    finally:
        os.close(fd)


def _map_code(area: CarveOut, pages: int, fd: int) -> Mapping:
    flags = MAP_PRIVATE | MAP_FIXED
    address = syscalls.mmap(area.address, pages * PAGE_SIZE, PROT_READ | PROT_EXEC, flags, fd, 0)
    mapping = Mapping(address, pages)
    mapping.contents = [Content(repeated=mapping.read(index)) for index in range(pages)]
    return mapping


def _one_is_anonymous(area: CarveOut, when: str) -> None:
    """Assert that the page tables of the carve-out map one anonymous page: that with the breakpoint."""
    pages = maps.kilobytes(area.address, area.end, "Anonymous") * 1024 // PAGE_SIZE
    assert pages == 1, f"{when}, {pages} pages of the carve-out are anonymous, expected the one with the breakpoint"


def _away_and_back(area: CarveOut, first: int, grown: int) -> None:
    """The test below, in a child of its own."""
    with _code(_PAGES) as fd, _uprobe(f"/proc/self/fd/{fd}", first * PAGE_SIZE):
        whole = _map_code(area, _PAGES, fd)
        probed, other = whole.part(first), whole.part((first + 1) % _PAGES)
        assert probed.read(0) != other.read(0), "no breakpoint was put into the page with the uprobe"
        frame = pagemap.pfn(probed.address)
        described = kpage.describe(frame)
        assert kpage.Flag.ANON in kpage.flags(frame), f"the breakpoint is in a page of the file: {described}"
        _one_is_anonymous(area, "mapped")
        before = vmstat.status()["RssAnon"]

        away = move(probed, area.page(20), pages=grown)
        around = [(0, first), (first + 1, _PAGES - 1 - first)]
        left = [each for each in around if each[1]]
        expect_layout(area, [*left, (20, grown)], "the page with the uprobe was moved away")
        _one_is_anonymous(area, "moved away")
        move(away, probed.address, pages=1)
        _again_and_again(probed.address, away.address, away.length)

        expect_layout(area, [(0, _PAGES)], "the page with the uprobe was moved back to where it merges")
        whole.check()
        assert pagemap.pfn(probed.address) == frame, "the page with the breakpoint is another one"
        _one_is_anonymous(area, "moved back")
        pages = (vmstat.status()["RssAnon"] - before) * 1024 // PAGE_SIZE
        assert pages < _ROUNDS // 2, (
            f"{_ROUNDS} moves away and back left {pages} pages in RssAnon that nothing maps: the merge put breakpoint "
            f"pages where others were moved to (2b12d06c37fd)"
        )
        assert_found(probed)
        whole.check()
    assert probed.read(0) == other.read(0), "the breakpoint is still there without the uprobe"


def _again_and_again(home: int, away: int, length: int) -> None:
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    for _ in range(_ROUNDS):
        syscalls.call("mremap", home, PAGE_SIZE, length, flags, away)
        syscalls.call("mremap", away, length, PAGE_SIZE, flags, home)


@pytest.mark.finding("uprobe-merge", match="type:MM_ANONPAGES")
@pytest.mark.parametrize(
    ("first", "grown"),
    [
        pytest.param(0, 1, id="head"),
        pytest.param(0, 2, id="head-grown"),
        pytest.param(7, 1, id="middle"),
        pytest.param(7, 2, id="middle-grown"),
        pytest.param(14, 1, id="tail"),
    ],
)
def test_a_uprobe_moves_to_where_it_merges(area: CarveOut, first: int, grown: int) -> None:
    """Row 57 (private-file): a page with a uprobe moves out of a private mapping of code and back, many times. It keeps
    its length, or grows to two pages on its way and shrinks again.

    ::

        page   0   1                   15        20
               | b |       code        |                      b: a page with a breakpoint
                   |       code        |         | b |        moved away
               | b         code        |                      one

    Every kernel: one mapping again. The breakpoint is in the same page, which the walk finds, and RssAnon counts no
    further page. Before 2b12d06c37fd (6.16) each merge loses a page: finding uprobe-merge.
    """
    system.require_file(_PMU, "UPROBE_EVENTS")
    with Child() as child:
        child.call(_away_and_back, area, first, grown)
