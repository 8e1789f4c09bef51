# SPDX-License-Identifier: GPL-2.0
"""The language of the explorer's programs, and its two forms: JSON for files and short lists of numbers for the agent.

A program is a list of operations. An operation names memory by a *slot* and a *part* of it, and a place by its relation
to other memory, never by an address. The language is total: an operation that makes no sense in the present state is
skipped, so that any operations of a program can be left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Final

#: the version of the file format; a file of another version is refused
VERSION: Final = 1
#: how many operations a program may have
MOST_OPERATIONS: Final = 64
#: how many slots a process has
SLOTS: Final = 8
#: how many processes a program may have, the first included
PROCESSES: Final = 3
#: how many places the arena has
PLACES: Final = 16
#: how many pages a new mapping may have
MOST_PAGES: Final = 8


class Kind(StrEnum):
    """What an operation does. The order is part of the wire format."""

    #: mmap() of private anonymous memory, ``arg`` pages
    MAP = "map"
    #: mmap() of shared anonymous memory, ``arg`` pages
    MAP_SHARED = "map-shared"
    UNMAP = "unmap"
    #: write each page with contents of its own
    WRITE = "write"
    #: write each page with the same contents, which KSM can merge
    WRITE_SAME = "write-same"
    READ = "read"
    PROTECT_NONE = "protect-none"
    PROTECT_READ = "protect-read"
    PROTECT_WRITE = "protect-write"
    #: mremap() to a fixed place
    MOVE = "move"
    #: with MREMAP_DONTUNMAP
    MOVE_DONTUNMAP = "move-dontunmap"
    #: with MREMAP_RELOCATE_ANON
    MOVE_RELOCATE = "move-relocate"
    #: with MREMAP_MUST_RELOCATE_ANON
    MOVE_MUST_RELOCATE = "move-must-relocate"
    #: to a fixed place, ``arg`` pages longer
    MOVE_GROW = "move-grow"
    #: to a fixed place, half as long
    MOVE_SHRINK = "move-shrink"
    #: mremap() in place, ``arg`` pages longer
    GROW = "grow"
    #: mremap() in place, half as long
    SHRINK = "shrink"
    MERGEABLE = "mergeable"
    UNMERGEABLE = "unmergeable"
    DONTNEED = "dontneed"
    FREE = "free"
    HUGEPAGE = "hugepage"
    NOHUGEPAGE = "nohugepage"
    PAGEOUT = "pageout"
    COLD = "cold"
    DONTFORK = "dontfork"
    DOFORK = "dofork"
    WIPEONFORK = "wipeonfork"
    KEEPONFORK = "keeponfork"
    GUARD = "guard"
    UNGUARD = "unguard"
    POPULATE = "populate"
    LOCK = "lock"
    UNLOCK = "unlock"
    #: make process ``arg`` a child of ``process``
    FORK = "fork"
    #: end a child
    EXIT = "exit"
    #: let ksmd scan all mergeable memory
    SCAN = "scan"
    #: write 2 to KSM's ``run``: un-merge everything
    UNMERGE_ALL = "unmerge-all"
    #: keep a reference to each page by vmsplice()
    HOLD = "hold"
    #: drop the references
    RELEASE = "release"
    #: have the whole control group reclaimed
    RECLAIM = "reclaim"
    #: mmap() of a private file, ``arg`` pages
    MAP_FILE = "map-file"
    #: mbind() to prefer the last node
    BIND = "bind"
    #: mbind() back to the default
    UNBIND = "unbind"
    #: give anonymous memory a name
    NAME = "name"
    UNNAME = "unname"
    #: have the kernel walk the reverse map of each page in the middle of the program
    WALK = "walk"
    #: register private anonymous memory with the userfaultfd of the first process, for write protection
    UFFD_REGISTER = "uffd-register"
    UFFD_UNREGISTER = "uffd-unregister"
    #: have the userfaultfd write-protect pages. Programs do not write to them then
    UFFD_PROTECT = "uffd-protect"
    UFFD_UNPROTECT = "uffd-unprotect"
    #: have the userfaultfd move one page to where none is: UFFDIO_MOVE
    UFFD_MOVE = "uffd-move"
    #: write one page through /proc/self/mem, which no protection of the mapping prevents
    POKE = "poke"
    #: take the frame of one page out of use, so that the page migrates
    SOFT_OFFLINE = "soft-offline"
    #: turn the swap device off, so that all that is swapped out is read back, and on again
    SWAPOFF = "swapoff"
    #: with MREMAP_MUST_RELOCATE_ANON, while the relocation of its ``arg``-th folio is made to fail: the move is undone
    MOVE_UNDONE = "move-undone"
    #: the same with MREMAP_RELOCATE_ANON: the move is undone, and then made without the flag
    MOVE_FALLBACK = "move-fallback"


class Part(StrEnum):
    """Which pages of a slot an operation is about."""

    ALL = "all"
    FIRST_HALF = "first-half"
    SECOND_HALF = "second-half"
    FIRST = "first"
    LAST = "last"
    #: all but the first and the last page
    MIDDLE = "middle"


class To(StrEnum):
    """Where memory is mapped or moved to."""

    #: the beginning of place ``near``
    PLACE = "place"
    #: where its page offset says that it was mapped first
    HOME = "home"
    #: directly behind slot ``near``
    AFTER = "after"
    #: directly in front of slot ``near``
    BEFORE = "before"
    #: over slot ``near``
    ONTO = "onto"
    #: one page behind the end of slot ``near``
    GAP = "gap"
    #: as far from its home as slot ``near`` is from its own, so that their page offsets fit
    ALONGSIDE = "alongside"


KINDS: Final = tuple(Kind)
PARTS: Final = tuple(Part)
TOS: Final = tuple(To)


def number(kind: Kind) -> int:
    """The number of a kind on the wire."""
    return KINDS.index(kind)


def numbers(*kinds: Kind) -> frozenset[int]:
    """The numbers of kinds on the wire."""
    return frozenset(map(number, kinds))


#: operations that make memory
MAPPING: Final = frozenset({Kind.MAP, Kind.MAP_SHARED, Kind.MAP_FILE})
#: moves with relocation that are made to fail
FAILING: Final = frozenset({Kind.MOVE_UNDONE, Kind.MOVE_FALLBACK})
#: operations that make memory at a place, or move it there
PLACED: Final = (
    MAPPING
    | FAILING
    | frozenset(
        {
            Kind.MOVE,
            Kind.MOVE_DONTUNMAP,
            Kind.MOVE_RELOCATE,
            Kind.MOVE_MUST_RELOCATE,
            Kind.MOVE_GROW,
            Kind.MOVE_SHRINK,
            Kind.UFFD_MOVE,
        }
    )
)
#: those of them whose result gets the name of a slot
NAMING: Final = PLACED - {Kind.UFFD_MOVE}
#: operations that are about no memory of a slot
SLOTLESS: Final = frozenset(
    {Kind.FORK, Kind.EXIT, Kind.SCAN, Kind.UNMERGE_ALL, Kind.RELEASE, Kind.RECLAIM, Kind.SWAPOFF}
)
#: operations that are about one page
SINGLE: Final = frozenset({Kind.UFFD_MOVE, Kind.POKE, Kind.SOFT_OFFLINE})
#: operations whose ``arg`` means something
COUNTED: Final = MAPPING | FAILING | frozenset({Kind.MOVE_GROW, Kind.GROW, Kind.FORK})


class BadProgram(ValueError):
    """The text is not a program of this version."""


@dataclass(frozen=True)
class Operation:
    """One operation. Fields that its kind does not use have their defaults."""

    kind: Kind
    #: who does it: 0 is the first process
    process: int = 0
    slot: int = 0
    part: Part = Part.ALL
    to: To = To.PLACE
    #: the slot or place that ``to`` refers to
    near: int = 0
    #: the slot that names the result of a move or mapping
    into: int = 0
    #: a number of pages, or the process that a fork makes
    arg: int = 1

    def __str__(self) -> str:
        who = "" if self.process == 0 else f"process {self.process}: "
        part = "" if self.part is Part.ALL else f"{self.part} of "
        what = "" if self.kind in SLOTLESS | MAPPING else f" {part}{_name(self.slot)}"
        if self.kind in PLACED:
            near = "" if self.to is To.HOME else f" {self.near if self.to is To.PLACE else _name(self.near)}"
            what += f" {self.to}{near}" + (f" as {_name(self.into)}" if self.kind in NAMING else "")
        count = f" ({self.arg})" if self.kind in COUNTED else ""
        return f"{who}{self.kind}{what}{count}"


def _name(slot: int) -> str:
    return chr(ord("A") + slot)


Program = tuple[Operation, ...]

# --- numbers -----------------------------------------------------------------------------------------------------

Wire = tuple[int, ...]
#: one more than the largest number of each field
_LIMITS: Final = (len(KINDS), PROCESSES, SLOTS, len(PARTS), len(TOS), PLACES, SLOTS, MOST_PAGES + 1)


def to_wire(program: Program) -> list[list[int]]:
    """The program as lists of numbers, one for each operation, in the order of the fields."""
    return [
        [
            number(each.kind),
            each.process,
            each.slot,
            PARTS.index(each.part),
            TOS.index(each.to),
            each.near,
            each.into,
            each.arg,
        ]
        for each in program
    ]


def from_wire(data: Any) -> list[Wire]:
    """Check what came over the connection.

    :raises BadProgram: if it is not a program in numbers.
    """
    if not isinstance(data, list) or len(data) > MOST_OPERATIONS:
        raise BadProgram(f"a program is a list of at most {MOST_OPERATIONS} operations")
    for each in data:
        if not isinstance(each, list) or len(each) != len(_LIMITS) or any(type(value) is not int for value in each):
            raise BadProgram(f"an operation is a list of {len(_LIMITS)} numbers")
        if any(not 0 <= value < limit for value, limit in zip(each, _LIMITS, strict=True)):
            raise BadProgram(f"a number of operation {each} is out of range")
    return [tuple(each) for each in data]


def decoded(wire: Sequence[int]) -> Operation:
    """One operation in numbers as an :class:`Operation`."""
    kind, process, slot, part, to, near, into, arg = wire
    return Operation(KINDS[kind], process, slot, PARTS[part], TOS[to], near, into, arg)


# --- files -------------------------------------------------------------------------------------------------------

#: how large the file of a program may be, in bytes
MOST_BYTES: Final = 1 << 16
_DEFAULTS: Final = Operation(Kind.MAP)
_WORDS: Final[dict[str, type[StrEnum]]] = {"kind": Kind, "part": Part, "to": To}


def to_json(program: Program, **about: str) -> str:
    """The program as the text of a file. Fields with their default values are left out.

    :param about: texts for the reader, which :func:`from_json` ignores.
    """
    operations = [
        {name: value for name, value in asdict(each).items() if name == "kind" or value != getattr(_DEFAULTS, name)}
        for each in program
    ]
    lines = ",\n".join(f"    {json.dumps(each)}" for each in operations)
    head = "".join(f"  {json.dumps(name)}: {json.dumps(text)},\n" for name, text in about.items())
    return f'{{\n  "mremap-program": {VERSION},\n{head}  "operations": [\n{lines}\n  ]\n}}\n'


def from_json(text: str) -> Program:
    """Read the text of a file.

    :raises BadProgram: naming what is wrong, in one line.
    """
    if len(text) > MOST_BYTES:
        raise BadProgram(f"the text has {len(text)} bytes, at most {MOST_BYTES} are allowed")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadProgram(f"it is not JSON: {error}") from error
    if not isinstance(data, dict) or "mremap-program" not in data:
        raise BadProgram('it is not a program: the field "mremap-program" is missing')
    if data["mremap-program"] != VERSION:
        raise BadProgram(f"it has format version {str(data['mremap-program'])[:20]}, this harness reads {VERSION}")
    operations = data.get("operations")
    if not isinstance(operations, list) or len(operations) > MOST_OPERATIONS:
        raise BadProgram(f'"operations" is not a list of at most {MOST_OPERATIONS} operations')
    return tuple(_operation(count, each) for count, each in enumerate(operations, 1))


def _operation(count: int, data: Any) -> Operation:
    known = [field.name for field in fields(Operation)]
    if not isinstance(data, dict) or "kind" not in data or not data.keys() <= set(known):
        raise BadProgram(f"operation {count} is not an object with a kind and no other fields than {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in data.items():
        words = _WORDS.get(name)
        if words is None:
            limit = _LIMITS[known.index(name)]
            if type(value) is not int or not 0 <= value < limit:
                raise BadProgram(f"operation {count}: {name} is not a number from 0 to {limit - 1}")
            values[name] = value
        elif value in list(words):
            values[name] = words(value)
        else:
            raise BadProgram(f"operation {count}: {name} is {str(value)[:40]!r}, known are {', '.join(words)}")
    return Operation(**values)
