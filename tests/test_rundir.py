# SPDX-License-Identifier: GPL-2.0
"""The directory of a running machine is removed with its owner, or at the latest by the next run."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.host.rundir import RunDirectory, sweep

#: makes a run directory in TMPDIR, says so, and waits to be killed
OWNER = """
import sys, time
from harness.host.rundir import RunDirectory
directory = RunDirectory()
(directory.path / "console").write_text("last words")
print(directory.path, flush=True)
time.sleep(60)
"""


def test_a_run_directory_is_private_and_short() -> None:
    directory = RunDirectory()
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    assert len(str(directory.path / "monitor")) < 108
    directory.remove()
    directory.remove()
    assert not directory.path.exists()


def test_files_may_outlive_their_owner_until_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    directory = RunDirectory()
    directory.remove(keep_files=True)
    assert directory.path.exists()
    sweep(tmp_path, grace=0)
    assert not directory.path.exists()


def test_what_a_killed_run_left_is_removed_and_what_a_live_one_has_is_not(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], env=os.environ | {"TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        directory = Path(owner.stdout.readline().strip())
        sweep(tmp_path, grace=0)
        assert (directory / "console").read_text() == "last words"
        owner.kill()
        owner.wait()
        sweep(tmp_path, grace=60)
        assert directory.exists()  # its owner might be about to lock it
        sweep(tmp_path, grace=0)
        assert not directory.exists()


def test_a_sweep_leaves_alone_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "somebody-elses").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "precious").touch()
    (tmp_path / "mremap-harness-link").symlink_to(tmp_path / "target")
    (tmp_path / "mremap-harness-file").touch()
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 1000, time.time() - 1000), follow_symlinks=False)
    sweep(tmp_path)
    assert (tmp_path / "target" / "precious").exists()
    assert (tmp_path / "somebody-elses").exists()
    assert (tmp_path / "mremap-harness-file").exists()
