# SPDX-License-Identifier: GPL-2.0
"""Runs programs for the host: a process of its own for each batch, so that a program can only harm its batch.

The host sends ``{"programs": [...], "thorough": bool, "outcomes": bool, "rival": SEED or null, "audit": bool}``, or
``{"plans": [...]}`` for programs that it has worked out (:mod:`harness.explore.plan`). The answers are, in this order:

- ``{"at": N}`` before the program with number N runs, so that a program that ends the guest is known; for plans, before
  each tenth, because it takes half as long as a plan
- ``{"outcome": [errors, mappings]}`` after each program, if the order says ``"outcomes": true``
- ``{"audit": [pid, ...]}`` after some programs, if the order says ``"audit": true``. Their processes and memory are
  still there. The host answers ``{"stop": bool}``; the batch ends with that program if it is true
- ``{"failed": {...}}`` if an oracle found something wrong; the batch ends with that
- ``{"died": "signal 11"}`` in place of the next, if the process ended in the middle of a program
- ``{"done": N, "counts": [...], "errors": [...], "untrue": [...], "walked": N, "unable": N}``: how many programs ran,
  what became of the operations, and of each operation of the last program; the numbers of the plans that did not come
  true; how many pages were seen to move, and how many programs the walks could say nothing of
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, Final

from guest_tests.explorer.children import ending
from guest_tests.explorer.executor import Executor
from guest_tests.explorer.kinds import kinds
from guest_tests.explorer.rivals import Rival
from guest_tests.mm import ksm, memcg
from guest_tests.support.folios import advised_folios
from harness.agent.session import Exchange
from harness.programs import language
from harness.programs.language import KINDS

#: one plan in so many is announced
ANNOUNCED: Final = 10
#: one program in so many has its layout checked, which takes as long as a program
_LAYOUT_EVERY: Final = 16
#: One program in so many is audited, and the last one of an order. An audit takes 0.3 s, as long as a hundred programs.
_AUDIT_EVERY: Final = 100


def main(exchange: Exchange, _data: dict[str, Any]) -> None:
    """Answer the host until it sends an empty order."""
    exchange.say({"kinds": kinds()})
    with settings():
        _serve(exchange)


@contextmanager
def settings() -> Iterator[None]:
    """The system as programs need it: large folios where they are advised, and a ksmd that scans when it is told."""
    with advised_folios(), ksm.Ksm() if ksm.available() else nullcontext():
        yield


@contextmanager
def own_group() -> Iterator[None]:
    """A control group for this process, which programs reclaim; none if the kernel has no such groups."""
    with ExitStack() as stack:
        if memcg.available():
            stack.enter_context(memcg.Memcg("explorer")).enter()
        yield


def _serve(exchange: Exchange) -> None:
    while order := exchange.hear():
        pid = os.fork()
        if pid == 0:
            try:
                _run_batch(exchange, order)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        if status:
            exchange.say({"died": ending(status)})


def _run_batch(exchange: Exchange, order: dict[str, Any]) -> None:
    gc.disable()  # no program leaves cycles behind that matter to a batch
    executor = Executor()
    with own_group():
        done = _run_order(exchange, executor, order)
    exchange.say({**done, "walked": executor.walker.moved, "unable": executor.walker.unable})


def _run_order(exchange: Exchange, executor: Executor, order: dict[str, Any]) -> dict[str, Any]:
    if "plans" in order:
        return _run_plans(exchange.say, executor, order["plans"])
    wanted = {name: order[name] is True for name in ("thorough", "outcomes", "audit")}
    with nullcontext() if order["rival"] is None else Rival(order["rival"]) as rival:
        return _run_programs(exchange, executor, order["programs"], rival, **wanted)


def _run_plans(say: Callable[[dict[str, Any]], None], executor: Executor, plans: list[Any]) -> dict[str, Any]:
    untrue = []
    for number, data in enumerate(plans):
        if number % ANNOUNCED == 0:
            say({"at": number})
        if not executor.run_plan(data):
            untrue.append(number)
    return {"done": len(plans), "counts": [], "errors": [], "untrue": untrue}


def _run_programs(
    exchange: Exchange,
    executor: Executor,
    programs: list[Any],
    rival: Rival | None,
    *,
    thorough: bool,
    outcomes: bool,
    audit: bool,
) -> dict[str, Any]:
    counts: Counter[tuple[int, int]] = Counter()
    errors: list[int] = []
    done = 0
    say = exchange.say
    stopped = False

    def ask(pids: list[int]) -> None:
        nonlocal stopped
        say({"audit": pids})
        stopped = exchange.hear().get("stop") is True

    for number, data in enumerate(programs):
        program = language.from_wire(data)
        say({"at": number})
        layout = number % _LAYOUT_EVERY == 0
        audited = audit and ((number + 1) % _AUDIT_EVERY == 0 or number + 1 == len(programs))
        outcome = executor.run(
            program, thorough=thorough, layout=layout, mappings=outcomes, rival=rival, audit=ask if audited else None
        )
        if outcomes:
            say({"outcome": [outcome.errors, outcome.mappings]})
        errors = outcome.errors
        counts.update((wire[0], error) for wire, error in zip(program, errors, strict=False))
        done += 1
        if outcome.failure is not None:
            say({"failed": asdict(outcome.failure)})
        if outcome.failure is not None or stopped:
            break
    table = [[KINDS[kind], error, count] for (kind, error), count in counts.items()]
    return {"done": done, "counts": table, "errors": errors, "untrue": []}
