# SPDX-License-Identifier: GPL-2.0
"""``harness cache``: what the caches hold, and that nothing in use is removed."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from harness.commands import cli
from harness.commands.cache import age, table
from harness.commands.numbers import ago, size
from harness.guests.template import RECORD
from harness.guests.template_store import TemplateStore
from harness.host import pruning
from harness.host.cache import Cache
from harness.host.pruning import Kept
from harness.paths import PROJECT

DAY = 86400.0

#: Holds a lock until its standard input ends.
HOLDER = """
import fcntl, sys
from pathlib import Path
from harness.host.cache import Cache
what, path = sys.argv[1:]
if what == "entry":
    Cache(Path(path).parents[2]).hold(Path(path))
else:
    file = open(path)
    fcntl.flock(file, fcntl.LOCK_SH if what == "shared" else fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process(what: str, path: Path) -> Iterator[None]:
    """Another process has locked a file, or uses an entry."""
    command = [sys.executable, "-c", HOLDER, what, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield
        process.stdin.close()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache" / "mremap-harness")


def entry(cache: Cache, kind: str, key: str, days: float) -> Path:
    """An entry that was last used some days ago."""
    path = cache.file(kind, key, lambda path: path.write_bytes(bytes(100_000)) and None)
    set_age(path.parent / "manifest.json", days)
    return path


def set_age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then), follow_symlinks=False)


def store(cache: Cache, name: str, days: float) -> Path:
    """The source of a kernel that was last built some days ago."""
    top = cache.root / "sources" / name
    for path in ("git/HEAD", "tree/Makefile", "tree/out-x86_64-1/vmlinux", "index", "lock", "lock-snapshot"):
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text("text")
    for path in (*top.rglob("*"), top):
        set_age(path, days)
    return top


def template(days: float) -> Path:
    top = TemplateStore().root / "0123"
    top.mkdir(parents=True)
    (top / RECORD).write_text("{}")
    (top / "ram0").write_bytes(bytes(4096))
    set_age(top / RECORD, days)
    return top


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.guests.template_store._default_root", lambda: tmp_path / "templates")


def prune(cache: Cache, days: float) -> list[str]:
    """What was removed."""
    before = time.time() - days * DAY
    return [each.name for each in pruning.kept(cache) if each.remove is not None and each.remove(before)]


# --- what is there ---------------------------------------------------------------------------------------------------


def test_entries_and_stores_are_listed_with_their_size_and_last_use(cache: Cache) -> None:
    entry(cache, "initrds", "one", days=3)
    store(cache, "linux-source-7.3", days=5)
    (cache.root / "ccache/0").mkdir(parents=True)
    found = {each.kind: each for each in pruning.kept(cache)}
    assert set(found) == {"initrds", "sources", "ccache"}, "the directory of locks is not listed"
    assert 100_000 <= found["initrds"].size < 200_000
    assert time.time() - found["initrds"].used == pytest.approx(3 * DAY, abs=60)
    assert time.time() - found["sources"].used == pytest.approx(5 * DAY, abs=60)
    assert found["ccache"].remove is None, "ccache keeps its directory small by itself"


def test_using_an_entry_makes_it_young(cache: Cache) -> None:
    path = entry(cache, "initrds", "one", days=40)
    time.sleep(0.05)
    cache.get("initrds", "one")  # from now on stat alone speaks, and the manifest is not written again
    set_age(path.parent / "manifest.json", 40)
    assert cache.get("initrds", "one") == path.parent / "data"
    assert prune(cache, days=30) == []
    set_age(path.parent / "manifest.json", 40)
    assert prune(cache, days=30) == ["one"], "without a use it is old"


def test_taking_the_lock_of_a_store_makes_it_young(cache: Cache) -> None:
    from harness.build.source import SourceStore

    top = store(cache, "linux-source-7.3", days=40)
    with SourceStore(top).locked():
        pass
    assert prune(cache, days=30) == []


# --- what is removed -------------------------------------------------------------------------------------------------


def test_only_what_is_old_is_removed(cache: Cache) -> None:
    old, young = entry(cache, "initrds", "old", days=31), entry(cache, "initrds", "young", days=29)
    assert prune(cache, days=30) == ["old"]
    assert not old.parent.exists()
    assert young.exists()
    assert [each.name for each in (cache.root / "initrds").iterdir()] == ["young"], "nothing is left half removed"


def test_an_entry_that_was_removed_is_made_again(cache: Cache) -> None:
    entry(cache, "initrds", "old", days=31)
    prune(cache, days=30)
    assert cache.file("initrds", "old", lambda path: path.write_text("again") and None).read_text() == "again"


def test_an_entry_that_another_process_uses_stays(cache: Cache) -> None:
    path = entry(cache, "initrds", "old", days=31)
    with another_process("entry", path):
        assert prune(cache, days=30) == []
        assert path.exists()
    assert prune(cache, days=30) == ["old"]


def test_an_entry_that_another_process_makes_anew_stays(cache: Cache) -> None:
    path = entry(cache, "initrds", "old", days=31)
    with another_process("exclusive", cache.lock_of(path.parent)):
        assert prune(cache, days=30) == []
    assert prune(cache, days=30) == ["old"]


def test_an_entry_that_was_used_since_it_was_listed_stays(cache: Cache) -> None:
    path = entry(cache, "initrds", "old", days=31)
    (listed,) = pruning.kept(cache)
    cache.get("initrds", "old")
    assert listed.remove is not None
    assert not listed.remove(time.time() - 30 * DAY)
    assert path.exists()


@pytest.mark.parametrize("lock", ["lock", "lock-snapshot"])
def test_a_store_is_emptied_unless_a_build_has_its_lock_and_the_locks_stay(cache: Cache, lock: str) -> None:
    top = store(cache, "linux-source-7.3", days=40)
    with another_process("exclusive", top / lock):
        assert prune(cache, days=30) == []
        assert (top / "git/HEAD").exists()
    assert prune(cache, days=30) == ["linux-source-7.3"]
    assert sorted(each.name for each in top.iterdir()) == ["lock", "lock-snapshot"]
    assert pruning.kept(cache) == [], "an emptied store is not listed"


def test_a_template_that_a_run_uses_stays(templates: None) -> None:
    top = template(days=3)
    (kept,) = TemplateStore().kept()
    assert kept.remove is not None
    before = time.time() - 2 * DAY
    with another_process("shared", top / RECORD):
        assert not kept.remove(before)
    assert not kept.remove(time.time() - 4 * DAY), "it is younger"
    assert kept.remove(before)
    assert not top.exists()


def test_holding_what_was_removed_says_what_to_do(cache: Cache) -> None:
    path = entry(cache, "initrds", "old", days=31)
    prune(cache, days=30)
    with pytest.raises(Exception, match="was removed while this run began: start it again"):
        cache.hold(path)


def test_holding_waits_for_a_removal_that_is_under_way(cache: Cache) -> None:
    path = entry(cache, "initrds", "old", days=31)
    lock = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)  # as the removal has it
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(cache.hold, path)
        time.sleep(0.2)
        assert not held.done()
        shutil.rmtree(path.parent)
        os.close(lock)
        assert "was removed" in str(held.exception(timeout=30))


def test_a_kernel_outside_of_the_cache_needs_no_lock(cache: Cache, tmp_path: Path) -> None:
    cache.hold(tmp_path / "linux/arch/x86/boot/bzImage")


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [("1h", 3600), ("7d", 7 * DAY), ("4w", 28 * DAY)])
def test_ages(text: str, seconds: float) -> None:
    assert age(text) == seconds


@pytest.mark.parametrize("text", ["", "0d", "-1d", "7", "1y", "1.5d", "99999w"])
def test_no_ages(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["cache", f"--prune={text}"])
    assert left.value.code == 2
    assert "--prune" in capsys.readouterr().err


def test_sizes_and_times_are_for_people() -> None:
    assert [size(each) for each in (0, 17_000, 2_500_000, 1_250_000_000)] == ["0 kB", "17 kB", "2 MB", "1.2 GB"]
    assert [ago(each) for each in (-5, 59, 60, 7200, 3 * DAY)] == [
        "now",
        "now",
        "1 minute ago",
        "2 hours ago",
        "3 days ago",
    ]


def test_the_table_has_a_line_for_each_kind() -> None:
    found = [
        Kept("initrds", "a", 1_000_000, 0.0, lambda before: True),
        Kept("initrds", "b", 2_000_000, 3 * DAY, lambda before: True),
        Kept("new", "c", 4_000_000, 3 * DAY, lambda before: True),
    ]
    _, initrds, new, every = table(found, 4 * DAY)
    assert initrds.split("  (")[0].split() == ["initrds", "2", "3", "MB", "1", "day", "ago", "to", "4", "days", "ago"]
    assert new.split() == ["new", "1", "4", "MB", "1", "day", "ago"]
    assert every.split() == ["all", "7", "MB"]


def test_the_command_shows_prunes_and_says_so(
    templates: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = Cache()
    assert cli.main(["cache"]) == 0
    assert "the caches are empty" in capsys.readouterr().out
    used, _ = entry(cache, "initrds", "used", days=8), entry(cache, "initrds", "old", days=8)
    template(days=8)
    with another_process("entry", used):
        assert cli.main(["cache"]) == 0
        assert "8 days ago" in capsys.readouterr().out
        assert cli.main(["cache", "--prune"]) == 0
        assert "nothing is that old" in capsys.readouterr().out
        assert cli.main(["cache", "--prune=7d"]) == 0
    told = capsys.readouterr().out
    assert "removed 1 of initrds: " in told
    assert "left 1 of initrds, which are in use" in told
    assert "removed 1 of templates: " in told
    assert str(cache.root) in told


def test_every_kind_of_the_cache_is_described() -> None:
    """A kind is the first argument of Cache.file, tree and get."""
    import re

    from harness.commands.cache import _WHAT

    text = "\n".join(path.read_text() for path in (PROJECT / "harness").rglob("*.py"))
    kinds = set(re.findall(r"cache\.(?:file|tree|get)\(\s*\"([a-z]+)\"", text))
    assert len(kinds) > 3
    assert kinds <= set(_WHAT), "harness/commands/cache.py describes each kind"
