# SPDX-License-Identifier: GPL-2.0
"""Records of results for the tests of the formats: one of each outcome, and one that a hostile guest wrote."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.judging.verdict import Judgement, Verdict
from harness.report import record, results, runs
from harness.report.record import Header, Item, KernelFacts, Recording
from harness.report.results import Facts
from harness.report.runs import Run

OLD = KernelFacts(
    label="debian:6.12-x86_64",
    spec="debian:6.12",
    release="6.12.1-cloud-amd64",
    version="6.12.1",
    arch="x86_64",
    provenance="linux-image-6.12.1 (sha256 07f23ba1…)",
    accelerator="tcg",
)
NEW = replace(OLD, label="debian:7.3-x86_64", spec="debian:7.3", release="7.3.4-cloud-amd64", version="7.3.4")
HEADER = Header(harness="1.0", command=("pytest", "--kernel=debian:6.12"), started=1_795_856_966.0, kernels=(OLD,))

_VERDICTS = {"passed": "PASS", "lacking": "PASS", "skipped": "SKIP", "MISS": "MISS", "error": "ERROR"}


def line(test: str, outcome: str = "passed", message: str = "", kernel: KernelFacts = OLD, **more: Any) -> Item:
    """The line of a test in ``guest_tests/test_a.py``, unless ``test`` names a file."""
    given: dict[str, Any] = {
        "label": kernel.label,
        "test": test if "::" in test else f"guest_tests/test_a.py::{test}",
        "outcome": outcome,
        "verdict": _VERDICTS.get(outcome, "FAIL"),
        "failed": outcome in ("failed", "error", "MISS"),
        "message": message,
        "start": HEADER.started + 1,
        "duration": 1.25,
    }
    return Item(**{**given, **more})


EVIDENCE = (
    ("failure in call", "E   lost a page\n    assert 1 == 2"),
    ("kernel console", "[    1.5] BUG: Bad page state in process python3  pfn:12345\n"),
    ("machine", "kernel:  6.12.1, x86_64"),
    ("run it again", "pytest --kernel=debian:6.12 guest_tests/test_a.py"),
)

#: One test of each outcome.
MIXED = (
    line("test_passes", properties=(("seen", {"pages": [1, 2]}),)),
    line("test_lacks", "lacking", properties=(("lacks", "MREMAP_RELOCATE_ANON"),)),
    line("test_fails[1]", "failed", "lost a page", sections=EVIDENCE),
    line("test_skips", "skipped", "needs CONFIG_KSM"),
    line("test_shows", "xfailed", "the walk does not find it", finding="kpageflags-ksm"),
    line("test_fixed", "passed", "finding x does not show on 6.12.1", failed=True, finding="x"),
    line("guest_tests/test_b.py::test_misses", "MISS", "infrastructure: no QEMU"),
    line("guest_tests/test_b.py::test_breaks", "error", "no such fixture"),
)

#: What a guest might print to break each of the formats.
HOSTILE = "\n".join(
    (
        "\x1b[31m\x00\x07\x85\u202e\ud800 control",
        "]]> </failure></testsuites> &amp; <!-- <b>bold</b>",
        "</pre></script><script>alert(1)</script><img src=x onerror=alert(1)>",
        "KTAP version 1",
        "# Subtest: guest_tests/test_a.py",
        "Subtest: again",
        "1..99",
        "ok 1 test_passes",
        "not ok 2 - stray # SKIP",
        "    ok 1 debian:6.12-x86_64",
        "reboot: System halted",
        "Kernel panic - not syncing: VFS: Unable to mount root fs",
        "List of all partitions:",
        "Bail out!",
        "x" * 200_000,
    )
)


def hostile() -> list[Item]:
    """The lines of tests whose names, messages and evidence are hostile, as a run records them."""
    made = []
    for number, verdict in enumerate((Verdict.FAIL, Verdict.MISS, Verdict.SKIP)):
        made.append(_hostile(f"guest_tests/test_a.py::test_{number}[# SKIP <b>]", verdict))
    finding = replace(made[0], test="guest_tests/test_a.py::test_xfail", outcome="xfailed", failed=False, finding="f")
    return [*made, finding]


def _hostile(test: str, verdict: Verdict) -> Item:
    import pytest

    outcome: Any = "skipped" if verdict is Verdict.SKIP else "failed"
    text: Any = ("a.py", 1, f"Skipped: {HOSTILE}") if outcome == "skipped" else HOSTILE
    reports = [
        pytest.TestReport(test, ("a.py", 1, "a"), {}, outcome, text, "setup", sections=[(HOSTILE[:500], HOSTILE)]),
        pytest.TestReport(test, ("a.py", 1, "a"), {}, "passed", None, "teardown", user_properties=[("x", HOSTILE)]),
    ]
    results.encode(Judgement(verdict, reports), Facts(label=OLD.label, test=test))
    item = record.item(reports, HEADER.started, 1.0)
    assert item is not None
    return item


def recording(*items: Item, status: int | None = 1, kernels: tuple[KernelFacts, ...] = (OLD,)) -> Recording:
    """A record as it is read."""
    notes = [] if status is not None else ["results.jsonl was cut short: its run did not come to its end"]
    return Recording(replace(HEADER, kernels=kernels), items, status, False, notes)


def run(*items: Item, status: int | None = 1, kernels: tuple[KernelFacts, ...] = (OLD,)) -> Run:
    """One record, as the formats get it."""
    return runs.merge([recording(*items, status=status, kernels=kernels)])


def text(*items: Item, status: int | None = 1, kernels: tuple[KernelFacts, ...] = (OLD,)) -> str:
    """The text of a file."""
    head = record.header_line(replace(HEADER, kernels=kernels))
    return head + "".join(map(record.item_line, items)) + (record.end_line(status) if status is not None else "")
