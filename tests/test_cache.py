# SPDX-License-Identifier: GPL-2.0
"""A cache entry is made once, appears complete, and is made again if its content has changed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import HostError
from harness.host.cache import Cache, locked
from tests.lab import wait_until

#: makes an entry slowly, noting each start: argv is the cache, the note, and the seconds it takes
SLOW_MAKER = """
import sys, time
from pathlib import Path
from harness.host.cache import Cache
def make(path):
    with open(sys.argv[2], "a") as note:
        note.write("made\\n")
    path.write_bytes(b"half")
    time.sleep(float(sys.argv[3]))
    path.write_bytes(b"whole")
print(Cache(Path(sys.argv[1])).file("things", "one", make).read_text())
"""


class Maker:
    """Writes a text, and counts how often it was asked to."""

    def __init__(self, text: str = "content") -> None:
        self.text = text
        self.calls = 0

    def __call__(self, path: Path) -> None:
        self.calls += 1
        path.write_text(self.text)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_an_entry_is_made_once(cache: Cache) -> None:
    maker = Maker()
    first, second = (cache.file("things", "one", maker) for _ in range(2))
    assert (first.read_text(), second, maker.calls) == ("content", first, 1)


def test_a_tree_is_made_once(cache: Cache) -> None:
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        (path / "sub").mkdir()
        (path / "sub/file").write_text("x")
        (path / "link").symlink_to("nowhere")

    first, second = (cache.tree("things", "one", make) for _ in range(2))
    assert (first / "sub/file").read_text() == "x"
    assert (second, len(calls)) == (first, 1)


def test_get_makes_nothing(cache: Cache) -> None:
    assert cache.get("things", "one") is None
    path = cache.file("things", "one", Maker())
    assert cache.get("things", "one") == path


@pytest.mark.parametrize("key", ["a/b", "../escape", "", ".hidden", "x" * 300, "two words"])
def test_any_key_stays_inside_the_cache(cache: Cache, key: str) -> None:
    path = cache.file("things", key, Maker()).resolve()
    assert path.parent.parent == (cache.root / "things").resolve()


def test_keys_that_look_alike_once_cleaned_do_not_meet(cache: Cache) -> None:
    assert cache.file("things", "a/b", Maker("1")) != cache.file("things", "a b", Maker("2"))


def test_the_digest_is_that_of_the_content(cache: Cache) -> None:
    path = cache.file("things", "one", Maker("content"))
    assert cache.digest(path) == "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"


def flip(path: Path) -> None:
    """Change a byte, keep size and mtime."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def truncate(path: Path) -> None:
    os.truncate(path, 3)


def ruin_manifest(path: Path) -> None:
    (path.parent / "manifest.json").write_text('{"files": 3')


@pytest.mark.parametrize("damage", [flip, truncate, os.unlink, ruin_manifest])
@pytest.mark.parametrize("settled", [False, True], ids=["at once", "later"])
def test_a_damaged_entry_is_made_again(
    cache: Cache, damage: Callable[[Path], None], settled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    maker = Maker()
    path = cache.file("things", "one", maker)
    if settled:
        time.sleep(0.05)
        cache.file("things", "one", maker)  # the check that lets stat alone speak from now on
    damage(path)
    assert cache.file("things", "one", maker).read_text() == "content"
    assert maker.calls == 2
    assert "does not match its recorded digest" in caplog.text


@pytest.mark.parametrize("change", [{"hashed": 0}, {"boot": "another"}], ids=["a day ago", "before a reboot"])
def test_damage_below_the_file_system_is_found_when_the_last_full_check_is_old(
    cache: Cache, change: dict[str, object]
) -> None:
    maker = Maker()
    path = cache.file("things", "one", maker)
    flip(path)
    # As if the disk had changed the bytes: the manifest knows the very inode that is there.
    info = path.stat()
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"]["data"]["stat"] = [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]
    manifest["hashed"] = time.time_ns() + 10**8
    (path.parent / "manifest.json").write_text(json.dumps(manifest | change))
    cache.file("things", "one", maker)
    assert maker.calls == 2


def test_an_untouched_entry_is_not_read_again(cache: Cache) -> None:
    """Seen by giving the manifest a digest that no content has: only hashing can notice."""
    maker = Maker()
    path = cache.file("things", "one", maker)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    manifest["files"]["data"]["sha256"] = "0" * 64
    time.sleep(0.05)
    (path.parent / "manifest.json").write_text(json.dumps(manifest | {"hashed": time.time_ns()}))
    cache.file("things", "one", maker)
    assert maker.calls == 1


def test_a_copied_entry_is_checked_and_kept(cache: Cache) -> None:
    maker = Maker()
    path = cache.file("things", "one", maker)
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)  # another inode
    cache.file("things", "one", maker)
    assert maker.calls == 1


def test_a_maker_that_fails_leaves_nothing(cache: Cache) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache.file("things", "one", fail)
    assert list((cache.root / "things").iterdir()) == []
    assert cache.file("things", "one", Maker()).read_text() == "content"


def test_a_full_disk_is_a_sentence_that_says_where_and_what_to_do(cache: Cache) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        Path("/dev/full").write_text("one more byte")

    with pytest.raises(HostError, match=r"full file system.*XDG_CACHE_HOME") as caught:
        cache.file("things", "one", fill)
    assert str(cache.root) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((cache.root / "things").iterdir()) == []


def start_maker(cache: Cache, note: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_MAKER, str(cache.root), str(note), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def test_two_runs_at_once_make_a_cold_entry_once(cache: Cache, tmp_path: Path) -> None:
    note = tmp_path / "note"
    runs = [start_maker(cache, note, 0.5) for _ in range(2)]
    assert [run.communicate(timeout=60)[0] for run in runs] == ["whole\n", "whole\n"]
    assert note.read_text() == "made\n"


def test_a_run_killed_while_making_leaves_no_half_entry(cache: Cache, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with start_maker(cache, note, 60) as run:
        wait_until(note.exists, "the maker to start")
        assert cache.get("things", "one") is None
        run.send_signal(signal.SIGKILL)
    leftovers = list((cache.root / "things").iterdir())
    assert [path.name for path in leftovers] == [".new-one"]
    # Whatever is made next in that kind sweeps up.
    cache.file("things", "two", Maker())
    assert [path.name for path in (cache.root / "things").iterdir()] == ["two"]
    assert cache.file("things", "one", Maker("whole")).read_text() == "whole"


def test_what_another_run_is_making_is_not_swept_up(cache: Cache, tmp_path: Path) -> None:
    note = tmp_path / "note"
    with start_maker(cache, note, 1) as run:
        wait_until(note.exists, "the maker to start")
        cache.file("things", "two", Maker())
        assert run.communicate(timeout=60)[0] == "whole\n"


def test_a_run_that_waits_for_another_says_so_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so again and again: a log is not told what is said within the first seconds."""
    monkeypatch.setattr("harness.host.cache._TELL_EVERY", 0.1)
    said: list[str] = []

    def second() -> None:
        with locked(tmp_path / "lock", "the first", said.append):
            said.append("locked")

    waiter = threading.Thread(target=second)
    with locked(tmp_path / "lock", "the first"):
        waiter.start()
        wait_until(lambda: len(said) >= 3, "the second to say three times that it waits")
    waiter.join(30)
    assert all(each.startswith("waiting for the first, ") for each in said[:-1])
    assert said[-1] == "locked"
