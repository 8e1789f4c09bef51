# SPDX-License-Identifier: GPL-2.0
"""KCIDB documents: valid against the published schema, with the statuses, the costs and the known bugs of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from kcidb_io.schema import V5_3

from harness.commands import cli
from harness.errors import HostError, UsageError
from harness.report import artifacts, kcidb
from harness.report.record import Item
from harness.report.runs import Run
from tests.recorded import EVIDENCE, MIXED, NEW, OLD, hostile, line, run, text
from tests.test_page import HOSTILE


def document(recorded: Run, **settings: str) -> dict[str, Any]:
    """The document of a run, which has to be valid."""
    data: dict[str, Any] = json.loads(kcidb.text(recorded, **settings))
    V5_3.validate_exactly(data)
    return data


def by_name(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["comment"].partition("::")[2]: each for each in data["tests"]}


def test_each_test_has_the_word_for_its_status() -> None:
    assert {name: each["status"] for name, each in by_name(document(run(*MIXED))).items()} == {
        "test_passes": "PASS",
        "test_lacks": "PASS",
        "test_fails[1]": "FAIL",
        "test_skips": "SKIP",
        "test_shows": "FAIL",
        "test_fixed": "PASS",
        "test_misses": "MISS",
        "test_breaks": "ERROR",
    }


def test_a_test_belongs_to_its_build_and_a_build_to_its_checkout() -> None:
    built = replace(NEW, compiler="gcc 14", configuration="fast", patchset_hash="ab" * 32)
    data = document(run(line("test_a"), line("test_a", kernel=built), kernels=(OLD, built)), origin="my_ci")
    checkouts, builds = data["checkouts"], data["builds"]
    assert [each["build_id"] for each in data["tests"]] == [each["id"] for each in builds]
    assert [each["checkout_id"] for each in builds] == [each["id"] for each in checkouts]
    assert {each["origin"] for each in (*checkouts, *builds, *data["tests"])} == {"my_ci"}
    assert (builds[1]["compiler"], builds[1]["config_name"]) == ("gcc 14", "fast")
    assert checkouts[1]["patchset_hash"] == "ab" * 32
    assert checkouts[0]["comment"] == OLD.provenance
    assert builds[0]["architecture"] == "x86_64"


def test_a_test_has_its_place_its_times_and_its_evidence() -> None:
    found = by_name(document(run(*MIXED)))["test_fails[1]"]
    assert found["path"] == "mremap_harness.test_a.test_fails.1"
    assert found["start_time"] == "2026-11-28T09:09:27+00:00"
    assert found["duration"] == 1.25
    assert found["log_excerpt"].startswith("[    1.5] BUG: Bad page state")
    assert found["misc"]["message"] == "lost a page"


def test_the_failure_is_the_excerpt_where_the_console_is_silent() -> None:
    silent = (EVIDENCE[0], ("kernel console", "(nothing)"))
    (found,) = document(run(line("test_a", "failed", "lost", sections=silent)))["tests"]
    assert found["log_excerpt"] == EVIDENCE[0][1]


def test_a_finding_is_an_issue_and_a_test_that_tells_of_it_an_incident() -> None:
    gone = line("test_gone", "passed", finding="ksm-swapcache-move")
    unclear = line("test_unclear", "failed", "something else", finding="ksm-fork-counters")
    data = document(run(*MIXED[:5], gone, unclear))
    issues = {each["id"]: each["comment"].partition(":")[0] for each in data["issues"]}
    ids = {each["id"]: each["comment"].partition("::")[2] for each in data["tests"]}
    assert {(issues[each["issue_id"]], ids[each["test_id"]], each["present"]) for each in data["incidents"]} == {
        ("kpageflags-ksm", "test_shows", True),
        ("ksm-swapcache-move", "test_gone", False),
    }


def test_a_cost_is_a_number() -> None:
    cost = {"step": "move", "kind": "small pages", "size": 4096, "alignment": "page", "flags": 0}
    counted = {**cost, "pages": 1, "instructions": 1234, "median": 1300}
    found = by_name(
        document(
            run(
                line("test_cost", properties=(("cost", counted),)),
                line("test_refused", properties=(("cost", {**cost, "missing": "EINVAL"}),)),
                line("test_forged", properties=(("cost", {**counted, "instructions": "many"}),)),
            )
        )
    )
    assert found["test_cost"]["number"] == {"value": 1234, "unit": "instructions"}
    assert "number" not in found["test_refused"]
    assert "number" not in found["test_forged"]


def test_files_of_a_failure_are_linked_where_they_will_be() -> None:
    data = by_name(document(run(*MIXED), artifacts_url="https://ci.example/run/1/"))
    files = {each["name"]: each["url"] for each in data["test_fails[1]"]["output_files"]}
    assert set(files) == set(artifacts.contents(MIXED[2]))
    place = "debian-6.12-x86_64/test_a/test_fails-1"
    assert files["console.txt"] == f"https://ci.example/run/1/{place}/console.txt"
    assert "output_files" not in data["test_passes"]
    assert "output_files" not in by_name(document(run(*MIXED)))["test_fails[1]"]


def test_the_same_record_gives_the_same_document_and_tests_of_two_runs_differ() -> None:
    assert document(run(*MIXED)) == document(run(*MIXED))
    first, again = line("test_a"), replace(line("test_a"), start=line("test_a").start + 60)
    ids = {document(run(each))["tests"][0]["id"] for each in (first, again)}
    assert len(ids) == 2
    everything = document(run(*MIXED, *(replace(each, label=NEW.label) for each in MIXED), kernels=(OLD, NEW)))
    for kind in ("checkouts", "builds", "tests", "issues", "incidents"):
        names = [each["id"] for each in everything[kind]]
        assert len(names) == len(set(names)), f"{kind} with the same id"


@pytest.mark.parametrize(
    ("test", "path"),
    [
        ("guest_tests/test_a.py::test_b", "mremap_harness.test_a.test_b"),
        ("checks/test_a.py::TestC::test_b[x.y-[vdso]]", "mremap_harness.test_a.TestC.test_b.x_y-_vdso_"),
        ("a.py::b[]", "mremap_harness.a.b"),
        ("::", "mremap_harness"),
        ("a..py::é ü", "mremap_harness.a_._"),
    ],
)
def test_a_place_is_made_of_the_characters_that_are_allowed(test: str, path: str) -> None:
    assert document(run(line(test)))["tests"][0]["path"] == path


def test_a_hostile_guest_cannot_make_a_document_invalid() -> None:
    raw = line(f"{HOSTILE}::{HOSTILE}[{HOSTILE}]", "failed", HOSTILE, finding=HOSTILE, sections=((HOSTILE, HOSTILE),))
    shown = replace(raw, test="a.py::b", outcome="xfailed", failed=False, properties=((HOSTILE, {HOSTILE: [HOSTILE]}),))
    kernel = replace(OLD, release=HOSTILE, provenance=HOSTILE, spec=HOSTILE)
    assert len(document(run(raw, shown, *hostile(), kernels=(kernel,)))["tests"]) == 6


def test_an_invalid_document_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcidb, "_EXCERPT", 1 << 20)
    long = line("test_a", "failed", "lost", sections=(("failure in call", "x" * 20_000),))
    with pytest.raises(UsageError, match="these results do not fit the schema of KCIDB") as caught:
        kcidb.text(run(long))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"origin": "My CI"}, {"origin": ""}, {"artifacts_url": "/tmp/x"}, {"artifacts_url": "https://a/b c"}]
)
def test_settings_that_the_schema_does_not_allow_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"use lower case|give one like https"):
        kcidb.text(run(*MIXED), **settings)


def test_without_the_package_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kcidb_io.schema", None)
    with pytest.raises(HostError, match=r"pip install 'mremap-harness\[kcidb\]'"):
        kcidb.text(run(*MIXED))


def test_the_command_writes_it_with_what_was_said_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results.jsonl").write_text(text(*MIXED))
    command: Callable[..., int] = lambda *args: cli.main(["report", "results.jsonl", *args])  # noqa: E731
    assert command("--kcidb=k.json", "--kcidb-origin=my_ci", "--artifacts-url=https://ci.example") == 0
    data = json.loads(Path("k.json").read_text())
    assert data["version"] == {"major": 5, "minor": 3}
    assert data["checkouts"][0]["origin"] == "my_ci"
    assert command("--kcidb=k.json", "--kcidb-origin=My CI") == 2
    assert "is no origin of KCIDB" in capsys.readouterr().err
    assert json.loads(Path("k.json").read_text()) == data


def test_items_with_long_evidence_keep_its_end() -> None:
    item: Item = line("test_a", "failed", "lost", sections=(("failure in call", f"{'x' * 20_000}the end"),))
    (found,) = document(run(item))["tests"]
    assert found["log_excerpt"].endswith("the end")
    assert len(found["log_excerpt"]) == 16384
