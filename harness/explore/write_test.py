# SPDX-License-Identifier: GPL-2.0
"""Writes a program as a guest test."""

from __future__ import annotations

import re
import textwrap
from typing import Final

from harness.explore.picture import LEGEND, picture
from harness.explore.story import Event, Story
from harness.programs.language import FAILING, Kind

_ADVICE: Final = {
    Kind.MERGEABLE: "MADV_MERGEABLE",
    Kind.UNMERGEABLE: "MADV_UNMERGEABLE",
    Kind.DONTNEED: "MADV_DONTNEED",
    Kind.FREE: "MADV_FREE",
    Kind.HUGEPAGE: "MADV_HUGEPAGE",
    Kind.NOHUGEPAGE: "MADV_NOHUGEPAGE",
    Kind.PAGEOUT: "MADV_PAGEOUT",
    Kind.COLD: "MADV_COLD",
    Kind.DONTFORK: "MADV_DONTFORK",
    Kind.DOFORK: "MADV_DOFORK",
    Kind.WIPEONFORK: "MADV_WIPEONFORK",
    Kind.KEEPONFORK: "MADV_KEEPONFORK",
    Kind.GUARD: "MADV_GUARD_INSTALL",
    Kind.UNGUARD: "MADV_GUARD_REMOVE",
    Kind.POPULATE: "MADV_POPULATE_WRITE",
    Kind.SOFT_OFFLINE: "MADV_SOFT_OFFLINE",
}
_MOVES: Final = {
    Kind.MOVE: "",
    Kind.MOVE_GROW: "",
    Kind.MOVE_SHRINK: "",
    Kind.MOVE_DONTUNMAP: "syscalls.MREMAP_DONTUNMAP",
    Kind.MOVE_RELOCATE: "syscalls.MREMAP_RELOCATE_ANON",
    Kind.MOVE_MUST_RELOCATE: "syscalls.MREMAP_MUST_RELOCATE_ANON",
    Kind.MOVE_UNDONE: "syscalls.MREMAP_MUST_RELOCATE_ANON",
    Kind.MOVE_FALLBACK: "syscalls.MREMAP_RELOCATE_ANON",
}
_PROTECTIONS: Final = {Kind.PROTECT_NONE: "PROT_NONE", Kind.PROTECT_READ: "PROT_READ", Kind.PROTECT_WRITE: "PROT_RW"}
_HOLDS: Final = frozenset({Kind.HOLD, Kind.RELEASE})
_LOCKS: Final = {Kind.LOCK: "syscalls.mlock", Kind.UNLOCK: "syscalls.munlock"}
_HEAD: Final = (
    "# SPDX-License-Identifier: GPL-2.0",
    '"""A program of the explorer."""',
    "",
    "from __future__ import annotations",
    "",
)
_KSM: Final = frozenset({Kind.SCAN, Kind.UNMERGE_ALL})
#: operations that are about the whole system
_EVERYWHERE: Final = {
    Kind.SCAN: "ksm.scan()",
    Kind.UNMERGE_ALL: "ksm.unmerge_all()",
    Kind.SWAPOFF: "swap_off_and_on()",
}
#: operations that a function of guest_tests.support.programs does
_HELPERS: Final = {
    Kind.MAP_FILE: "map_file",
    Kind.BIND: "bind",
    Kind.UNBIND: "unbind",
    Kind.NAME: "name",
    Kind.UNNAME: "unname",
    Kind.WALK: "walk",
    Kind.UFFD_REGISTER: "uffd_register",
    Kind.UFFD_UNREGISTER: "uffd_unregister",
    Kind.UFFD_PROTECT: "uffd_protect",
    Kind.UFFD_UNPROTECT: "uffd_unprotect",
    Kind.UFFD_MOVE: "uffd_move",
}
#: what tests import from there
_PROGRAMS: Final = tuple(
    sorted(("check", "check_marks", "move_failing", "pages", "poke", "swap_off_and_on", "write", *_HELPERS.values()))
)
#: how a process of a program is called in the test
_CHILDREN: Final = ("", "first", "second")


def write_test(story: Story, failure: str, release: str, name: str) -> str:
    """The text of a test file.

    :param failure: what an oracle of the explorer said, in one sentence.
    :param release: the kernel that it was seen on.
    :param name: of the test, in words joined by underscores.
    """
    body = [line for event in story.events for line in _lines(event)]
    body += _checks(story)
    text = "\n".join(body)
    fixtures = [f"{each}: {kind}" for each, kind in _fixtures(story)]
    test = [
        f"def test_{name}({', '.join(fixtures)}) -> None:",
        *textwrap.indent(_docstring(story, failure, release), "    ").splitlines(),
        f"    with {', '.join([f'carve_out({story.pages}) as area', *_stacks(story)])}:",
        # A reservation would refuse what free memory allows, such as growing in place.
        f"        area.hole(0, {story.pages})",
        *(f"        {line}" for line in body),
    ]
    return "\n".join([*_imports(story, text), "", "", *test, ""])


def _fixtures(story: Story) -> list[tuple[str, str]]:
    found = [("ksm", "Ksm")] if story.kinds & _KSM else []
    return [*found, ("own_group", "Memcg")] if Kind.RECLAIM in story.kinds else found


def _stacks(story: Story) -> list[str]:
    """What a test needs for large folios, for processes, and for references to pages."""
    processes = ["ExitStack() as stack"] if story.forks else []
    folios = ["advised_folios()"] if Kind.HUGEPAGE in story.kinds else []
    held = ["ExitStack() as held"] if story.kinds & _HOLDS else []
    return [*folios, *processes, *held]


def _imports(story: Story, text: str) -> list[str]:
    lines = [*_HEAD]
    if story.forks or story.kinds & _HOLDS:
        lines += ["from contextlib import ExitStack", ""]
    if "pytest." in text:
        lines += ["import pytest", ""]
    if "syscalls." in text:
        lines.append("from guest_tests.mm import syscalls")
    if story.kinds & _KSM:
        lines.append("from guest_tests.mm.ksm import Ksm")
    lines.append(f"from guest_tests.mm.mapping import {', '.join(_used(text, ('carve_out', 'map_anonymous', 'move')))}")
    if Kind.RECLAIM in story.kinds:
        lines.append("from guest_tests.mm.memcg import Memcg")
    if story.forks:
        lines.append("from guest_tests.mm.proctree import Child")
    if Kind.HUGEPAGE in story.kinds:
        lines.append("from guest_tests.support.folios import advised_folios")
    if "assert_found" in text:
        lines.append("from guest_tests.support.found import assert_found")
    if "Spliced" in text:
        lines.append("from guest_tests.support.holds import Spliced")
    lines.append(f"from guest_tests.support.programs import {', '.join(_used(text, _PROGRAMS))}")
    return lines


def _used(text: str, names: tuple[str, ...]) -> list[str]:
    return [name for name in names if name == "carve_out" or re.search(rf"(?<![.\w]){name}\(|\({name},", text)]


def _docstring(story: Story, failure: str, release: str) -> str:
    told = textwrap.fill(f"The explorer saw this on {release}: {failure}.", 112)
    drawn = "\n".join(f"    {line}" for line in picture(story))
    lines = [
        f'"""No row: {", then ".join(each.kind for each in story.events)[:90]}.',
        "",
        told,
        "",
        "::",
        "",
        drawn,
        "",
        textwrap.fill(LEGEND, 112),
        "",
        "Every kernel: each page holds its data, and the reverse walk finds it.",
        '"""',
    ]
    return "\n".join(lines)


def _lines(event: Event) -> list[str]:
    """The statements that do one step."""
    kind = event.kind
    if kind is Kind.FORK:
        return [f"{_CHILDREN[event.operation.arg]} = stack.enter_context(Child())"]
    if kind is Kind.EXIT:
        return [f"{_CHILDREN[event.process]}.close()"]
    if kind in _EVERYWHERE:
        return [_EVERYWHERE[kind]]
    if kind is Kind.RECLAIM:
        return ["own_group.reclaim(own_group.current)"]
    what, arguments = _function(event)
    if event.process:
        line = f"{_CHILDREN[event.process]}.call({', '.join([what, *arguments])})"
    else:
        line = f"{what}({', '.join(arguments)})"
    if event.error:
        return ["with pytest.raises(OSError):", f"    {line}"]
    return [line]


def _function(event: Event) -> tuple[str, list[str]]:
    kind = event.kind
    where = f"pages(area, {event.start}, {event.pages})"
    if kind in _HELPERS:
        others = {Kind.MAP_FILE: (event.dst, event.new), Kind.UFFD_MOVE: (event.start, event.dst)}
        return _HELPERS[kind], ["area", *map(str, others.get(kind, (event.start, event.pages)))]
    if kind in FAILING:
        numbers = map(str, (event.start, event.pages, event.dst))
        return "move_failing", ["area", *numbers, _MOVES[kind], str(event.operation.arg)]
    if kind in (Kind.MAP, Kind.MAP_SHARED):
        shared = ["shared=True"] if kind is Kind.MAP_SHARED else []
        return "map_anonymous", [str(event.new), f"area.page({event.dst})", *shared]
    if kind in (Kind.WRITE, Kind.WRITE_SAME, Kind.POKE):
        return "poke" if kind is Kind.POKE else "write", ["area", str(event.start), _bytes(event.tags)]
    if kind in _MOVES:
        flags = [_MOVES[kind]] if _MOVES[kind] else []
        length = [f"pages={event.new}"] if event.new != event.pages else []
        return "move", [where, f"area.page({event.dst})", *flags, *length]
    if kind in (Kind.GROW, Kind.SHRINK):
        # In place: neither flag that move() gives.
        grown = f"{event.new} * {where}.length // {event.pages}"
        return "syscalls.mremap", [f"area.page({event.start})", f"{where}.length", grown, "0"]
    if kind in _ADVICE:
        return f"{where}.madvise", [f"syscalls.{_ADVICE[kind]}"]
    if kind in _PROTECTIONS:
        return f"{where}.mprotect", [f"syscalls.{_PROTECTIONS[kind]}"]
    if kind is Kind.HOLD:
        return "held.enter_context", [f"Spliced(area.page({event.start}), {where}.length)"]
    if kind is Kind.RELEASE:
        return "held.close", []
    if kind in _LOCKS:
        return _LOCKS[kind], [f"area.page({event.start})", f"{where}.length"]
    return f"{where}.{'unmap' if kind is Kind.UNMAP else 'touch_read'}", []


def _bytes(tags: bytes) -> str:
    return 'b"' + "".join(f"\\x{tag:02x}" for tag in tags) + '"'


def _checks(story: Story) -> list[str]:
    lines = ["held.close()"] if story.kinds & _HOLDS else []
    for each in story.expected:
        lines.append(_called(each.process, "check", f"area, {each.start}, {_bytes(each.tags)}"))
    for each in story.expected:
        # Only what was written has a page of its own.
        if any(each.tags):
            found = f"pages(area, {each.start}, {len(each.tags)}), pageout=False"
            lines.append(_called(each.process, "assert_found", found))
    if story.userfaults:
        for each in story.expected:
            lines.append(_called(each.process, "check_marks", f'area, {each.start}, "{each.marks}"'))
    return lines


def _called(process: int, function: str, arguments: str) -> str:
    """A call in a process of the program."""
    return f"{_CHILDREN[process]}.call({function}, {arguments})" if process else f"{function}({arguments})"
