# SPDX-License-Identifier: GPL-2.0
"""The benchmark's table, its files and its exit status. Nothing is timed here and nothing boots."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from harness import arch
from harness.arch import ARCHITECTURES
from harness.debian.apt import Archive
from harness.errors import HostError, UsageError
from harness.host.cache import Cache
from harness.kernels.kernel import BootSpec, Kernel, Provenance
from harness.machine.accelerator import Accelerator
from tests import benchmark, benchmark_audit, figures, virtme_ng
from tests.figures import Figure, MeasureError, Results
from tests.lab import wait_until

COMMAND = Figure("command", "one test", (1.0, 4.0, 2.0), as_peer=True)
CLONE = Figure("clone", "a clone", (0.5,))
MEMORY = Figure("memory", "memory of a clone", (56.0, 58.0), "MiB")
PEER = Figure(figures.PEER, "virtme-ng", (8.0, 10.0))


def results(*taken: Figure, **about: str) -> Results:
    return Results({"kernel": "6.12.0", **about}, list(taken))


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def options(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    figures.add_options(parser)
    return parser.parse_args(argv)


def test_a_row_has_the_median_the_range_and_the_number_of_rounds() -> None:
    head, rule, command, memory = cells(figures.table(results(COMMAND, MEMORY)))
    assert head == ["what", "median", "range", "rounds"]
    assert rule == ["---"] * 4
    assert command == ["one test", "2.00 s", "1.00-4.00", "3"]
    assert memory == ["memory of a clone", "57.00 MiB", "56.00-58.00", "2"]


def test_the_peer_is_divided_by_the_figures_of_the_same_check_only() -> None:
    head, _, command, clone, peer = cells(figures.table(results(COMMAND, CLONE, PEER, peer="virtme-ng 1.42")))
    assert head[4:] == ["virtme-ng 1.42 takes"]
    assert command[4:] == ["x4.50"]
    assert clone[4:] == [""]
    assert peer[4:] == [""]


def test_a_comparison_adds_the_earlier_medians_and_what_they_are_multiplied_by() -> None:
    earlier = results(Figure("command", "one test, as it was called then", (4.0,)), MEMORY)
    head, _, command, clone, memory = cells(figures.table(results(COMMAND, CLONE, MEMORY), earlier))
    assert head[4:] == ["before", "now / before"]
    assert command[4:] == ["4.00 s", "x0.50"]
    assert clone[4:] == ["-", "-"], "this figure was not measured before"
    assert memory[4:] == ["57.00 MiB", "x1.00"]


def test_both_ratios_stand_beside_each_other() -> None:
    now = results(COMMAND, PEER, peer="virtme-ng 1.42")
    assert [len(row) for row in cells(figures.table(now, now))] == [7] * 4


def test_a_median_of_nothing_has_no_ratio() -> None:
    *_, row = cells(figures.table(results(CLONE), results(Figure("clone", "a clone", (0.0,)))))
    assert row[4:] == ["0.00 s", "-"]


def test_what_differs_between_two_runs_is_said() -> None:
    now = results(peer="virtme-ng 1.42", accelerator="tcg")
    before = results(peer="virtme-ng 1.40", accelerator="tcg")
    assert figures.differences(now, before) == ["The peer is virtme-ng 1.42, but was virtme-ng 1.40 before."]


def test_what_only_one_of_two_runs_knows_is_no_difference() -> None:
    assert figures.differences(results(peer="virtme-ng 1.42"), results()) == []
    assert figures.differences(results(), results(peer="virtme-ng 1.42")) == []


def test_what_is_no_longer_measured_is_said() -> None:
    assert figures.missing(results(CLONE), results(CLONE, PEER)) == ["Not measured this time: virtme-ng."]


def test_a_file_holds_every_sample_and_every_problem(tmp_path: Path) -> None:
    written = results(COMMAND, MEMORY, PEER, peer="virtme-ng 1.42")
    written.failed("the suite", MeasureError("pytest ended with 1"))
    written.write(tmp_path / "figures.json")
    assert Results.read(tmp_path / "figures.json") == written


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no JSON", "cannot read the figures in"),
        ("[]", "is not a file of figures"),
        ("{}", "is not a file of figures"),
        (json.dumps({"format": figures.FORMAT, "about": {}, "figures": [{}], "problems": []}), "is not a file of fig"),
        (json.dumps({"format": 0}), f"has format 0, not {figures.FORMAT}: measure again"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "other").write_text(text)
    with pytest.raises(UsageError, match=reason):
        Results.read(tmp_path / "other")


def test_a_figure_without_samples_is_refused(tmp_path: Path) -> None:
    results(Figure("clone", "a clone", ())).write(tmp_path / "figures.json")
    with pytest.raises(UsageError, match="is not a file of figures"):
        Results.read(tmp_path / "figures.json")


def test_a_file_to_compare_with_is_read_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        options("--compare", str(tmp_path / "nowhere"))
    assert ended.value.code == 2
    assert "cannot read the figures in" in capsys.readouterr().err


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_a_median_needs_a_round(rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--rounds", rounds)
    assert "is not a number of rounds: give 1 or more" in capsys.readouterr().err


def test_all_is_printed_and_written_and_the_status_is_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results(COMMAND, PEER, kernel="6.1.0").write(tmp_path / "before.json")
    wanted = options("--json", str(tmp_path / "after.json"), "--compare", str(tmp_path / "before.json"))
    now = results(COMMAND)
    assert figures.finish(now, wanted) == 0
    said = capsys.readouterr().out
    assert "| one test | 2.00 s | 1.00-4.00 | 3 | 2.00 s | x1.00 |" in said
    assert "The kernel is 6.12.0, but was 6.1.0 before." in said
    assert "Not measured this time: virtme-ng." in said
    assert Results.read(tmp_path / "after.json") == now


def test_a_missing_figure_is_one_line_and_status_1_and_the_others_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> list[Figure]:
        raise HostError("modprobe is not installed\nand so on")

    now = results()
    now.attempt("virtme-ng", fail)
    now.attempt("clones", lambda: [CLONE])
    assert figures.finish(now, options()) == 1
    said = capsys.readouterr().out
    assert "Not measured: virtme-ng: modprobe is not installed\n" in said
    assert "and so on" not in said
    assert "| a clone | 0.50 s |" in said


def test_actions_take_turns_after_one_that_is_not_counted() -> None:
    ran: list[str] = []
    samples = figures.side_by_side({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 2, results())
    assert ran == ["a", "b"] * 3
    assert {name: len(values) for name, values in samples.items()} == {"a": 2, "b": 2}


def test_an_action_that_fails_in_any_round_has_no_samples_and_is_not_run_again() -> None:
    ran: list[str] = []

    def fail() -> None:
        ran.append("b")
        if ran.count("b") == 2:
            raise MeasureError("it ended with 255")

    now = results()
    samples = figures.side_by_side({"a": lambda: ran.append("a"), "b": fail}, 3, now)
    assert ran == ["a", "b", "a", "b", "a", "a"]
    assert list(samples) == ["a"]
    assert now.problems == ["b: it ended with 255"]


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_a_command_that_fails_is_quoted_with_its_last_line() -> None:
    with pytest.raises(MeasureError, match=r"ended with 3: it did not work$"):
        benchmark.run(python("print('much'); print('it did not work'); exit(3)"), 60)


def test_a_command_that_ends_with_0_must_also_say_that_it_passed() -> None:
    benchmark.run(python("print('moved')"), 60, says="moved")
    with pytest.raises(MeasureError, match="ended with 0: it printed nothing"):
        benchmark.run(python("pass"), 60, says="moved")


def test_a_command_that_is_stuck_is_ended_with_what_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with pytest.raises(MeasureError, match="did not end in 1 s"):
        benchmark.run(["sh", "-c", f"sleep 1000 & echo $! > {note}; wait"], 1)
    status = Path(f"/proc/{int(note.read_text())}/status")
    wait_until(lambda: not status.exists() or "\tZ" in status.read_text(), "the child of a killed command to end", 30)


def test_the_memory_of_a_command_is_not_that_of_the_process_that_measures_it() -> None:
    ballast = bytearray(b"x") * (300 << 20)
    assert benchmark_audit.most_memory(python("pass")) < 100
    assert benchmark_audit.most_memory(python("bytearray(b'x') * (200 << 20)")) > 200
    del ballast


def test_a_command_whose_memory_is_measured_must_succeed() -> None:
    with pytest.raises(MeasureError, match="failed"):
        benchmark_audit.most_memory(python("exit(1)"))


def kernel(tmp_path: Path, architecture: arch.Architecture, config: dict[str, str]) -> Kernel:
    class Spec(BootSpec):
        def resolve(self, cache: Cache, archive: Archive) -> Kernel:
            raise NotImplementedError

        def identify(self, cache: Cache, archive: Archive) -> str:
            raise NotImplementedError

    return Kernel(
        Spec("image", "image", architecture),
        architecture,
        "6.12.0",
        tmp_path / "image",
        config,
        None,
        None,
        Provenance("image", "image", "6.12.0", ""),
    )


def prepare(tmp_path: Path, architecture: arch.Architecture, config: dict[str, str]) -> virtme_ng.Peer:
    cache = Cache(tmp_path)
    return virtme_ng.prepare(kernel(tmp_path, architecture, config), Accelerator("tcg", "", 1.0), cache, Archive(cache))


def test_virtme_ng_has_no_userland_for_another_architecture(tmp_path: Path) -> None:
    foreign = next(each for each in ARCHITECTURES if each is not arch.host())
    with pytest.raises(HostError, match=f"this host's own userland, which is not for {foreign}"):
        prepare(tmp_path, foreign, {})


def test_virtme_ng_needs_a_file_system_that_reaches_the_host(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="neither virtiofs nor 9p"):
        virtme_ng.shared_by(kernel(tmp_path, arch.host(), {"9P_FS": "y"}))
    both = kernel(tmp_path, arch.host(), {"9P_FS": "m", "NET_9P_VIRTIO": "m", "VIRTIO_FS": "m"})
    assert virtme_ng.shared_by(both) == "virtiofs"
    assert virtme_ng.shared_by(kernel(tmp_path, arch.host(), {"9P_FS": "y", "NET_9P_VIRTIO": "y"})) == "9p"
    assert virtme_ng.shared_by(kernel(tmp_path, arch.host(), {})) == "virtiofs"


def test_the_peers_absence_is_said_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(HostError, match="vng is not installed: get it with: make bench"):
        prepare(tmp_path, arch.host(), {})
