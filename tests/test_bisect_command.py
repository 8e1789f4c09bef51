# SPDX-License-Identifier: GPL-2.0
"""The exit statuses of ``harness bisect`` and ``harness bisect-step``. Toy kernels are built; nothing boots."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from harness.arch import X86_64
from harness.bisect import trial
from harness.commands import cli
from harness.debian.apt import Archive
from harness.errors import BootError, HostError
from harness.host.cache import Cache, Progress
from harness.kernels.kernel import BootSpec
from harness.matrix import executor
from harness.matrix.executor import Tally
from harness.matrix.job import Ended, Job
from harness.options import MachineOptions
from harness.paths import PROJECT
from harness.report.record import Item
from tests.kernel_files import fill
from tests.matrix_runs import ended, line
from tests.toy_kernel import PATCH, git, lay_out, programs, repository


class Toys:
    """Toy kernels in place of real ones: they are built, and their bytes decide how they boot and what they say."""

    def __init__(self) -> None:
        #: the boot image of the kernel that was made last
        self.image = b""
        #: how often each kernel was made ready
        self.made: list[str] = []

    def ready(self, spec: BootSpec, options: MachineOptions, progress: Progress) -> None:
        """Build a kernel, and boot it unless its source says that it does not."""
        cache = Cache()
        self.image = spec.resolve(cache, Archive(cache)).boot_image.read_bytes()
        self.made.append(spec.text)
        if b"SILENT" in self.image:
            raise BootError("the kernel does not reach the agent")
        if b"NO SPACE" in self.image:
            raise HostError("the disk is full")

    def results(self) -> Sequence[Item]:
        """What the tests say of it."""
        if b"SKIPS" in self.image:
            return [line("a", "skipped", message="needs KSM")]
        if b"MISSED" in self.image:
            return [line("a", "MISS", message="QEMU died")]
        return [line("a", "failed", message="lost page")] if b"LOST" in self.image else [line("a")]


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toys:
    monkeypatch.setenv("PATH", f"{programs(tmp_path / 'bin')}:{os.environ['PATH']}")
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch) -> Toys:
    """Put toys in the place of real kernels."""
    made = Toys()
    monkeypatch.setattr("platform.machine", lambda: X86_64.machine)
    monkeypatch.setattr(trial.Trial.__init__, "__kwdefaults__", {"lenient": False, "ready": made.ready})

    class Told(executor.LocalExecutor):
        """Runs no pytest."""

        def submit(self, task: Job) -> None:
            self._task = task

        def as_completed(self, tick: Callable[[], None]) -> Iterator[Ended]:
            tick()
            yield ended(self._task["name"], *made.results())

        def under_way(self) -> Mapping[str, Tally]:
            return {}

    monkeypatch.setattr(executor, "LocalExecutor", Told)
    return made


def step(tree: Path, *more: str) -> int:
    """The exit status of bisect-step."""
    return cli.main(["bisect-step", f"--tree={tree}", *more, "--", "guest_tests/test_a.py"])


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("fine\n", 0, "good"),
        ("LOST\n", 1, "bad"),
        ("BROKEN\n", 125, "does not compile: mm/ksm.c:1:1: error: BROKEN is no C"),
        ("SILENT\n", 125, "it does not boot"),
        ("MISSED\n", 125, "could not be run: QEMU died"),
        ("SKIPS\n", 125, "all of its tests skip: needs KSM"),
        ("NO SPACE\n", 128, "the disk is full"),
    ],
)
def test_a_step_exits_as_git_bisect_run_wants(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, status: int, said: str
) -> None:
    tree = lay_out(tmp_path / "linux")
    fill({tree / "mm/ksm.c": text})
    assert step(tree) == status
    told = capsys.readouterr()
    assert said in told.out + told.err


def test_a_patch_is_applied_and_one_that_does_not_apply_is_no_verdict(toys: Toys, tmp_path: Path) -> None:
    tree = lay_out(tmp_path / "linux")
    fill({tmp_path / "move.patch": PATCH, tmp_path / "other.patch": PATCH.replace("line 3", "line 4")})
    assert step(tree, f"+{tmp_path}/move.patch") == 0
    assert b"patched 33" in toys.image
    assert step(tree, f"+{tmp_path}/move.patch", f"+{tmp_path}/other.patch") == 125


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--no-such-option"], "--no-such-option"),
        (["--tree=/proc", "--", "t"], "/proc is no kernel source"),
        (["+/nowhere", "--", "t"], "no patch, mbox or directory /nowhere"),
        (["--"], "say which tests decide"),
        (["--", "--kernel=debian:"], "--kernel has no place"),
        (["--", "--expect-findings", "t"], "--expect-findings has no place"),
        (["--arch=mips", "--", "t"], "mips"),
    ],
)
def test_a_wrong_request_stops_git(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["bisect-step", *argv])
    except SystemExit as left:
        status = int(str(left.code))
    assert status == 129
    assert said in capsys.readouterr().err


def test_an_error_in_the_harness_stops_git(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toys, "results", lambda: 1 // 0)
    assert step(lay_out(tmp_path / "linux")) == 128


def test_a_full_disk_is_not_taken_for_source_that_does_not_compile(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = lay_out(tmp_path / "linux")
    text = (tree / "Makefile").read_text()
    fill({tree / "Makefile": text.replace("\tcp $< $@", "\t@echo 'cc1: No space left on device'; exit 1")})
    assert step(tree) == 128
    assert "could not build" in capsys.readouterr().err


STEP = """\
import sys
import pytest
from harness.commands import cli
from tests.test_bisect_command import install
install(pytest.MonkeyPatch())
sys.exit(cli.main(["bisect-step", "--", "guest_tests/test_a.py"]))
"""


def test_git_bisect_run_goes_by_these_statuses(
    toys: Toys, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    fill({tmp_path / "step.py": STEP})
    git(tree, "bisect", "start", "HEAD", "v1")
    said = git(tree, "bisect", "run", sys.executable, str(tmp_path / "step.py"))
    first = git(tree, "rev-parse", "bisect/bad")
    assert git(tree, "show", "--no-patch", "--format=%s", first) == "LOST a"
    assert "does not boot" in said
    assert "git bisect skip" in git(tree, "bisect", "log")


def test_git_bisect_run_stops_at_trouble_of_the_host(
    toys: Toys, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    fill({tmp_path / "step.py": STEP})
    (tmp_path / "bin/gcc").unlink()
    monkeypatch.setenv("PATH", str(without_compiler(tmp_path)))
    git(tree, "bisect", "start", "HEAD", "v1")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        git(tree, "bisect", "run", sys.executable, str(tmp_path / "step.py"))
    assert "install its compiler" in caught.value.stderr
    assert "128" in caught.value.stdout + caught.value.stderr
    log = git(tree, "bisect", "log").splitlines()
    assert not [each for each in log if each.startswith(("git bisect good", "git bisect bad", "git bisect skip"))]


def without_compiler(tmp_path: Path) -> Path:
    """A directory for PATH that has what a step runs, and no gcc."""
    directory = tmp_path / "bin"
    for name in ("git", "sh", "make", "env", "setpriv", "dirname", "uname", "sed", "cat"):
        if (found := shutil.which(name)) and not (directory / name).exists():
            (directory / name).symlink_to(found)
    return directory


# --- harness bisect --packages ---------------------------------------------------------------------------------------


@pytest.fixture
def debians(toys: Toys, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Five versions, of which the last two are bad. The list tells which were made ready."""
    made: list[str] = []

    def ready(spec: BootSpec, options: MachineOptions, progress: Progress) -> None:
        made.append(spec.text.removeprefix("debian:"))
        toys.image = b"LOST" if made[-1] in ("6.17.8", "6.18.5") else b"fine"

    monkeypatch.setattr(trial.Trial.__init__, "__kwdefaults__", {"lenient": False, "ready": ready})
    versions = ["6.12.118", "6.16.3", "6.16.12", "6.17.8", "6.18.5"]
    monkeypatch.setattr("harness.kernels.debian.packaged", lambda archive, arch: versions)
    return made


def packages(*more: str) -> int:
    """The exit status of a bisect over packages."""
    return cli.main(["bisect", *more, "--", "guest_tests/test_a.py"])


def test_the_first_bad_version_is_named_and_the_log_is_replayed(
    debians: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert packages("--packages=6..6.18") == 0
    said = capsys.readouterr().out
    assert "\nThe first bad version is 6.17.8\n" in said
    assert "5 kernels of Debian for x86_64, from 6.12.118 to 6.18.5" in said
    asked = len(debians)
    assert packages("--packages=6..6.18") == 0
    assert len(debians) == asked, "the second run asks no kernel"
    assert "from the log" in capsys.readouterr().out
    assert packages("--packages=6..6.18", "--again") == 0
    assert len(debians) == 2 * asked


def test_an_interrupted_bisect_says_that_it_goes_on(
    debians: list[str], toys: Toys, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = toys.results

    def interrupted() -> Sequence[Item]:
        if len(debians) == 3:
            raise KeyboardInterrupt
        return whole()

    with monkeypatch.context() as patch:
        patch.setattr(toys, "results", interrupted)
        assert packages("--packages=6..6.18") == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert packages("--packages=6..6.18") == 0
    assert debians[3] == debians[2], "the kernel that was interrupted is asked again, and no other"
    assert len(set(debians)) == len(debians) - 1


@pytest.mark.parametrize(
    ("argv", "status", "said"),
    [
        (["--packages=6.12..6.16"], 1, "6.16.12 is good"),
        (["--packages=6.17..6.18"], 1, "6.17.8 is bad already"),
        (["--packages=6.16"], 2, "is no range"),
        ([], 2, "--packages OLD..NEW"),
        (["--packages=6..7", "--tree=."], 2, "leave out what is for --tree"),
        (["--packages=6..7", "--preset=fast"], 2, "leave out what is for --tree"),
    ],
)
def test_what_cannot_be_bisected_is_said(
    debians: list[str], capsys: pytest.CaptureFixture[str], argv: list[str], status: int, said: str
) -> None:
    assert packages(*argv) == status
    assert said in capsys.readouterr().err


def test_a_log_of_another_question_is_left_alone(
    debians: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "bisect.jsonl"
    assert packages("--packages=6..6.18", f"--log={log}") == 0
    before = log.read_bytes()
    assert packages("--packages=6.16..6.18", f"--log={log}") == 2
    assert "another packages" in capsys.readouterr().err
    assert log.read_bytes() == before


# --- harness bisect --tree -------------------------------------------------------------------------------------------


def commit(tree: Path, text: str) -> str:
    """A commit with this in mm/ksm.c, which is its subject as well; its ID."""
    fill({tree / "mm/ksm.c": f"{text}\n"})
    git(tree, "commit", "--quiet", "--all", "-m", text)
    return git(tree, "rev-parse", "HEAD")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository. Its commits after v1: fine, does not compile, does not boot, bad ("LOST a"), bad, bad."""
    path = repository(tmp_path / "linux")
    for text in ("fine", "BROKEN", "better", "best", "LOST a", "SILENT", "LOST b", "LOST c"):
        commit(path, text)
    return path


def commits(tree: Path, *more: str, good: str = "v1", bad: str = "HEAD") -> int:
    """The exit status of a bisect over commits."""
    where = [f"--tree={tree}", f"--good={good}", f"--bad={bad}"]
    return cli.main(["bisect", *where, *more, "--", "guest_tests/test_a.py"])


def state_of(tree: Path) -> str:
    """What a bisect must not change: refs, index, work tree, and a bisect under way."""
    told = git(tree, "status", "--porcelain=v2", "--branch", "--ignored") + git(tree, "for-each-ref")
    return told + " ".join(sorted(each.name for each in (tree / ".git").iterdir()))


def test_the_first_bad_commit_is_found_past_those_without_a_verdict(
    toys: Toys, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill({tree / "mm/mremap.c": "uncommitted\n"})
    before = state_of(tree)
    assert commits(tree) == 0
    said = capsys.readouterr().out
    bad = git(tree, "show", "--no-patch", "--format=%h %s", "HEAD~3")
    assert f"\nThe first bad commit is {bad}\n" in said
    assert bad.endswith("LOST a")
    assert "Last good:" in said
    assert "best (0:0" in said.partition("Last good:")[2], "the last good commit is the parent of the first bad one"
    assert state_of(tree) == before, "the user's repository was written to"


def test_commits_that_do_not_build_or_boot_around_the_change_are_all_named(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = repository(tmp_path / "linux")
    for text in ("fine", "BROKEN", "SILENT", "LOST"):
        commit(tree, text)
    assert commits(tree) == 1
    said = capsys.readouterr().out
    listed = said.partition("because some have no verdict:\n")[2].partition("\n\n")[0]
    assert sorted(each.split()[1] for each in listed.splitlines()) == ["BROKEN", "LOST", "SILENT"]
    assert "no verdict (0:00)" in said
    assert "BROKEN is no C" in said


def test_the_first_fixed_commit_is_found(toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = repository(tmp_path / "linux")
    for text in ("LOST a", "LOST b", "SILENT", "LOST c", "mended", "fine"):
        commit(tree, text)
    assert commits(tree, "--fixed", bad="HEAD~5", good="HEAD") == 0
    assert (
        f"The first fixed commit is {git(tree, 'rev-parse', '--short', 'HEAD~1')} mended\n" in capsys.readouterr().out
    )


def test_a_wrong_baseline_is_said_after_one_or_two_commits(
    toys: Toys, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commits(tree, bad="HEAD~4") == 1
    assert "is good" in capsys.readouterr().err
    assert len(toys.made) == 1
    assert commits(tree, good="HEAD~1") == 1
    assert "is bad already" in capsys.readouterr().err
    assert len(toys.made) == 3
    assert commits(tree, good="HEAD~2") == 1
    assert "SILENT has no verdict" in capsys.readouterr().err


def test_a_bisect_over_commits_goes_on_and_leaves_a_log_for_git(
    toys: Toys, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "bisect.jsonl"
    whole = toys.results

    def full() -> Sequence[Item]:
        if len(toys.made) == 3:
            raise HostError("the disk is full")
        return whole()

    with monkeypatch.context() as patch:
        patch.setattr(toys, "results", full)
        assert commits(tree, f"--log={log}") == 1
    assert "the disk is full" in capsys.readouterr().err
    assert commits(tree, f"--log={log}") == 0
    assert len(set(toys.made)) == len(toys.made) - 1, "only the commit that met the full disk is asked again"
    git(tree, "bisect", "replay", f"{log}.git")
    assert "LOST a" in git(tree, "bisect", "log").splitlines()[-1]


def test_patches_and_the_branch_that_was_fixed_meanwhile(
    toys: Toys, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = repository(tmp_path / "linux")
    base = commit(tree, "LOST since ever")
    commit(tree, "mended on a branch")
    git(tree, "tag", "stable")
    git(tree, "checkout", "--quiet", "-b", "mainline", base)
    commit(tree, "LOST b")
    commit(tree, "LOST c")
    fill({tmp_path / "move.patch": PATCH})
    assert commits(tree, f"+{tmp_path}/move.patch", good="stable") == 1
    assert "fixed between" in capsys.readouterr().err
    assert b"patched 33" in toys.image


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (["--tree=/proc", "--good=a", "--bad=b"], "/proc is not the top of a git repository"),
        (["--tree=TREE", "--good=v1"], "--tree DIR --good REVISION --bad REVISION"),
        (["--tree=TREE", "--good=v1", "--bad=v2"], "has no revision 'v2'"),
        (["--tree=TREE", "--good=v1", "--bad=--all"], "has no revision '--all'"),
    ],
)
def test_a_repository_or_commit_that_does_not_exist_is_a_wrong_request(
    toys: Toys, tree: Path, capsys: pytest.CaptureFixture[str], where: list[str], said: str
) -> None:
    argv = [each.replace("TREE", str(tree)) for each in where]
    assert cli.main(["bisect", *argv, "--", "guest_tests/test_a.py"]) == 2
    assert said in capsys.readouterr().err
    assert toys.made == []
