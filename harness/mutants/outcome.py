# SPDX-License-Identifier: GPL-2.0
"""What became of the mutants of a kernel: the one form that the table, the JSON file and the pages are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from harness.errors import UsageError

#: Names the format of the JSON file.
FORMAT = "mremap-harness mutants"

#: Grows when a reader of the format before would misunderstand the file.
VERSION = 1


class State(StrEnum):
    """What is known of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    #: it survived, and its file says why no test can notice it
    EQUIVALENT = "equivalent"
    #: the harness failed
    UNDECIDED = "undecided"
    #: the run ended before its turn
    NOT_RUN = "not run"


class How(StrEnum):
    """What noticed a mutant."""

    #: a check of a guest test
    TEST = "test"
    #: a program of the explorer
    EXPLORER = "explorer"
    #: the audit of kernel memory
    AUDIT = "audit"
    #: a complaint of the kernel, or its taint
    CONSOLE = "console"
    #: the guest died or hung
    LOST = "guest lost"


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A test that failed because of a mutant."""

    #: its id without the kernel's label
    test: str
    how: How
    #: the first line of its failure
    message: str
    #: whether the audit reported errors, also if a check of the test failed first
    audited: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one mutant."""

    name: str
    group: str
    state: State
    #: the kills, the first one first; one at most unless all tests were run
    kills: Sequence[Kill] = ()
    #: seconds from the start of its first test run to the end of its last one
    seconds: float = 0.0
    #: how many tests reach its place in the unmutated kernel
    reaching: int = 0
    #: how many of them were run
    ran: int = 0
    #: why it is undecided
    trouble: str = ""


@dataclass(frozen=True, kw_only=True)
class Score:
    """The mutants of one kernel."""

    #: as for ``--kernel``
    kernel: str
    arch: str
    release: str
    accelerator: str
    results: Sequence[Result]
    #: whether kernel memory was audited
    audited: bool = False

    def count(self, state: State) -> int:
        """How many mutants are in a state."""
        return sum(each.state is state for each in self.results)

    @property
    def tried(self) -> int:
        """How many mutants a test could notice, and were tried."""
        return self.count(State.KILLED) + self.count(State.SURVIVED)


def to_json(scores: Sequence[Score], started: float) -> str:
    """The text of a JSON file.

    :param started: when the run began, in seconds since the epoch.
    """
    head = {"format": FORMAT, "version": VERSION, "started": round(started, 3)}
    return json.dumps({**head, "kernels": [asdict(each) for each in scores]}, indent=1) + "\n"


def from_json(path: Path) -> list[Score]:
    """Read a JSON file.

    :raises UsageError: if it is none, or damaged.
    """
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
        raise UsageError(f"{path} does not hold the results of mutants: give a file that harness mutants --json wrote")
    try:
        return [_score(each) for each in data["kernels"]]
    except (ValueError, TypeError, KeyError) as error:
        raise UsageError(f"{path} is damaged: {error}; run harness mutants again") from None


def _score(data: Mapping[str, Any]) -> Score:
    results = []
    for each in data["results"]:
        kills = tuple(Kill(**{**kill, "how": How(kill["how"])}) for kill in each["kills"])
        results.append(Result(**{**each, "state": State(each["state"]), "kills": kills}))
    return Score(**{**data, "results": results})
