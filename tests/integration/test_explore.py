# SPDX-License-Identifier: GPL-2.0
"""``harness explore`` on real kernels: one that is right, and one that loses pages."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness import paths
from harness.explore.story import story
from harness.explore.write_c import write_c
from harness.explore.write_test import write_test
from harness.programs.language import Program, from_json
from tests.lab import KERNEL, Lab

#: a kernel that loses pages: docs/explore.md says which bug it has
BROKEN = "debian:6.17"

LOST = """{
  "mremap-program": 1,
  "operations": [
    {"kind": "map", "near": 2, "arg": 2},
    {"kind": "write"},
    {"kind": "move-dontunmap", "near": 1},
    {"kind": "move-shrink", "to": "home"}
  ]
}
"""


def _command(*args: str) -> list[str]:
    return [sys.executable, "-m", "harness.commands.cli", *args]


def _explore(*args: str, kernel: str = KERNEL) -> subprocess.CompletedProcess[str]:
    argv = _command("explore", f"--kernel={kernel}", *args)
    return subprocess.run(argv, cwd=paths.PROJECT, capture_output=True, text=True, check=False)


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    path = tmp_path / "lost.json"
    path.write_text(LOST)
    return path


def test_a_kernel_that_is_right_has_no_failures(tmp_path: Path) -> None:
    done = _explore("--minutes=0.3", "--seed=1", f"--save={tmp_path / 'explored'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Left out, because this kernel lacks it: move-relocate" in done.stdout
    assert "No failure was found." in done.stdout
    programs, walked = re.search(r"(\d+) programs, .* (\d+) pages were seen", done.stdout).groups()  # type: ignore[union-attr]
    assert int(programs) >= 250
    assert int(walked) >= int(programs)
    assert not (tmp_path / "explored").exists()


def test_a_program_is_replayed(lost: Path) -> None:
    done = _explore(f"--replay={lost}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 move-dontunmap A place 1 as A" in done.stdout
    assert "It passes" in done.stdout


def test_a_kernel_that_loses_a_page_is_found_out_and_c_shows_it_too(lost: Path, tmp_path: Path) -> None:
    done = _explore(f"--replay={lost}", kernel=BROKEN)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILURE (walk): page 16 does not move to another node" in done.stdout
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    program: Program = from_json(LOST)
    source = tmp_path / "lost.c"
    source.write_text(write_c(story(program, []), "page 16 is lost", "6.17", "lost"))
    options = ["-Wall", "-Wextra", "-Werror", "-static", "-s", "-o"]
    subprocess.run([compiler, *options, tmp_path / "lost", source], check=True)
    assert _in_guest(tmp_path / "lost", BROKEN) == (1, "The kernel is wrong.")
    assert _in_guest(tmp_path / "lost", KERNEL) == (0, "All is well.")


def test_the_guest_test_that_is_written_shows_it_too() -> None:
    with Lab() as lab:
        text = write_test(story(from_json(LOST), []), "page 16 is lost", "6.17", "lost")
        path = lab.write("test_lost.py", text)
        assert lab.run(path, kernel=KERNEL)["test_lost"].outcome == "passed"
        broken = lab.run(path, kernel=BROKEN)["test_lost"]
    assert broken.outcome == "failure"
    assert "the kernel's reverse walk does not find page 0 of the mapping" in broken.message


def _in_guest(program: Path, kernel: str) -> tuple[int, str]:
    """Run a program in a guest; returns its exit status and the last line that it says."""
    argv = _command("shell", f"--kernel={kernel}", "cat >/tmp/program && chmod +x /tmp/program && exec /tmp/program")
    with open(program, "rb") as file:
        done = subprocess.run(argv, cwd=paths.PROJECT, stdin=file, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()[-1] if done.stdout else done.stderr


def test_an_interruption_ends_it_soon_and_says_how_far_it_was() -> None:
    argv = _command("explore", f"--kernel={KERNEL}", "--minutes=10", "--seed=1")
    # Whoever runs us in the background may have had SIGINT ignored, which a process inherits.
    child = subprocess.Popen(
        argv,
        cwd=paths.PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("Seed"):
            break
    time.sleep(2)
    began = time.monotonic()
    child.send_signal(signal.SIGINT)
    rest, _ = child.communicate(timeout=60)
    assert child.returncode == 2
    assert "programs, " in rest
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("text", "says"),
    [("no program", "not JSON"), ('{"mremap-program": 2}', "format version 2")],
    ids=["foreign", "new"],
)
def test_a_file_that_is_no_program_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "program.json"
    path.write_text(text)
    done = _explore(f"--replay={path}")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.debuginfo
def test_the_audit_says_what_the_walk_did_not_find() -> None:
    pytest.importorskip("drgn", reason="needs drgn: install the extra 'audit'")
    program = paths.PROJECT / "guest_tests" / "programs" / "ksm-swapcache-move.json"
    done = _explore(f"--replay={program}", "--audit", kernel="debian:7.3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILURE (walk): page " in done.stdout
    assert "The audit says:\nunreachable mapping: " in done.stdout
