# SPDX-License-Identifier: GPL-2.0
"""Linked lists in memory that may be damaged: of any length, but not without end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.audit.memory import Unreadable


class Endless(Unreadable):
    """A list that comes back to an element of its own."""

    def __init__(self, address: int) -> None:
        super().__init__(address, "comes round again")


def chain(first: int, following: Callable[[int], int], end: int = 0) -> Iterator[int]:
    """The elements of a linked list.

    No limit says how long a list may be: a host has millions of rmap items. Brent's method notices one that comes back
    to itself, at the latest after three times round, and remembers one element.

    :param following: gives the successor of an element.
    :param end: what follows the last one: 0, or the list's head.
    :raises Endless: if it comes back to an element instead.
    """
    element, mark, steps, until = first, 0, 0, 1
    while element != end:
        if element == mark:
            raise Endless(element)
        if steps == until:
            mark, steps, until = element, 0, 2 * until
        yield element
        element = following(element)
        steps += 1
