# SPDX-License-Identifier: GPL-2.0
"""Follows linked lists in memory that may be damaged: they may have any length, but must have an end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.audit.memory import Unreadable


class Endless(Unreadable):
    """A list that leads back to one of its own elements."""

    def __init__(self, address: int) -> None:
        super().__init__(address, "is reached again")


def chain(first: int, following: Callable[[int], int], end: int = 0) -> Iterator[int]:
    """The elements of a linked list.

    There is no limit on the length, because a host may have millions of rmap items. Brent's algorithm detects a loop
    after following it three times at most, and remembers one element only.

    :param first: the first element, or ``end`` if the list is empty.
    :param following: returns the successor of an element.
    :param end: the value that follows the last element: 0, or the address of the list's head.
    :raises Endless: if the list leads back to one of its elements.
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
