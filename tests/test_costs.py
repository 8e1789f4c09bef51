# SPDX-License-Identifier: GPL-2.0
"""The table of costs shows what was counted. Whatever is not a valid record from a guest is left out."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from harness.arch import ARM64, X86_64, host
from harness.machine import accelerator
from harness.report.costs import PROPERTY, Clock, Cost, Memory, records, sections, table
from harness.report.results import Facts, Outcome, Result

CLOCK = {"step": "clock", "resolution": 1, "overhead": 400, "interrupts": 6100}


def move(instructions: int = 1000, flags: int = 0, **more: Any) -> dict[str, Any]:
    told = {"step": "move", "kind": "small pages", "size": 1 << 20, "alignment": "page", "flags": flags}
    return told | {"pages": 256, "instructions": instructions, "median": instructions + 1} | more


def missing(flags: int) -> dict[str, Any]:
    told = {"step": "move", "kind": "small pages", "size": 1 << 20, "alignment": "page", "flags": flags}
    return told | {"missing": "EINVAL"}


def result(label: str, *values: object) -> Result:
    """What a test that recorded these values leaves."""
    return Result(Facts(label=label, test="a.py::test_a"), Outcome.PASSED, "", [(PROPERTY, each) for each in values])


def lines(**kernels: list[dict[str, Any]]) -> list[str]:
    return table({label: records([result(label, *values)], label) for label, values in kernels.items()})


def test_a_cell_is_the_cost_of_a_page_and_how_many_times_the_first_kernels_plain_move() -> None:
    said = lines(old=[move(25600)], new=[move(25600 * 2), move(25600 * 300, 8), move(25856, 16)])
    (row,) = [line for line in said if line.startswith("small pages")]
    assert row.split()[2:] == ["page", "1", "MiB", "100", "x1.00", "200", "x2.00", "30000", "x300", "101", "x1.01"]
    assert "a plain move on old" in said[0]


def test_kernels_and_flags_stand_above_their_columns() -> None:
    top, flags, row = lines(old=[move()], new=[move(), move(flags=8), move(flags=16)])[2:5]
    assert top.split() == ["old", "new"]
    assert flags.split() == ["memory", "aligned", "to", "size", "plain", "plain", "RELOCATE", "MUST"]
    assert len(top) == len(flags) == len(row)


def test_a_long_name_makes_its_column_wider() -> None:
    top, flags, row = lines(**{"linux-v7.3-rc1-x86_64": [move()], "new": [move()]})[2:5]
    assert top.split() == ["linux-v7.3-rc1-x86_64", "new"]
    assert len(top) == len(flags) == len(row)


def test_flags_that_a_kernel_does_not_know_are_told_in_words() -> None:
    said = lines(old=[move(), missing(8), missing(16)], new=[move(), move(flags=8)])
    assert "old does not know flag 8 (RELOCATE): EINVAL." in said
    assert "old does not know flag 16 (MUST): EINVAL." in said
    assert not any(line.startswith("new does not know") for line in said)
    (row,) = [line for line in said if line.startswith("small pages")]
    assert "EINVAL" not in row


def test_without_a_plain_move_on_the_first_kernel_there_are_no_ratios() -> None:
    (row,) = [line for line in lines(old=[move(flags=8)], new=[move()]) if line.startswith("small pages")]
    assert row.split()[-2:] == ["3.91", "3.91"]


def test_what_was_not_counted_is_a_dash() -> None:
    said = lines(old=[move()], new=[move(kind="huge page", size=2 << 20)])
    small, huge = [line.split() for line in said if line.startswith(("small", "huge"))]
    assert small[-3:] == ["3.91", "x1.00", "-"]
    assert huge[-2:] == ["-", "3.91"]


def test_rows_keep_their_order_where_a_kernel_lacks_one() -> None:
    small, large, other = (move(size=size) | {"kind": kind} for size, kind in ((1, "a"), (2, "a"), (1, "b")))
    said = lines(old=[large, other], new=[small, large, other])[4:7]
    assert [line.split()[:3] for line in said] == [["a", "page", "1"], ["a", "page", "2"], ["b", "page", "1"]]


def test_how_far_a_move_is_from_the_cheapest_is_told() -> None:
    said = "\n".join(lines(old=[move(1000), move(1000, size=8192, median=1500)]))
    assert "The median is at most 50% above it (small pages, 8 KiB, page)." in said


def test_the_instrument_is_described() -> None:
    assert lines(old=[CLOCK]) == [
        "old: instructions are counted exactly. The 400 instructions of a call that is refused at once are subtracted. "
        "Interrupts add 0.6 % in the long run."
    ]
    assert "in steps of 16" in lines(old=[CLOCK | {"resolution": 16}])[0]


def test_architectures_are_not_compared() -> None:
    kernels = {"a-x86": X86_64, "a-arm": ARM64, "b-x86": X86_64}
    said = dict(sections([result(label, move()) for label in kernels], kernels))
    assert list(said) == ["What does a move cost on x86_64?", "What does a move cost on arm64?"]
    assert "b-x86" in said["What does a move cost on x86_64?"][2]
    assert "b-x86" not in "\n".join(said["What does a move cost on arm64?"])


def test_silence_is_no_table() -> None:
    assert list(sections([result("old")], {"old": X86_64})) == []


def test_records_are_those_of_one_kernel() -> None:
    seen = [
        result("old", CLOCK, move()),
        result("older", move(7)),
        result("old", missing(8)),
    ]
    memory = Memory("small pages", 1 << 20, "page")
    assert records(seen, "old") == [
        Clock(1, 400, 6100),
        Cost(memory, 0, "", 256, 1000, 1001),
        Cost(memory, 8, missing="EINVAL"),
    ]


@pytest.mark.parametrize(
    "junk",
    [
        "text",
        {},
        {"step": "walk"},
        move(flags=7),
        move(pages=0),
        move(pages="many"),
        move(instructions=-1),
        move(instructions=10**400),
        move(instructions=1.5),
        move(instructions=True),
        move(kind="x" * 1000),
        move(kind="two\nlines"),
        move(alignment=None),
        missing(8) | {"missing": ["EINVAL"]},
        {"step": "clock", "resolution": 1},
        {"step": ["clock"]},
    ],
    ids=str,
)
def test_what_is_no_record_is_left_out(junk: object) -> None:
    assert records([result("k", junk)], "k") == []


def test_a_guest_cannot_speak_to_the_terminal() -> None:
    assert "\x1b" not in "\n".join(lines(old=[move(kind="\x1b[2Jgone"), missing(8) | {"missing": "\x1b[0m"}]))


# ----------------------------------------------------------------------------------------------------------------------
# --icount


def test_instructions_are_counted_by_emulation_even_where_there_is_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: True)
    monkeypatch.setattr(accelerator, "_kvm_runs", lambda _: True)
    assert accelerator.choose(host()).name == "kvm"
    chosen = accelerator.choose(host(), icount=True)
    assert (chosen.name, chosen.reason) == ("tcg", "--icount: no other accelerator counts instructions")


def test_a_board_cannot_count() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--icount", "--kernel=ssh://root@board"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--icount needs a virtual machine" in done.stderr
