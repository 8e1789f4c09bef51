# SPDX-License-Identifier: GPL-2.0
"""Mutants are read from their files, and placed in a source where each can be switched on by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.build import mutants, schemata
from harness.build.mutants import Mutants
from harness.errors import BuildError, UsageError
from harness.kernels.grammar import parse

SOURCE = """\
// SPDX-License-Identifier: GPL-2.0
#include <linux/mm.h>

static int grow(int size);

static int grow(int size)
{
	if (size < 0)
		return -EINVAL;
	size++;
	return size;
}

static int shrink(int size)
{
	size--;
	return size;
}
"""

TREE = {"mm/a.c": SOURCE, "mm/Makefile": "obj-y += a.o\n"}


def table(name: str, diff: str, more: str = "") -> str:
    return f"[{name}]\nbreaks = \"It grows.\"\nshows = \"It does not grow.\"\n{more}diff = '''\n{diff}'''\n"


def read(tmp_path: Path, text: str) -> Mutants:
    (tmp_path / "size.toml").write_text(text)
    return mutants.load("unpatched", tmp_path)


def mutated(tmp_path: Path, text: str) -> str:
    """The source with these mutants."""
    return schemata.files(read(tmp_path, text), TREE.__getitem__)["mm/a.c"]


NO_GROWTH = table("no-growth", "@@ mm/a.c grow\n+\tif (!MUTANT)\n \tsize++;\n")
TWICE = table("grows-twice", "@@ mm/a.c grow\n+\tif (MUTANT)\n+\t\tsize++;\n \tsize++;\n")


def test_a_mutant_has_a_name_a_group_and_the_promise_that_it_breaks(tmp_path: Path) -> None:
    (mutant,) = read(
        tmp_path, table("no-growth", "@@ mm/a.c grow\n+\tif (!MUTANT)\n \tsize++;\n", 'commit = "abc"\n')
    ).all
    assert (mutant.name, mutant.group, mutant.breaks, mutant.commit) == ("no-growth", "size", "It grows.", "abc")
    assert (mutant.places, mutant.variants, mutant.equivalent) == ("grow()", ("unpatched", "relocate-anon"), "")


BAD = {
    "[a-mutant\n": "(at line 1",
    table("A_mutant", "@@ mm/a.c grow\n+MUTANT\n x\n"): "its name consists of small letters",
    table("a-mutant", "@@ mm/a.c grow\n+MUTANT\n x\n", "speed = 1\n"): "unknown keys: speed",
    "[a-mutant]\nbreaks = 'x'\ndiff = 'x'\n": "'shows' is missing",
    table("a-mutant", "@@ mm/a.c grow\n+MUTANT\n x\n", 'variants = ["other"]\n'): "'variants' names unpatched",
    table("a-mutant", "@@ mm/a.c grow\n+MUTANT\n x\n", 'arch = "vax"\n'): "'arch' names one of x86_64, arm64",
    table("a-mutant", "@@ mm/a.c grow\n+MUTANT\n x\n", "cpus = 0\n"): "'cpus' is a number from 1 to 4",
    table("a-mutant", "@@ mm/a.c grow\n+MUTANT\n x\n", 'cpus = "2"\n'): "'cpus' is a number from 1 to 4",
    table("a-mutant", "+MUTANT\n x\n"): "must begin with a line '@@ FILE FUNCTION'",
    table("a-mutant", "@@ mm/a.c grow\nsize++;\n"): "begins neither with a space nor with - or +",
    table("a-mutant", "@@ mm/a.c grow\n-\tsize++;\n+\tsize--;\n"): "adds no line with MUTANT",
    table("a-mutant", "@@ mm/a.c grow\n+\tif (MUTANT)\n"): "has no line that says where it belongs",
}


@pytest.mark.parametrize("text", BAD)
def test_a_file_with_an_error_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(BAD[text])) as caught:
        read(tmp_path, text)
    assert "size.toml" in str(caught.value)


def test_two_mutants_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text(NO_GROWTH)
    with pytest.raises(UsageError, match="there are two mutants no-growth"):
        read(tmp_path, NO_GROWTH)


def test_a_mutant_becomes_a_condition_in_its_function(tmp_path: Path) -> None:
    text = mutated(tmp_path, NO_GROWTH)
    assert re.search(r"\tif \(!mm_mutant_is\(0x\w{8}U /\* no-growth \*/\)\)\n\tsize\+\+;\n\treturn size;\n", text)
    assert text.count("mm_mutant_is") == 1
    assert text.startswith("// SPDX-License-Identifier: GPL-2.0\n#include <linux/mm_mutant.h>\n#include <linux/mm.h>\n")


def test_without_its_mutants_the_source_is_what_it_was(tmp_path: Path) -> None:
    added = [line for line in mutated(tmp_path, NO_GROWTH + TWICE).splitlines() if line not in SOURCE.splitlines()]
    assert all("mm_mutant" in line or line == "\t\tsize++;" for line in added)


def test_mutants_of_one_place_stand_side_by_side_statements_before_conditions(tmp_path: Path) -> None:
    # "if (A) size++;" may not stand between "if (!B)" and its statement, whatever the order of the names.
    text = re.sub(r"0x\w{8}U ", "", mutated(tmp_path, NO_GROWTH + TWICE))
    twice = "\tif (mm_mutant_is(/* grows-twice */))\n\t\tsize++;\n"
    no_growth = "\tif (!mm_mutant_is(/* no-growth */))\n\tsize++;\n"
    assert twice + no_growth in text


def test_a_line_can_be_replaced_by_one_mutant_and_not_by_two(tmp_path: Path) -> None:
    one = table("one", "@@ mm/a.c shrink\n-\tsize--;\n+\tsize -= MUTANT ? 2 : 1;\n")
    two = table("two", "@@ mm/a.c shrink\n-\tsize--;\n+\tsize -= MUTANT ? 3 : 1;\n")
    assert re.search(r"\tsize -= mm_mutant_is\(0x\w{8}U /\* one \*/\) \? 2 : 1;\n", mutated(tmp_path, one))
    with pytest.raises(BuildError, match=r"two and one both replace line 16 of mm/a.c"):
        mutated(tmp_path, one + two)


@pytest.mark.parametrize(
    ("diff", "says"),
    [
        ("@@ mm/a.c stretch\n+\tif (!MUTANT)\n \tsize++;\n", "stretch() does not exist in this source"),
        ("@@ mm/a.c shrink\n+\tif (!MUTANT)\n \tsize++;\n", "shrink() does not contain the lines of the hunk"),
        ("@@ mm/a.c grow\n \tsize++;\n+\tif (!MUTANT)\n-\treturn 0;\n", "grow() does not contain the lines"),
    ],
)
def test_a_mutant_that_does_not_fit_the_source_is_an_error(tmp_path: Path, diff: str, says: str) -> None:
    with pytest.raises(BuildError, match=re.escape(says)):
        mutated(tmp_path, table("a-mutant", diff))


def test_lines_that_occur_twice_in_a_function_do_not_say_where_a_mutant_belongs(tmp_path: Path) -> None:
    double = {**TREE, "mm/a.c": SOURCE.replace("\tsize++;\n", "\tsize++;\n\tsize++;\n")}
    with pytest.raises(BuildError, match="contains 2 times the lines of the hunk"):
        schemata.files(read(tmp_path, NO_GROWTH), double.__getitem__)


def test_the_switch_knows_each_mutant_by_its_name(tmp_path: Path) -> None:
    files = schemata.files(read(tmp_path, NO_GROWTH + TWICE), TREE.__getitem__)
    assert files["mm/Makefile"] == "obj-y += a.o\nobj-y += mutants.o\n"
    for name in ("no-growth", "grows-twice"):
        (number,) = re.findall(rf'{{ (0x\w{{8}}U), "{name}" }}', files[schemata.SOURCE])
        assert f"{number} /* {name} */" in files["mm/a.c"]
    assert "no-growth" not in files[schemata.HEADER]  # or each new mutant would compile all files again


def test_only_what_is_compiled_changes_the_digest(tmp_path: Path) -> None:
    before = schemata.digest(read(tmp_path, NO_GROWTH))
    assert schemata.digest(read(tmp_path, NO_GROWTH.replace("It grows.", "It becomes larger."))) == before
    assert schemata.digest(read(tmp_path, NO_GROWTH.replace("!MUTANT", "MUTANT"))) != before


def test_the_mutants_of_the_project_can_be_read() -> None:
    for variant in ("unpatched", "relocate-anon"):
        found = mutants.load(variant)
        assert len({each.name for each in found.all}) == len(found.all)


@pytest.mark.parametrize("variant", ["unpatched-6.12", "relocate-anon-6.12"])
def test_mutants_made_for_one_version_are_not_those_of_another(variant: str) -> None:
    with pytest.raises(UsageError, match=f"there are no mutants for the kernel {variant}: use unpatched or relocate"):
        mutants.load(variant)


def test_only_a_kernel_that_is_built_with_mutants_can_activate_one() -> None:
    name = mutants.load("unpatched").all[0].name
    parse("unpatched:mutants", X86_64).check_mutant(name)  # type: ignore[union-attr]
    parse("unpatched:mutants", X86_64).check_mutant("record")  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="unpatched has no mutant of-nobody"):
        parse("unpatched:mutants", X86_64).check_mutant("of-nobody")  # type: ignore[union-attr]
    for text in ("unpatched", "debian:6.12"):
        with pytest.raises(UsageError, match="has no mutants: build one that has"):
            parse(text, X86_64).check_mutant(name)  # type: ignore[union-attr]


def test_the_sample_has_a_mutant_of_each_group_but_races() -> None:
    found = mutants.load("relocate-anon").all
    sampled = {each.group for each in found if each.sample}
    # What a lock left out does takes a race to be seen, and a race is no gate.
    assert {each.group for each in found} - sampled == {"locks"}
    assert 12 <= sum(bool(each.sample) for each in found) <= 16
