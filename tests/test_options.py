# SPDX-License-Identifier: GPL-2.0
"""The command that shows a result again names the options that the result depends on."""

from __future__ import annotations

from typing import Any

from harness import options


def again(**given: Any) -> str:
    """For a run with these options, and the others as they are by default."""
    values = {each.name: each.default for each in options.OPTIONS} | {
        f"--{name.replace('_', '-')}": value for name, value in given.items()
    }
    return options.again(values.__getitem__)


def test_a_run_without_options_needs_none() -> None:
    assert again() == ""


def test_what_shapes_the_guest_is_repeated() -> None:
    assert again(append="a=1 b", guest_cpus=2, icount=True) == " --append='a=1 b' --guest-cpus=2 --icount"


def test_what_shapes_the_test_is_repeated() -> None:
    assert again(race_seconds=100.0, race_seed=7) == " --race-seconds=100.0 --race-seed=7"
    assert again(explore=200, explore_seed=3) == " --explore=200 --explore-seed=3"


def test_what_only_says_where_results_go_is_left_out() -> None:
    assert again(results="here.jsonl", keep=True, artifacts="there") == ""
