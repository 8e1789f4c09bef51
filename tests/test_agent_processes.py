# SPDX-License-Identifier: GPL-2.0
"""What the agent reads in /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.agent.processes import kernel_thread, state_of


def test_a_process_that_ends_meanwhile_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"7": "ksmd\n", "8": "khugepaged\n"}
    for pid, name in names.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "comm").write_text(name)
    seen = [tmp_path / pid / "comm" for pid in ("6", *names)]
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: iter(seen))
    assert kernel_thread("khugepaged") == 8
    assert kernel_thread("kswapd0") is None


def test_the_state_of_a_process_is_a_letter_and_nothing_once_it_is_gone() -> None:
    assert state_of(os.getpid()) == "R"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert state_of(process.pid) in ("R", "S", "D")
    assert state_of(process.pid) == ""
