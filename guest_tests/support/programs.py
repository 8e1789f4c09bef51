# SPDX-License-Identifier: GPL-2.0
"""What the tests that the explorer writes are made of: pages of a carve-out by number, and the byte that each holds."""

from __future__ import annotations

from guest_tests.mm.mapping import PAGE_SIZE, CarveOut, Content, Mapping


def pages(area: CarveOut, first: int, count: int = 1) -> Mapping:
    """Some pages of a carve-out; what they hold is not checked."""
    return Mapping(area.page(first), count)


def write(area: CarveOut, first: int, tags: bytes) -> None:
    """Write one page for each byte: the byte at its beginning and end, and zeros between."""
    mapping = pages(area, first, len(tags))
    for index, tag in enumerate(tags):
        mapping.write(index, page(tag))


def check(area: CarveOut, first: int, tags: bytes) -> Mapping:
    """Compare pages with what :func:`write` wrote.

    :raises AssertionError: naming the page.
    """
    contents = [Content(repeated=page(tag)) for tag in tags]
    return Mapping(area.page(first), len(tags), [*contents]).check()


def page(tag: int) -> bytes:
    """A page with one byte at its beginning and end."""
    return bytes([tag]) + bytes(PAGE_SIZE - 2) + bytes([tag])
