# SPDX-License-Identifier: GPL-2.0
"""A matrix runs what has changed, keeps what has not, and its exit status is pytest's. No test here boots."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from harness import paths
from harness.arch import X86_64
from harness.commands import cli
from harness.debian.apt import Archive
from harness.errors import UsageError
from harness.host.cache import Cache
from harness.host.terminal import ProgressLine
from harness.machine import accelerator, payload
from harness.machine.accelerator import Accelerator
from harness.matrix import definition, executor, keys
from harness.matrix.definition import Cell
from harness.matrix.job import Ended, Job
from harness.matrix.outcome import State
from harness.matrix.run import Matrix, Planned, plan
from harness.matrix.store import ResultStore
from tests.kernel_files import bzimage
from tests.matrix_runs import CELL, Scripted, ended, line, planned

ARM = replace(CELL, arch="arm64")
BOTH = [planned(CELL, "one"), planned(ARM, "two")]


# --- the file --------------------------------------------------------------------------------------------------------


def load(tmp_path: Path, text: str) -> definition.Definition:
    path = tmp_path / "matrix.toml"
    path.write_text(text)
    return definition.load(path)


GROUP = '[groups.a]\nkernels = ["debian:6.12"]\narches = ["x86_64"]\n'


def test_the_projects_matrix_is_sound_and_its_optional_groups_wait_to_be_asked_for() -> None:
    default = definition.load()
    names = [cell.name for cell in default.cells()]
    assert len(names) == 16
    assert names[:2] == ["debian:6.1 x86_64", "debian:6.1 arm64"]
    assert [cell.name for cell in default.cells(["built"])] == ["unpatched:fast x86_64", "relocate-anon:fast x86_64"]
    assert len(default.cells(["small"])) == 6


def test_kernels_architectures_presets_and_options_multiply(tmp_path: Path) -> None:
    text = '[groups.a]\nkernels = ["unpatched", "relocate-anon"]\narches = ["x86_64", "arm64"]\n'
    text += 'presets = ["fast", "debug"]\noptions = ["", "--guest-cpus=2"]\n'
    cells = load(tmp_path, text).cells()
    assert len({cell.name for cell in cells}) == 16
    assert "relocate-anon:debug arm64 --guest-cpus=2" in {cell.name for cell in cells}


def test_a_cell_gives_pytest_what_its_group_says(tmp_path: Path) -> None:
    text = GROUP + 'options = ["--append=\'slub_debug=F\'"]\ntests = ["test_flags.py"]\nkeyword = "errno or bit"\n'
    (cell,) = load(tmp_path, text + 'minutes = 3\nworkers = 1\nresources = ["kvm"]\n').cells()
    task = Planned(cell, "key", {}).task
    assert cell.arguments == [
        *("--kernel=debian:6.12", "--arch=x86_64", "--append=slub_debug=F", "-k", "errno or bit"),
        *("--expect-findings", "guest_tests/test_flags.py"),
    ]
    assert task["python"][-2:] == ["-n", "1"]
    assert (task["seconds"], task["resources"]) == (180, ["kvm"])


BAD = {
    "[groups.a\n": "(at line 1, column 10)",
    "": "there is no group",
    "[other]\n": "'other' is not known here",
    "[groups]\na = 3\n": "groups.a has to be a table",
    '[groups.a]\narches = ["x86_64"]\n': "groups.a.kernels is missing",
    '[groups.a]\nkernels = ["debian:"]\n': "groups.a.arches is missing",
    GROUP + "kernel = 3\n": "groups.a.kernel is not known",
    GROUP + "optional = 1\n": "groups.a.optional has to be true or false",
    GROUP + "minutes = -1\n": "groups.a.minutes has to be a number above 0",
    GROUP + "minutes = true\n": "groups.a.minutes has to be a number above 0",
    GROUP + "workers = 1.5\n": "groups.a.workers has to be a whole number above 0",
    GROUP + 'presets = "fast"\n': "groups.a.presets has to be a list of presets",
    GROUP + 'presets = ["fast"]\n': "groups.a: --preset=fast has no effect",
    GROUP + 'tests = ["test_nothing.py"]\n': "there is no file guest_tests/test_nothing.py",
    GROUP + 'options = ["--append=\'"]\n': 'groups.a.options: "--append=\'" is no command line',
    GROUP + 'options = ["--results=x"]\n': "groups.a.options: --results does not belong here",
    GROUP + 'options = ["-n 4"]\n': "-n does not belong here: use the key workers",
    GROUP.replace("debian:6.12", "debian:x"): "groups.a: Debian has no suite 'x'",
    GROUP.replace("x86_64", "vax"): "groups.a: ",
    GROUP.replace("debian:6.12", "ssh://board"): "a matrix takes kernels that are booted in guests",
    GROUP + "optional = true\n": "every group of",
    GROUP + GROUP.replace("groups.a", "groups.b") + 'keyword = "x"\n': "run debian:6.12 x86_64 in different ways",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_a_wrong_file_is_one_line_that_names_the_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(tmp_path, text).cells()
    message = str(caught.value)
    assert "matrix.toml" in message
    assert BAD[text] in message
    assert "\n" not in message


def test_a_missing_file_and_an_unknown_group_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        definition.load(tmp_path / "missing.toml")
    with pytest.raises(UsageError, match="has no group 'b': it has a"):
        load(tmp_path, GROUP).cells(["b"])


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Accelerator:
    """The accelerator of this host. Finding it out takes 5 s where KVM does not work, so that it is asked once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        return accelerator.choose(X86_64)


@pytest.fixture
def image(tmp_path: Path, probed: Accelerator, monkeypatch: pytest.MonkeyPatch) -> Cell:
    monkeypatch.setattr(accelerator, "choose", lambda _arch, *, icount: probed)
    path = tmp_path / "bzImage"
    path.write_bytes(bzimage())
    return Cell(group="a", kernel=str(path), arch="x86_64")


def key(cell: Cell) -> str:
    cache = Cache()
    return keys.key(keys.identity(cell, cache, Archive(cache)))


def test_equal_inputs_have_equal_keys(image: Cell) -> None:
    assert key(image) == key(image) == key(replace(image, minutes=1, workers=7, group="b", resources=("kvm",)))


@pytest.mark.parametrize("change", [{"options": "--guest-cpus=2"}, {"tests": ("test_flags.py",)}, {"keyword": "errno"}])
def test_other_arguments_have_another_key(image: Cell, change: dict[str, str]) -> None:
    assert key(image) != key(replace(image, **change))  # type: ignore[arg-type]


def test_another_kernel_under_the_same_name_has_another_key(image: Cell) -> None:
    before = key(image)
    Path(image.kernel).write_bytes(bzimage(b"more"))
    assert key(image) != before


def test_a_changed_test_has_another_key(image: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(payload.LIBRARY, tmp_path / "guest_tests")
    monkeypatch.setattr(payload, "LIBRARY", tmp_path / "guest_tests")
    before = key(image)
    with (tmp_path / "guest_tests" / "test_flags.py").open("a") as file:
        file.write("# changed\n")
    assert key(image) != before


@pytest.mark.parametrize(
    ("file", "matters"),
    [
        ("harness/judging/verdict.py", True),
        ("images/init", True),
        ("harness/judging/findings.toml", True),
        ("harness/matrix/page.py", False),
        ("harness/commands/cli.py", False),
    ],
)
def test_the_harness_counts_as_far_as_results_depend_on_it(
    image: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, matters: bool
) -> None:
    for name in ("harness", "images"):
        shutil.copytree(paths.PROJECT / name, tmp_path / name)
    monkeypatch.setattr(paths, "PROJECT", tmp_path)
    monkeypatch.setattr(paths, "IMAGES", tmp_path / "images")
    before = key(image)
    with (tmp_path / file).open("a") as changed:
        changed.write("# changed\n")
    assert (key(image) != before) is matters


def test_a_kernel_that_cannot_be_had_is_no_reason_not_to_run_the_others(
    image: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = replace(CELL, kernel="debian:6.12")
    # The reserved port 9 of this host answers nobody.
    found, lost = plan([image, missing], "http://127.0.0.1:9/debian", lambda _: None)
    assert found.key
    assert not found.trouble
    assert not lost.key
    assert lost.trouble


# --- resuming --------------------------------------------------------------------------------------------------------


def passing(task: Job) -> Ended:
    return ended(task["name"], line("test_a"))


def run(answer: Callable[[Job], Ended], cells: list[Planned] = BOTH, *, again: bool = False) -> tuple[Matrix, Scripted]:
    scripted = Scripted(answer)
    matrix = Matrix(cells, scripted, lambda _: None, lambda _: None)
    matrix.run(again=again)
    return matrix, scripted


def states(matrix: Matrix) -> list[State]:
    return [each.state for each in matrix.reports]


def test_what_has_run_is_kept_and_not_run_again() -> None:
    first, scripted = run(passing)
    assert scripted.submitted == [CELL.name, ARM.name]
    assert states(first) == [State.RAN, State.RAN]
    second, scripted = run(passing)
    assert scripted.submitted == []
    assert states(second) == [State.KEPT, State.KEPT]
    assert [each.tests for each in second.reports] == [each.tests for each in first.reports]
    assert [each.release for each in second.reports] == ["6.12.1", "6.12.1"]


def test_an_interrupted_matrix_goes_on_where_it_stopped() -> None:
    def interrupted(task: Job) -> Ended:
        if task["name"] == ARM.name:
            raise KeyboardInterrupt
        return passing(task)

    scripted = Scripted(interrupted)
    matrix = Matrix(BOTH, scripted, lambda _: None, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        matrix.run(again=False)
    assert states(matrix) == [State.RAN, State.NOT_RUN]
    matrix, scripted = run(passing)
    assert scripted.submitted == [ARM.name]
    assert states(matrix) == [State.KEPT, State.RAN]


def test_a_changed_cell_runs_and_an_unchanged_one_does_not() -> None:
    run(passing)
    _, scripted = run(passing, [BOTH[0], planned(ARM, "changed")])
    assert scripted.submitted == [ARM.name]


def test_all_run_again_when_asked() -> None:
    run(passing)
    matrix, scripted = run(lambda task: ended(task["name"], line("test_a", "failed")), again=True)
    assert scripted.submitted == [CELL.name, ARM.name]
    assert [each.surprises for each in matrix.reports] == [1, 1]
    kept, _ = run(passing)
    assert [each.surprises for each in kept.reports] == [1, 1], "the newer results are kept"


def test_a_failure_of_the_kernel_is_kept_and_one_of_the_harness_is_not() -> None:
    def answer(task: Job) -> Ended:
        return ended(task["name"], line("test_a", "failed" if task["name"] == CELL.name else "MISS"))

    run(answer)
    _, scripted = run(answer)
    assert scripted.submitted == [ARM.name]


def test_a_cell_with_trouble_is_shown_with_what_it_did_and_runs_again() -> None:
    matrix, _ = run(lambda task: ended(task["name"], line("test_a"), trouble="it was ended after 3 minutes"))
    assert states(matrix) == [State.BROKEN, State.BROKEN]
    assert [len(each.tests) for each in matrix.reports] == [1, 1]
    assert [each.surprises for each in matrix.reports] == [1, 1]
    _, scripted = run(passing)
    assert len(scripted.submitted) == 2


def test_a_cell_whose_kernel_is_not_known_is_not_run() -> None:
    matrix, scripted = run(passing, [Planned(CELL, "", {}, "the archive has no such kernel"), BOTH[1]])
    assert scripted.submitted == [ARM.name]
    assert states(matrix) == [State.BROKEN, State.RAN]
    assert matrix.reports[0].trouble == "the archive has no such kernel"


@pytest.mark.parametrize("damage", ["", "{", '{"generation": 0, "ended": {}}', "[]"])
def test_a_damaged_result_is_none(damage: str) -> None:
    run(passing)
    store = ResultStore()
    assert store.get("one") is not None
    (store.directory / "one.json").write_text(damage)
    assert store.get("one") is None


def test_a_half_result_is_never_seen() -> None:
    run(passing)
    store = ResultStore()
    (store.directory / "two.json").unlink()  # the record alone, as a crash between both files leaves it
    _, scripted = run(passing)
    assert scripted.submitted == [ARM.name]
    assert sorted(path.name for path in store.directory.iterdir()) == ["one.json", "one.jsonl", "two.json", "two.jsonl"]


def test_a_person_sees_how_far_it_is() -> None:
    said: list[str] = []
    shown: list[str] = []
    Matrix(BOTH, Scripted(passing), said.append, shown.append).run(again=False)
    assert said == [
        "[1/2] debian:6.12 x86_64: 1 passed, 1:01",
        "[2/2] debian:6.12 arm64: 1 passed, 1:01",
    ]
    assert shown[0] == "0 of 2 cells, 3 tests, 1 surprise, 0:00 so far; now debian:6.12 x86_64 (3)"
    assert shown[1] == "1 of 2 cells, 4 tests, 1 surprise, about 1:01 left; now debian:6.12 arm64 (3)"


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    tmp_path: Path, image: Cell, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[Job], Ended], list[str]], int]:
    """Runs ``harness matrix`` on a file with one cell whose job ends as the test says."""
    path = tmp_path / "matrix.toml"
    path.write_text(f'[groups.a]\nkernels = ["{image.kernel}"]\narches = ["x86_64"]\n')

    def main(answer: Callable[[Job], Ended], more: list[str]) -> int:
        monkeypatch.setattr(executor, "LocalExecutor", lambda slots: Scripted(answer))
        return cli.main(["matrix", str(path), *more])

    return main


Command = Callable[[Callable[[Job], Ended], list[str]], int]


def test_the_exit_status_is_pytests(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_task: Job) -> Ended:
        raise KeyboardInterrupt

    assert command(interrupted, []) == 2
    assert "interrupted: the cells that were done are kept" in capsys.readouterr().out
    assert command(passing, []) == 0
    assert "1 kept" not in capsys.readouterr().out
    assert command(interrupted, []) == 0, "what is kept needs no run"
    assert command(lambda task: ended(task["name"], line("test_a", "failed")), ["--again"]) == 1
    assert command(lambda task: ended(task["name"], line("test_a", "xfailed")), ["--again"]) == 0
    assert command(lambda task: ended(task["name"], line("test_a"), trouble="lost"), ["--again"]) == 1


def test_a_wrong_request_is_told_before_anything_runs(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(_task: Job) -> Ended:
        raise AssertionError("a job was run")

    (tmp_path / "foreign.json").write_text("{}")
    for more, said in (
        (["--group=none"], "has no group 'none'"),
        ([f"--json={tmp_path}/missing/x.json"], "cannot write"),
        ([f"--compare={tmp_path}/missing.json"], "No such file"),
        ([f"--compare={tmp_path}/foreign.json"], "does not hold the results of a matrix"),
    ):
        assert command(never, more) == 4
        assert said in capsys.readouterr().err
    for wrong in (["--jobs=0"], ["--unknown"], ["--cluster", "--scheduler=tcp://127.0.0.1:1"]):
        with pytest.raises(SystemExit) as left:
            command(never, wrong)
        assert left.value.code == 4


def test_other_commands_keep_their_exit_status_for_a_wrong_request() -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(["doctor", "--unknown"])
    assert left.value.code == 2


def test_what_is_written_can_be_compared_with(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, html = tmp_path / "base.json", tmp_path / "page.html"
    assert command(passing, [f"--json={base}", f"--html={html}"]) == 0
    assert json.loads(base.read_text())["cells"][0]["tests"][0]["outcome"] == "passed"
    assert html.read_text().startswith("<!DOCTYPE html>")
    capsys.readouterr()
    assert command(passing, [f"--compare={base}"]) == 0
    assert f"No changes since {base}." in capsys.readouterr().out
    failing = ["--again", f"--compare={base}"]
    assert command(lambda task: ended(task["name"], line("test_a", "failed", message="lost a page")), failing) == 1
    assert "guest_tests/test_a.py::test_a: passed -> failed  lost a page" in capsys.readouterr().out


def test_progress_is_told_once_a_minute_where_no_terminal_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.commands import matrix
    from harness.host import terminal

    now = [100.0]
    monkeypatch.setattr(matrix.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(matrix.sys, "stderr", io.StringIO())
    assert matrix.time is terminal.time
    stream = io.StringIO()
    seldom = matrix._Seldom(ProgressLine.on(stream))
    for _ in range(130):
        seldom("3 of 16 cells")
        now[0] += 1.0
    assert stream.getvalue() == "harness: 3 of 16 cells\n" * 2
