# SPDX-License-Identifier: GPL-2.0
"""Asks the kernels of a bisect one after the other: from the log what it knows, and by a trial the rest."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from harness.bisect.journal import Journal
from harness.bisect.step import Step
from harness.bisect.trial import Trial
from harness.kernels.kernel import BootSpec
from harness.matrix.table import clock


class Asking:
    """The kernels of one bisect.

    :param tell: shows a line that stays.
    """

    def __init__(self, trial: Trial, journal: Journal, tell: Callable[[str], None]) -> None:
        self._trial = trial
        self._journal = journal
        self._tell = tell
        #: seconds that each kernel took that was tried now
        self._took: list[float] = []

    def ask(self, name: str, shown: str, left: int, spec: Callable[[], BootSpec]) -> Step:
        """What one kernel is.

        :param name: names it in the log.
        :param shown: names it in the line about it.
        :param left: about how many more will be asked after this one.
        :param spec: gives the kernel.
        :raises HarnessError: see :meth:`harness.bisect.trial.Trial.of`. Nothing is kept of the kernel then.
        """
        known = self._journal.steps.get(name)
        step = known or self._trial.of(name, spec())
        if not known:
            self._took.append(step.seconds)
            self._journal.add(step)
        time = "from the log" if known else clock(step.seconds)
        self._tell(f"{shown}: {step.state} ({time}): {step.message}{self._left(left)}")
        return step

    def _left(self, steps: int) -> str:
        if steps <= 0:
            return ""
        how = f"about {steps} more" if steps > 1 else "one more"
        # The first build from scratch says little about the others.
        minutes = f", {clock(steps * median(self._took))}" if self._took else ""
        return f" [{how}{minutes}]"
