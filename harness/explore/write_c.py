# SPDX-License-Identifier: GPL-2.0
"""Writes a program as C that depends on nothing but the C library, for whoever is to repair the kernel."""

from __future__ import annotations

import errno
import textwrap
from typing import Final

from harness.explore.c_parts import FORK_HEAD, FUNCTIONS, HEAD
from harness.explore.picture import LEGEND, picture
from harness.explore.story import Event, Story
from harness.programs.language import Kind

_ADVICE: Final = {
    Kind.MERGEABLE: "MADV_MERGEABLE",
    Kind.UNMERGEABLE: "MADV_UNMERGEABLE",
    Kind.DONTNEED: "MADV_DONTNEED",
    Kind.FREE: "MADV_FREE",
    Kind.HUGEPAGE: "MADV_HUGEPAGE",
    Kind.NOHUGEPAGE: "MADV_NOHUGEPAGE",
    Kind.PAGEOUT: "21 /* MADV_PAGEOUT */",
    Kind.COLD: "20 /* MADV_COLD */",
    Kind.DONTFORK: "MADV_DONTFORK",
    Kind.DOFORK: "MADV_DOFORK",
    Kind.WIPEONFORK: "MADV_WIPEONFORK",
    Kind.KEEPONFORK: "MADV_KEEPONFORK",
    Kind.GUARD: "102 /* MADV_GUARD_INSTALL */",
    Kind.UNGUARD: "103 /* MADV_GUARD_REMOVE */",
    Kind.POPULATE: "23 /* MADV_POPULATE_WRITE */",
    Kind.SOFT_OFFLINE: "101 /* MADV_SOFT_OFFLINE */",
}
_FIXED: Final = "MREMAP_MAYMOVE | MREMAP_FIXED"
_RELOCATE: Final = "8 /* MREMAP_RELOCATE_ANON */"
_MUST_RELOCATE: Final = "16 /* MREMAP_MUST_RELOCATE_ANON */"
_MOVES: Final = {
    Kind.MOVE: _FIXED,
    Kind.MOVE_GROW: _FIXED,
    Kind.MOVE_SHRINK: _FIXED,
    Kind.MOVE_DONTUNMAP: f"{_FIXED} | 4 /* MREMAP_DONTUNMAP */",
    Kind.MOVE_RELOCATE: f"{_FIXED} | {_RELOCATE}",
    Kind.MOVE_MUST_RELOCATE: f"{_FIXED} | {_MUST_RELOCATE}",
    Kind.GROW: "0",
    Kind.SHRINK: "0",
}
#: moves that are made to fail
_FAILING: Final = {Kind.MOVE_UNDONE: _MUST_RELOCATE, Kind.MOVE_FALLBACK: _RELOCATE}
_PROTECTIONS: Final = {
    Kind.PROTECT_NONE: "PROT_NONE",
    Kind.PROTECT_READ: "PROT_READ",
    Kind.PROTECT_WRITE: "PROT_READ | PROT_WRITE",
}
_SHARINGS: Final = {Kind.MAP: "MAP_PRIVATE", Kind.MAP_SHARED: "MAP_SHARED"}
_RANGES: Final = {
    Kind.UNMAP: "unmap",
    Kind.LOCK: "lock",
    Kind.UNLOCK: "unlock",
    Kind.READ: "look",
    Kind.HOLD: "hold",
    Kind.WALK: "walk",
}
#: functions with further arguments
_CHOICES: Final = {
    Kind.BIND: ("bind", "1 /* MPOL_PREFERRED */"),
    Kind.UNBIND: ("bind", "0 /* MPOL_DEFAULT */"),
    Kind.NAME: ("name", '"program"'),
    Kind.UNNAME: ("name", "NULL"),
    Kind.UFFD_REGISTER: ("userfault", "UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_WP"),
    Kind.UFFD_UNREGISTER: ("userfault", "UFFDIO_UNREGISTER, 0"),
    Kind.UFFD_PROTECT: ("userfault", "UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_MODE_WP"),
    Kind.UFFD_UNPROTECT: ("userfault", "UFFDIO_WRITEPROTECT, 0"),
}
_PLAIN: Final = {
    Kind.SCAN: "scan",
    Kind.UNMERGE_ALL: "unmerge_all",
    Kind.RELEASE: "release",
    Kind.RECLAIM: "reclaim",
    Kind.SWAPOFF: "swap_off",
}
#: parts that parts need
_NEEDS: Final = {
    "scan": ("ksm", "put"),
    "unmerge_all": ("ksm", "put"),
    "reclaim": ("put",),
    "walk": ("wrong",),
    "move_failing": ("put", "move"),
    "userfault": ("userfaultfd",),
    "userfault_move": ("userfaultfd",),
}


def write_c(story: Story, failure: str, release: str, name: str) -> str:
    """The program in C.

    :param failure: what an oracle of the explorer said, in one sentence.
    :param release: the kernel that it was seen on.
    :param name: of the file, without its suffix.
    """
    calls = [_call(each) for each in story.events]
    wanted = {"page", "must", "bad"}
    if story.expected:
        wanted |= {"wrong", "check", "walk"}
    for function, _ in calls:
        wanted |= {function, *_NEEDS.get(function, ())} if function else set()
    if story.expected and story.userfaults:
        wanted.add("marks")
    if story.forks:
        wanted.add("turns")
    if Kind.HOLD in story.kinds:
        wanted |= {"hold", "release"}
    if Kind.HUGEPAGE in story.kinds:
        wanted |= {"put", "folios"}
    parts = [text for part, text in FUNCTIONS.items() if part in wanted]
    head = HEAD + (FORK_HEAD if story.forks else "")
    if "name" in wanted and not story.forks:
        head += "#include <sys/prctl.h>\n"
    if "userfaultfd" in wanted:
        head += "#include <linux/userfaultfd.h>\n#include <sys/ioctl.h>\n"
    if "reclaim" in wanted:
        head += "#include <sys/stat.h>\n"
    if "swap_off" in wanted:
        head += "#include <sys/swap.h>\n"
    if "hold" in wanted:
        head += "#include <sys/uio.h>\n"
    return "".join([_comment(story, failure, release, name), head, *parts, "\n", _main(story, calls, wanted)])


def _comment(story: Story, failure: str, release: str, name: str) -> str:
    about = textwrap.wrap(
        f"Seen on Linux {release}: {failure}. Each line of the picture is one step of main(). {LEGEND}", 76
    )
    run = [
        f"    cc -Wall -Werror -o {name} {name}.c && ./{name}",
        "",
        "Run it as root on a machine with two NUMA nodes; numa=fake=2 makes some.",
        "Exit status: 0 all is well, 1 the kernel is wrong, 4 it cannot be told here.",
    ]
    lines = [*about, "", *(f"    {line}" for line in picture(story)), "", *run]
    text = "\n".join(f" * {line}".rstrip() for line in lines).replace("*/", "* /")
    return f"// SPDX-License-Identifier: GPL-2.0\n/*\n{text}\n */\n"


def _call(event: Event) -> tuple[str, str]:
    """The function that does a step, and the call."""
    kind, where = event.kind, f"{event.start}, {event.pages}"
    if kind in _SHARINGS:
        return "map", f"map({event.dst}, {event.new}, {_SHARINGS[kind]})"
    if kind is Kind.MAP_FILE:
        return "map_file", f"map_file({event.dst}, {event.new})"
    if kind in _CHOICES:
        function, choice = _CHOICES[kind]
        return function, f"{function}({where}, {choice})"
    if kind is Kind.UFFD_MOVE:
        return "userfault_move", f"userfault_move({event.start}, {event.dst})"
    if kind in _FAILING:
        return "move_failing", f"move_failing({where}, {event.dst}, {_FAILING[kind]}, {event.operation.arg})"
    if kind in _MOVES:
        return "move", f"move({where}, {event.dst}, {event.new}, {_MOVES[kind]})"
    if kind in _ADVICE:
        return "advise", f"advise({where}, {_ADVICE[kind]})"
    if kind in _PROTECTIONS:
        return "protect", f"protect({where}, {_PROTECTIONS[kind]})"
    if kind in _RANGES:
        return _RANGES[kind], f"{_RANGES[kind]}({where})"
    if kind in _PLAIN:
        return _PLAIN[kind], f"{_PLAIN[kind]}()"
    if kind is Kind.POKE:
        return "poke", f"poke({event.start}, {_bytes(event.tags)})"
    if kind in (Kind.WRITE, Kind.WRITE_SAME):
        return "fill", f"fill({where}, {_bytes(event.tags)})"
    return "", ""


def _bytes(tags: bytes) -> str:
    return '"' + "".join(f"\\{tag:03o}" for tag in tags) + '"'


def _main(story: Story, calls: list[tuple[str, str]], wanted: set[str]) -> str:
    lines = ["int main(void)", "{", "\tpage_size = sysconf(_SC_PAGESIZE);"]
    if story.forks:
        lines += [
            "\tshared = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);",
            "\tif (shared == MAP_FAILED)",
            "\t\treturn CANNOT_TELL;",
            "\talarm(60); /* in case that a process ends before its turn */",
        ]
    if "ksm" in wanted:
        lines.append("\tksm_begin();")
    if "reclaim" in wanted:
        lines.append("\treclaim_begin();")
    if "folios" in wanted:
        lines.append("\tfolios_begin();")
    lines.append("")
    for number, (event, (_, call)) in enumerate(zip(story.events, calls, strict=True)):
        lines += _step(number, event, call, forks=story.forks)
    lines.append("")
    if Kind.HOLD in story.kinds:
        lines.append("\trelease();" if not story.forks else "\tif (me == 0)\n\t\trelease();")
    lines += _checks(story)
    return "\n".join([*lines, "}", ""])


def _step(number: int, event: Event, call: str, *, forks: bool) -> list[str]:
    wanted = errno.errorcode.get(event.error, str(event.error)) if event.error else "0"
    if not forks:
        return [f'\tmust("{event.kind}", {call}, {wanted});']
    if event.kind is Kind.FORK:
        child = event.operation.arg
        return [
            "\tif (me == 0) {",
            f"\t\tturn({number});",
            "\t\tchildren++;",
            f"\t\tbecome({child}, {number});",
            "\t}",
        ]
    if event.kind is Kind.EXIT:
        return [
            f"\tif (me == {event.process}) {{",
            f"\t\tturn({number});",
            "\t\tshared->step++;",
            "\t\t_exit(OK);",
            "\t}",
        ]
    return [f'\tSTEP({number}, {event.process}, "{event.kind}", {call}, {wanted});']


def _checks(story: Story) -> list[str]:
    if not story.forks:
        return [
            *_of_process(story, 0, "\t"),
            '\tprintf("%s\\n", bad ? "The kernel is wrong." : "All is well.");',
            "\treturn bad;",
        ]
    lines: list[str] = []
    number = len(story.events)
    for process in story.alive:
        lines += [f"\tif (me == {process}) {{", f"\t\tturn({number});", *_of_process(story, process, "\t\t")]
        lines += ["\t\tshared->bad |= bad;", "\t\tshared->step++;", "\t}"]
        number += 1
    return [
        *lines,
        # Nobody leaves before all have looked: a process that ends lets go of its pages.
        f"\tturn({number});",
        "\tif (me)",
        "\t\t_exit(OK);",
        "\twhile (children-- > 0)",
        "\t\twait(NULL);",
        '\tprintf("%s\\n", shared->bad ? "The kernel is wrong." : "All is well.");',
        "\treturn shared->bad;",
    ]


def _of_process(story: Story, process: int, indent: str) -> list[str]:
    own = [each for each in story.expected if each.process == process]
    checks = [f"check({each.start}, {len(each.tags)}, {_bytes(each.tags)});" for each in own]
    walks = [f"walk({each.start}, {len(each.tags)});" for each in own]
    marks = [f'marks({each.start}, "{each.marks}");' for each in own] if story.userfaults else []
    return [f"{indent}{each}" for each in (*checks, *walks, *checks, *marks)]
