# SPDX-License-Identifier: GPL-2.0
"""In which order tests are run against a mutant: first those that are likely to notice it.

What killed which mutant in earlier runs is kept in the user's state directory.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence

from harness import paths
from harness.host.cache import host_trouble
from harness.host.files import write
from harness.mutants.baseline import Passed

#: How many tests are remembered for a mutant.
_REMEMBERED = 5


class History:
    """Which tests killed which mutants."""

    def __init__(self) -> None:
        self._path = paths.state_dir() / "mutants.json"
        self._killers: dict[str, list[str]] = {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            kept = json.loads(self._path.read_text())
            self._killers = {str(name): [str(test) for test in tests] for name, tests in kept.items()}
        #: how many mutants each test has killed
        self.kills = Counter(tests[0] for tests in self._killers.values() if tests)

    def killers(self, mutant: str) -> list[str]:
        """The tests that have killed a mutant, the last one first."""
        return self._killers.get(mutant, [])

    def add(self, mutant: str, test: str) -> None:
        """Remember a kill."""
        others = [each for each in self.killers(mutant) if each != test]
        self._killers[mutant] = [test, *others][:_REMEMBERED]
        self.kills[test] += 1

    def keep(self) -> None:
        """Write it for the next run.

        :raises HostError: if the disk is full, or not writable.
        """
        with host_trouble(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        write(self._path, json.dumps(self._killers, indent=1, sort_keys=True))


def ordered(tests: Sequence[Passed], history: History, mutant: str) -> list[str]:
    """The tests in the order in which they are run: the mutant's former killers, then one of each module in turn.

    In a module, tests that reach few mutants come first: they are about this one, if about any. Those that killed
    other mutants come before those that never killed one.
    """
    former = [test for test in history.killers(mutant) if any(each.test == test for each in tests)]
    modules: defaultdict[str, list[Passed]] = defaultdict(list)
    for each in tests:
        if each.test not in former:
            modules[each.module].append(each)
    for members in modules.values():
        members.sort(key=lambda each: (-history.kills[each.test], len(each.reached), each.seconds))
    queues = sorted(modules.values(), key=lambda members: -sum(history.kills[each.test] for each in members))
    turns = range(max(map(len, queues), default=0))
    return former + [queue[turn].test for turn in turns for queue in queues if turn < len(queue)]
