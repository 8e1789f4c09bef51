# SPDX-License-Identifier: GPL-2.0
"""Keeps the results of cells, so that an interrupted matrix goes on where it stopped.

Each cell has two files, named by its key: its record of results, and what is known of the run. The second one is
written last. Both are written under another name and renamed, so that a half result is never seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import cast

from harness import paths
from harness.host.cache import host_trouble
from harness.host.files import write
from harness.matrix.job import Ended

#: Grows when what is kept changes its form. Results in an older form are run again.
_GENERATION = 1


class ResultStore:
    """The results that are kept for this user."""

    def __init__(self) -> None:
        self.directory = paths.state_dir() / "matrix" / "cells"

    def get(self, key: str) -> Ended | None:
        """What is kept under a key; None if nothing is, or nothing that can be read."""
        try:
            kept = json.loads((self.directory / f"{key}.json").read_text())
            if kept["generation"] != _GENERATION:
                return None
            return cast(Ended, {**kept["ended"], "results": (self.directory / f"{key}.jsonl").read_text()})
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, key: str, identity: Mapping[str, str], ended: Ended) -> None:
        """Keep a result.

        :param identity: what the key is made of, for a person who wonders why a cell ran again.
        :raises HostError: if the disk is full, or not writable.
        """
        with host_trouble(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        about = {"generation": _GENERATION, "identity": dict(identity), "ended": {**ended, "results": ""}}
        write(self.directory / f"{key}.jsonl", ended["results"])
        write(self.directory / f"{key}.json", json.dumps(about, indent=1))
