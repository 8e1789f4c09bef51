# SPDX-License-Identifier: GPL-2.0
"""What the explorer writes of a program: the picture, the guest test, and the program in C."""

from __future__ import annotations

import errno
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from harness.explore import files
from harness.explore.campaign import Found
from harness.explore.picture import picture
from harness.explore.runner import Failure
from harness.explore.story import Story, story
from harness.explore.write_c import write_c
from harness.explore.write_test import write_test
from harness.programs.generate import Generator
from harness.programs.language import Kind, Operation, Part, Program, To

MAP = Operation(Kind.MAP, near=2, arg=2)
WRITE = Operation(Kind.WRITE)
HOME = Operation(Kind.MOVE_SHRINK, to=To.HOME)
MOVE = Operation(Kind.MOVE, near=1)
#: the program that shows a bug of 6.17: the place that DONTUNMAP left behind is moved back to
LOST: Program = (MAP, WRITE, replace(MOVE, kind=Kind.MOVE_DONTUNMAP), HOME)
FORKED: Program = (
    MAP,
    WRITE,
    Operation(Kind.FORK, arg=1),
    replace(MOVE, process=1),
    Operation(Kind.FORK, arg=2),
    Operation(Kind.WRITE, process=1, part=Part.FIRST),
    Operation(Kind.EXIT, process=2),
)

#: a child and the memory that moved have left the userfaultfd
REGISTERED: Program = (
    MAP,
    WRITE,
    Operation(Kind.UFFD_REGISTER),
    Operation(Kind.UFFD_PROTECT, part=Part.FIRST),
    Operation(Kind.UFFD_UNPROTECT, part=Part.LAST),
    Operation(Kind.FORK, arg=1),
    Operation(Kind.DONTNEED, part=Part.LAST),
    Operation(Kind.UFFD_MOVE, part=Part.FIRST, to=To.GAP),
    Operation(Kind.MOVE, part=Part.LAST, near=1),
)


def _in_c(told: Story) -> str:
    return write_c(told, "page 48 is lost", "6.17.13", "lost")


def test_the_picture_shows_each_step() -> None:
    assert picture(story(LOST, [])) == [
        "page            0        16",
        "map             | . . |  | - - |",
        "write           | . . |  | a b |",
        "move-dontunmap  | a b |  | - - |",
        "move-shrink     | . . |  | a - |",
    ]


def test_a_refused_step_is_told_as_refused() -> None:
    told = story((MAP, WRITE, MOVE), [0, 0, errno.EFAULT])
    assert picture(told)[3].startswith("move (refused)")
    assert 'must("move", move(16, 2, 0, 2, MREMAP_MAYMOVE | MREMAP_FIXED), EFAULT);' in _in_c(told)
    # As the executor does: the kernel may have unmapped the destination.
    assert 'must("unmap", unmap(0, 2), 0);' in _in_c(told)
    assert "with pytest.raises(OSError):" in write_test(told, "x", "6.17", "x")


def test_a_skipped_step_is_left_out() -> None:
    assert len(story((MAP, WRITE, MOVE), [0, 0, -1]).events) == 2


def test_the_guest_test_is_the_program() -> None:
    text = write_test(story(LOST, []), "page 48 is lost", "6.17.13", "lost")
    compile(text, "test_lost.py", "exec")
    body = text[text.index("        area.hole") :]
    assert body == (
        "        area.hole(0, 18)\n"
        "        map_anonymous(2, area.page(16))\n"
        '        write(area, 16, b"\\x02\\x03")\n'
        "        move(pages(area, 16, 2), area.page(0), syscalls.MREMAP_DONTUNMAP)\n"
        "        move(pages(area, 0, 2), area.page(16), pages=1)\n"
        '        check(area, 16, b"\\x02\\x00")\n'
        "        assert_found(pages(area, 16, 2), pageout=False)\n"
    )


def test_a_guest_test_of_several_processes_calls_into_them() -> None:
    text = write_test(story(FORKED, []), "x", "6.17", "forked")
    compile(text, "test_forked.py", "exec")
    assert "first = stack.enter_context(Child())" in text
    assert "first.call(move, pages(area, 16, 2), area.page(0))" in text
    assert "second.close()" in text


def test_a_move_that_is_made_to_fail_is_written_as_one() -> None:
    told = story((MAP, WRITE, Operation(Kind.MOVE_UNDONE, near=1, arg=2)), [0, 0, errno.EFAULT])
    assert 'must("move-undone", move_failing(16, 2, 0, 16 /* MREMAP_MUST_RELOCATE_ANON */, 2), EFAULT);' in _in_c(told)
    text = write_test(told, "x", "7.3", "undone")
    compile(text, "test_undone.py", "exec")
    assert "    with pytest.raises(OSError):\n            move_failing(area, 16, 2, 0, syscalls.MREMAP_MUST" in text


def test_a_program_with_a_userfaultfd_compares_its_marks() -> None:
    told = story(REGISTERED, [])
    text = _in_c(told)
    assert "userfault(16, 1, UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_MODE_WP)" in text
    assert text.count('marks(16, "w");') == text.count('marks(0, "-");') == text.count('marks(16, "--");') == 1
    text = write_test(told, "x", "6.17", "registered")
    compile(text, "test_registered.py", "exec")
    for line in (
        "uffd_protect(area, 16, 1)",
        'check_marks(area, 16, "w")',
        'check_marks(area, 0, "-")',
        'first.call(check_marks, area, 16, "--")',
    ):
        assert f"        {line}\n" in text
    assert "marks" not in _in_c(story(LOST, []))


@pytest.mark.parametrize("seed", range(3))
def test_every_program_can_be_written(seed: int) -> None:
    generator = Generator(seed, list(Kind))
    for _ in range(200):
        told = story(generator.next().program, [])
        compile(write_test(told, "x", "6.17", "x"), "test_x.py", "exec")
        assert "int main(void)" in _in_c(told)


def test_what_was_found_is_saved_in_three_forms(tmp_path: Path) -> None:
    found = Found(LOST, Failure("walk", 0, 48, "page 48 is lost"), [0] * 4, "6.17.13")
    saved = files.save(found, tmp_path / "explored", "seed 7")
    assert [each.name for each in saved] == [
        "walk-move-dontunmap-move-shrink.json",
        "test_walk_move_dontunmap_move_shrink.py",
        "walk-move-dontunmap-move-shrink.c",
    ]
    assert files.read(saved[0]) == LOST
    # Page 48 of the arena is page 16 of the picture.
    assert all("page 16 is lost" in each.read_text() for each in saved)
    assert files.save(found, tmp_path / "explored", "seed 8") == saved


def test_another_program_with_the_same_name_does_not_replace_the_first(tmp_path: Path) -> None:
    first = Found(LOST, Failure("walk", 0, 48, "page 48 is lost"), [0] * 4, "6.17.13")
    second = replace(first, program=(MAP, *LOST))
    assert files.save(first, tmp_path, "seed 7")[0].name == "walk-move-dontunmap-move-shrink.json"
    assert files.save(second, tmp_path, "seed 7")[0].name == "walk-move-dontunmap-move-shrink-2.json"


@pytest.fixture
def compiler() -> str:
    found = shutil.which("gcc") or shutil.which("cc")
    if found is None:
        pytest.skip("needs a C compiler")
    return found


def _compile(compiler: str, text: str, directory: Path) -> Path:
    """Compile as strictly as a maintainer might."""
    source = directory / "program.c"
    source.write_text(text)
    options = ["-O1", "-Wall", "-Wextra", "-Werror", "-static"]
    subprocess.run([compiler, *options, "-o", directory / "program", source], check=True)
    return directory / "program"


def test_programs_of_all_operations_compile_without_warnings(compiler: str, tmp_path: Path) -> None:
    generator, missing = Generator(1, list(Kind)), set(Kind)
    while missing:
        told = story(generator.next().program, [])
        if len(told.kinds & missing) > 3 or (told.kinds & missing and len(missing) < 8):
            missing -= told.kinds
            _compile(compiler, _in_c(told), tmp_path)


def test_the_program_says_so_where_it_cannot_tell(compiler: str, tmp_path: Path) -> None:
    """A host of containers and one node, and one of two nodes, are both fine."""
    done = subprocess.run([_compile(compiler, _in_c(story((MAP, WRITE, MOVE), [])), tmp_path)], check=False)
    assert done.returncode in (0, 4)


def test_the_program_notices_wrong_bytes(compiler: str, tmp_path: Path) -> None:
    text = _in_c(story((MAP, WRITE, MOVE), [])).replace(r'check(0, 2, "\002\003");', r'check(0, 2, "\002\007");')
    # The walk may not be possible on this host, and is not what this is about.
    text = text.replace("\twalk(0, 2);\n", "\t(void)walk;\n")
    done = subprocess.run([_compile(compiler, text, tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "page 1 holds 3 and 3, 7 was written" in done.stdout


def test_the_program_notices_wrong_marks(compiler: str, tmp_path: Path) -> None:
    """The host's kernel may have no such userfaultfd, and the program says so then."""
    text = _in_c(story((MAP, WRITE, REGISTERED[2], REGISTERED[3]), [])).replace("\twalk(0, 2);\n", "\t(void)walk;\n")
    for marks, status, says in (("w-", 0, "All is well."), ("ww", 1, "page 1 is not write-protected")):
        program = _compile(compiler, text.replace('marks(0, "w-");', f'marks(0, "{marks}");'), tmp_path)
        done = subprocess.run([program], capture_output=True, text=True, check=False)
        if done.returncode == 4:
            pytest.skip(f"the host cannot tell: {done.stdout.strip()}")
        assert done.returncode == status
        assert says in done.stdout
