# SPDX-License-Identifier: GPL-2.0
"""Compiles all mutants of a variant into one kernel, in which at most one is active.

Each hunk of a mutant adds code behind the condition ``MUTANT``, which becomes ``mm_mutant_is(NUMBER)``. The
hunks of all mutants are placed in the unmutated source, so no mutant depends on another; two that replace the same
line are an error.

The kernel parameter ``mm_mutant`` names the active mutant. It can be given at boot, and written in
``/sys/module/kernel/parameters/``. No mutant is active while it is empty. ``record`` activates none, and counts in
``/proc/mm_mutants`` how often the place of each mutant was reached.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from harness.build.mutants import SWITCH, Hunk, Mutant, Mutants
from harness.errors import BuildError

#: the value of ``mm_mutant`` that activates nothing, and counts
RECORD = "record"

HEADER = "include/linux/mm_mutant.h"
SOURCE = "mm/mutants.c"
MAKEFILE = "mm/Makefile"


@dataclass(frozen=True)
class _Edit:
    """Lines to put in place of others."""

    mutant: Mutant
    #: index of the first line that is replaced
    at: int
    #: how many lines are replaced
    count: int
    lines: tuple[str, ...]

    @property
    def continues(self) -> bool:
        """Whether the last line governs the line after it, as ``if (...)`` does."""
        return not self.lines[-1].rstrip().endswith((";", "}"))


def files(mutants: Mutants, read: Callable[[str], str]) -> Mapping[str, str]:
    """The files that a source has with its mutants, by path: those that change, and those that are new.

    :param read: returns a file of the unmutated source.
    :raises BuildError: if a hunk has no place in its function, or several, or if two mutants replace the same line.
    """
    _check_numbers(mutants)
    edits: dict[str, list[_Edit]] = {}
    sources = {hunk.file: read(hunk.file).split("\n") for mutant in mutants.all for hunk in mutant.hunks}
    for mutant in mutants.all:
        for hunk in mutant.hunks:
            edits.setdefault(hunk.file, []).extend(_edits(mutant, hunk, sources[hunk.file]))
    changed = {file: "\n".join(_applied(sources[file], found, file)) for file, found in edits.items()}
    makefile = f"{read(MAKEFILE)}obj-y += {SOURCE.removeprefix('mm/').removesuffix('.c')}.o\n"
    return {**changed, MAKEFILE: makefile, HEADER: _HEADER, SOURCE: _source(mutants)}


def digest(mutants: Mutants) -> str:
    """Changes with what is compiled; not with the descriptions of the mutants."""
    hunks = [f"{mutant.name} {hunk}" for mutant in mutants.all for hunk in mutant.hunks]
    return hashlib.sha256("\n".join([_HEADER, _source(mutants), *hunks]).encode()).hexdigest()


def _edits(mutant: Mutant, hunk: Hunk, source: list[str]) -> list[_Edit]:
    start = _place(mutant, hunk, source)
    edits: list[_Edit] = []
    at = start
    removed, added = 0, list[str]()
    for line in (*hunk.lines, " "):
        if line.startswith("-"):
            removed += 1
        elif line.startswith("+"):
            added.append(line[1:].replace(SWITCH, f"mm_mutant_is(0x{_number(mutant):08x}U /* {mutant.name} */)"))
        else:
            if removed or added:
                edits.append(_Edit(mutant, at, removed, tuple(added)))
            at += removed + 1
            removed, added = 0, []
    return edits


def _place(mutant: Mutant, hunk: Hunk, source: list[str]) -> int:
    """The index of the line where a hunk begins."""
    where = f"{mutant.name}: {hunk.file}: {hunk.function}()"
    bodies = list(_functions(hunk.function, source))
    if not bodies:
        raise BuildError(f"{where} does not exist in this source")
    old = hunk.old
    places = [
        at for first, end in bodies for at in range(first, end - len(old) + 2) if source[at : at + len(old)] == old
    ]
    if len(places) != 1:
        how = "does not contain" if not places else f"contains {len(places)} times"
        raise BuildError(f"{where} {how} the lines of the hunk:\n" + "\n".join(old))
    return places[0]


def _functions(name: str, source: list[str]) -> list[tuple[int, int]]:
    """The first and the last line of each definition of a function, which may stand in two branches of an #ifdef."""
    found = []
    heading = re.compile(rf"^[A-Za-z_].*\b{re.escape(name)}\(|^{re.escape(name)}\(")
    for number, line in enumerate(source):
        if not heading.match(line):
            continue
        for body in range(number, min(number + 12, len(source))):
            if source[body].endswith(";"):
                break  # a declaration
            if source[body] == "{":
                end = next((each for each in range(body, len(source)) if source[each] == "}"), None)
                if end is not None:
                    found.append((number, end))
                break
    return found


def _applied(source: list[str], edits: list[_Edit], file: str) -> list[str]:
    # Statements first, then conditions for the line that follows, and then what replaces that line.
    ordered = sorted(edits, key=lambda each: (each.at, each.count > 0, each.continues, each.mutant.name))
    lines: list[str] = []
    at, owner = 0, None
    for edit in ordered:
        if edit.at < at:
            raise BuildError(f"{edit.mutant.name} and {owner} both replace line {edit.at + 1} of {file}")
        lines += source[at : edit.at]
        lines += edit.lines
        at = edit.at + edit.count
        owner = edit.mutant.name if edit.count else owner
    lines += source[at:]
    first = next(number for number, line in enumerate(lines) if line.startswith(("#include", "#ifndef", "#define")))
    if lines[first].startswith("#ifndef"):  # a header: after its guard
        first += 2
    return [*lines[:first], "#include <linux/mm_mutant.h>", *lines[first:]]


def _number(mutant: Mutant) -> int:
    """The number that stands for a mutant in the code. It does not depend on the others.

    So a new mutant changes one file of the kernel, and not a header that all of them include.
    """
    return zlib.crc32(mutant.name.encode())


def _check_numbers(mutants: Mutants) -> None:
    numbers = {_NONE: "", _RECORD: RECORD}
    for mutant in mutants.all:
        other = numbers.setdefault(_number(mutant), mutant.name)
        if other != mutant.name:
            raise BuildError(f"{mutant.name} and {other!r} have the same number: give one of them another name")


#: The numbers that stand for no mutant, and for counting.
_NONE, _RECORD = 0, 1

_HEADER = f"""/* SPDX-License-Identifier: GPL-2.0 */
/* Deliberate bugs, of which at most one is active. */
#ifndef _LINUX_MM_MUTANT_H
#define _LINUX_MM_MUTANT_H

#include <linux/compiler.h>
#include <linux/types.h>

#define MM_MUTANT_NONE\t\t{_NONE}U
#define MM_MUTANT_RECORD\t{_RECORD}U

extern unsigned int mm_mutant;
bool mm_mutant_reached(unsigned int number);

/* Widens the window of a race, so that a test of a second meets it. */
void mm_mutant_sleep(unsigned int ms);

/* Whether the bug is active. Its place counts as reached, so this comes last in a condition. */
static inline bool mm_mutant_is(unsigned int number)
{{
\tif (likely(READ_ONCE(mm_mutant) == MM_MUTANT_NONE))
\t\treturn false;
\treturn mm_mutant_reached(number);
}}

#endif
"""


def _source(mutants: Mutants) -> str:
    ordered = sorted(mutants.all, key=_number)
    rows = "\n".join(f'\t{{ 0x{_number(mutant):08x}U, "{mutant.name}" }},' for mutant in ordered)
    return f"""// SPDX-License-Identifier: GPL-2.0
/* The switch of the mutants. Generated. */
#include <linux/mm_mutant.h>
#include <linux/delay.h>
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/moduleparam.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/string.h>
#include <linux/time64.h>

unsigned int mm_mutant;

/* Ordered by number. */
static struct {{
\tunsigned int number;
\tconst char *name;
\tunsigned int reached;
}} mutants[] = {{
{rows}
}};

static unsigned int *mm_mutant_count(unsigned int number)
{{
\tunsigned int low = 0, high = ARRAY_SIZE(mutants);

\twhile (low < high) {{
\t\tunsigned int middle = (low + high) / 2;

\t\tif (mutants[middle].number == number)
\t\t\treturn &mutants[middle].reached;
\t\tif (mutants[middle].number < number)
\t\t\tlow = middle + 1;
\t\telse
\t\t\thigh = middle;
\t}}
\treturn NULL;
}}

bool mm_mutant_reached(unsigned int number)
{{
\tunsigned int active = READ_ONCE(mm_mutant);
\tunsigned int *count;

\tif (active != number && active != MM_MUTANT_RECORD)
\t\treturn false;
\tcount = mm_mutant_count(number);
\tif (count)
\t\tWRITE_ONCE(*count, READ_ONCE(*count) + 1);
\treturn active == number;
}}

void mm_mutant_sleep(unsigned int ms)
{{
	fsleep(ms * USEC_PER_MSEC);
}}

static int mm_mutant_set(const char *value, const struct kernel_param *param)
{{
\tunsigned int number = sysfs_streq(value, "{RECORD}") ? MM_MUTANT_RECORD : MM_MUTANT_NONE;
\tunsigned int index;

\tfor (index = 0; index < ARRAY_SIZE(mutants); index++)
\t\tif (sysfs_streq(value, mutants[index].name))
\t\t\tnumber = mutants[index].number;
\tif (number == MM_MUTANT_NONE && !sysfs_streq(value, ""))
\t\treturn -EINVAL;
\tWRITE_ONCE(mm_mutant, MM_MUTANT_NONE);
\tfor (index = 0; index < ARRAY_SIZE(mutants); index++)
\t\tWRITE_ONCE(mutants[index].reached, 0);
\tWRITE_ONCE(mm_mutant, number);
\treturn 0;
}}

static int mm_mutant_get(char *buffer, const struct kernel_param *param)
{{
\tunsigned int active = READ_ONCE(mm_mutant);
\tunsigned int index;

\tif (active == MM_MUTANT_RECORD)
\t\treturn sysfs_emit(buffer, "{RECORD}\\n");
\tfor (index = 0; index < ARRAY_SIZE(mutants); index++)
\t\tif (mutants[index].number == active)
\t\t\treturn sysfs_emit(buffer, "%s\\n", mutants[index].name);
\treturn sysfs_emit(buffer, "\\n");
}}

static const struct kernel_param_ops mm_mutant_ops = {{
\t.set = mm_mutant_set,
\t.get = mm_mutant_get,
}};
/* As core_param() does, which takes no operations: without the prefix "mutants.". */
__module_param_call("", mm_mutant, &mm_mutant_ops, NULL, 0644, -1, 0);

static int mm_mutants_show(struct seq_file *file, void *unused)
{{
\tunsigned int index;

\tfor (index = 0; index < ARRAY_SIZE(mutants); index++)
\t\tseq_printf(file, "%s %u\\n", mutants[index].name, READ_ONCE(mutants[index].reached));
\treturn 0;
}}

static int __init mm_mutants_init(void)
{{
\tproc_create_single("mm_mutants", 0400, NULL, mm_mutants_show);
\treturn 0;
}}
late_initcall(mm_mutants_init);
"""
