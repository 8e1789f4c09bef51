# SPDX-License-Identifier: GPL-2.0
"""Programs in files: reads them, and saves those that were found."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Final

from harness.errors import UsageError
from harness.explore.campaign import Found
from harness.explore.story import story
from harness.explore.write_c import write_c
from harness.explore.write_test import write_test
from harness.programs.language import MOST_BYTES, BadProgram, Program, from_json, to_json

#: how many lines of an audit are written into a test and a C program
_MOST_LINES: Final = 2


def read(path: Path) -> Program:
    """The program in a file.

    :raises UsageError: in one line, if there is none.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        return from_json(data.decode())
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no program: it is not text") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except BadProgram as error:
        raise UsageError(f"{path} is no program that can be run: {error}") from None


def save(found: Found, directory: Path, source: str) -> list[Path]:
    """Save a program that was found: as a program file, as a guest test, and in C. Returns the files.

    Of a program that fails in a race only the file is saved, because the other two would run without the race.

    :param source: what it was made from, such as a seed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    release, called = found.release, _free_name(found, directory)
    told = story(found.program, found.errors)
    failure = told.counted(found.failure.text)
    texts = {f"{called}.json": to_json(found.program, fails=failure, release=release, source=source)}
    if not found.runs:
        failure += "".join(f" The audit says: {each}." for each in found.failure.audit.splitlines()[:_MOST_LINES])
        texts |= {
            f"test_{called.replace('-', '_')}.py": write_test(told, failure, release, called.replace("-", "_")),
            f"{called}.c": write_c(told, failure, release, called),
        }
    for file, text in texts.items():
        (directory / file).write_text(text)
    return [directory / file for file in texts]


def _free_name(found: Found, directory: Path) -> str:
    """A name that no other program has in a directory; one that is there already keeps its name."""
    names = itertools.chain([name(found)], (f"{name(found)}-{number}" for number in itertools.count(2)))
    return next(each for each in names if _is_free(directory / f"{each}.json", found.program))


def _is_free(path: Path, program: Program) -> bool:
    try:
        return not path.exists() or read(path) == program
    except UsageError:
        return False


def name(found: Found) -> str:
    """A name for files, made of the check and the operations that matter."""
    race = ["race"] if found.runs else []
    kinds = [kind for kind in found.shape[1:] if kind not in ("map", "write")]
    return re.sub(r"[^a-z0-9]+", "-", "-".join([*race, found.shape[0], *kinds]))[:80].strip("-")
