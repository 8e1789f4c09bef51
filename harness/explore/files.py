# SPDX-License-Identifier: GPL-2.0
"""Programs in files: reads them, and saves those that were found."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import UsageError
from harness.explore.campaign import Found
from harness.programs.language import MOST_BYTES, BadProgram, Program, from_json, to_json


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


def save(found: Found, directory: Path, seed: int) -> Path:
    """Save a program that was found; returns its file.

    :param seed: of the exploration that found it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = to_json(found.program, fails=found.failure.text, release=found.release, seed=str(seed))
    path = directory / f"{name(found)}.json"
    path.write_text(text)
    return path


def name(found: Found) -> str:
    """A name for files, made of the check and the operations that matter."""
    kinds = [kind for kind in found.shape[1:] if kind not in ("map", "write")]
    return re.sub(r"[^a-z0-9]+", "-", "-".join([found.shape[0], *kinds]))[:80].strip("-")
