# SPDX-License-Identifier: GPL-2.0
"""Says how long programs take with and without their checks: for ``tests/benchmark_programs.py``.

The host sends ``{"plans": [...], "walks": bool, "bytes": bool}`` or ``{"programs": [...], "thorough": bool}``, again
and again. Each is answered by ``{"seconds": S, "untrue": N}``: for all of them, and how many plans did not come true,
or how many programs failed.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.explorer.serve import own_group, settings
from guest_tests.explorer.walks import Walker
from harness.agent.session import Exchange
from harness.programs import language


class _NoWalks(Walker):
    def check_plan(self, first: int, end: int) -> bool:
        return True


def main(exchange: Exchange, _data: dict[str, Any]) -> None:
    """Answer the host until it sends an empty order."""
    exchange.say({"kinds": kinds()})
    gc.disable()  # as where programs are run in earnest
    with settings(), own_group():
        executor = Executor()
        while order := exchange.hear():
            if "plans" in order:
                executor.walker.__class__ = Walker if order["walks"] else _NoWalks
                plans = order["plans"]
                if not order["bytes"]:
                    plans = [[steps, [], first, end] for steps, _, first, end in plans]
                began = time.perf_counter()
                wrong = sum(not executor.run_plan(each) for each in plans)
            else:
                executor.walker.__class__ = Walker
                programs = [language.from_wire(each) for each in order["programs"]]
                began = time.perf_counter()
                wrong = sum(executor.run(each, thorough=order["thorough"]).failure is not None for each in programs)
            exchange.say({"seconds": time.perf_counter() - began, "untrue": wrong})
