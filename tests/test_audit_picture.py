# SPDX-License-Identifier: GPL-2.0
"""The picture of an audit, and the command that draws it from a dump."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.audit import picture, walk
from harness.audit.discrepancies import Discrepancy, DiscrepancyKind, Severity
from harness.audit.live import Auditor
from harness.audit.result import Audit, Counts, Page, Region
from harness.commands import cli
from harness.host.cache import Cache
from tests.audit_case import NAMES, Case
from tests.audit_scene import DUMPS

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(NAMES[0], tmp_path)


def drawn(*panels: picture.Panel) -> ET.Element:
    return ET.fromstring(picture.svg(panels))


def texts(root: ET.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


def audit(*pages: Page, discrepancies: tuple[Discrepancy, ...] = (), process: str = "python3[7]") -> Audit:
    regions = (
        Region(7, process, 0x10000, 0x14000, 0x10, 0xFFFF, 3),
        Region(7, process, 0x20000, 0x21000, 0x11, 0xFFFF, 3),
    )
    return Audit("7.3.4", "x86_64", Counts(), discrepancies, 0, 4096, regions, pages)


def page(address: int, pfn: int, *, ksm: bool = False, reached: bool = True) -> Page:
    return Page(7, address, pfn, 1, ksm, reached, address >> 12)


def test_each_page_shows_its_frame_and_each_mapping_its_bounds_and_offset() -> None:
    said = texts(drawn(picture.Panel("now", audit(page(0x10000, 0xABC), page(0x11000, 0xABD), page(0x20000, 0xABE)))))
    assert {"abc", "abd", "abe"} <= set(said)
    assert {"0–4", "off 0", "16–17", "off 1"} <= set(said), "bounds and page offset, in pages from the first page"


def test_ksm_pages_that_share_a_frame_are_joined() -> None:
    shared = audit(page(0x10000, 5, ksm=True), page(0x11000, 6), page(0x20000, 5, ksm=True))
    joins = [
        each for each in drawn(picture.Panel("now", shared)).iter(f"{SVG}path") if each.find(f"{SVG}title") is not None
    ]
    assert len(joins) == 1
    apart = audit(page(0x10000, 5), page(0x20000, 5))
    assert not [
        each for each in drawn(picture.Panel("now", apart)).iter(f"{SVG}path") if each.find(f"{SVG}title") is not None
    ]


def test_the_audit_and_each_probe_tick_or_cross_each_mapping() -> None:
    pages = (page(0x10000, 5, ksm=True), page(0x20000, 5, ksm=True, reached=False))
    answers = {"move_pages": {(7, 0x10000): True, (7, 0x20000): False}}
    with_probe = picture.svg([picture.Panel("now", audit(*pages), answers)])
    alone = picture.svg([picture.Panel("now", audit(*pages))])
    cross, tick = "m0,-10 l-10,10", "l3.5,4 l7,-9"
    legend = 1
    assert (alone.count(tick), alone.count(cross)) == (1 + legend, 1 + legend)
    assert (with_probe.count(tick), with_probe.count(cross)) == (2 + legend, 2 + legend)
    assert "move_pages" in with_probe


def test_the_page_loads_nothing_and_escapes_text_from_the_guest() -> None:
    evil = "<script>alert(1)</script>[7]"
    found = Discrepancy(
        DiscrepancyKind.UNREACHABLE, Severity.ERROR, evil, "", 0x10000, 5, "a", "b", f"mapped by {evil}"
    )
    made = picture.html("a & b", [picture.Panel(evil, audit(page(0x10000, 5), discrepancies=(found,), process=evil))])
    assert "<script" not in made
    assert not re.search(r"(src|href)=", made)
    assert "unreachable mapping" in made


def test_only_so_many_pages_are_drawn_and_the_others_are_counted() -> None:
    region = (Region(7, "p[7]", 0, 4096 * 10_000, 0, 1, 3),)
    many = Audit("7", "x86_64", Counts(), (), 0, 4096, region, tuple(page(4096 * n, n + 1) for n in range(5000)))
    made = picture.svg([picture.Panel("now", many)])
    assert "… and 4840 more pages" in made


def test_the_gap_between_distant_pages_is_not_drawn() -> None:
    far = 4096 << 30
    region = (Region(7, "p[7]", 0, far + 4096, 0, 1, 3),)
    pages = (page(0, 1), page(far, 2))
    strip = picture._Strip(picture.Panel("now", Audit("7", "x86_64", Counts(), (), 0, 4096, region, pages)), 7)
    assert sorted(strip._slots) == [0, 4096, 8192, far - 8192, far - 4096, far]
    assert strip._slots[far] - strip._slots[0] > 5 * picture._CELL, "the hole shows"


def test_a_dump_is_audited_from_the_command_line(
    case: Case, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    vmlinux = (DUMPS / f"{NAMES[0]}.layout.json").read_text()
    Cache().file("layouts", "known", lambda path: path.write_text(vmlinux) and None)
    out = tmp_path / "picture.html"
    assert cli.main(["audit", str(case.path), "--picture", str(out), "--merges"]) == 0
    said = capsys.readouterr().out
    assert "rmap walks find every one of them" in said
    assert "different anon_vmas" in said
    assert "<svg" in out.read_text()


def test_an_error_in_the_reverse_map_fails_the_command(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    vmlinux = (DUMPS / f"{NAMES[0]}.layout.json").read_text()
    Cache().file("layouts", "known", lambda path: path.write_text(vmlinux) and None)
    at = case.member(case.page(case.scene.moved[1]), "folio.index")
    case.put(at, 7)
    case.path.with_name("broken").write_bytes(bytes(case.image.buffer))
    assert cli.main(["audit", str(case.path.with_name("broken"))]) == 1
    assert "wrong index" in capsys.readouterr().out


def test_a_process_that_is_not_in_the_dump_fails_the_command(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    vmlinux = (DUMPS / f"{NAMES[0]}.layout.json").read_text()
    Cache().file("layouts", "known", lambda path: path.write_text(vmlinux) and None)
    assert cli.main(["audit", str(case.path), "--pid", "99999"]) == 1
    assert "no process 99999" in capsys.readouterr().err


@pytest.mark.parametrize("audits", [0, 2])
def test_tests_that_cause_no_audit_fail_the_command(
    audits: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str], plugins: list[Any]) -> int:
        report = SimpleNamespace(user_properties=[("guest", "x"), ("audits", f"{audits} in 0.1 s")])
        plugins[0].pytest_runtest_logreport(report)
        return 0

    monkeypatch.setattr(pytest, "main", main)
    assert cli.main(["audit", "--kernel=debian:7.3", "-k", "x"]) == (0 if audits else 1)
    assert ("nothing was audited" in capsys.readouterr().err) == (not audits)


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (["/nonexistent"], 1, "cannot be read"),
        ([], 2, "give a dump"),
        (["dump", "--kernel=debian:"], 2, "-k"),
    ],
)
def test_wrong_options_are_reported_in_one_line(
    arguments: list[str], status: int, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", *arguments]) == status
    assert why in capsys.readouterr().err


def test_a_dump_of_an_unknown_kernel_needs_its_vmlinux(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", str(case.path)]) == 1
    assert "give --vmlinux" in capsys.readouterr().err


def test_a_guest_that_cannot_be_audited_is_told_why() -> None:
    from harness.agent import protocol
    from harness.deadline import Deadline

    answer = Auditor("there is no vmlinux").answer(None, protocol.Audit({"pids": "x"}), Deadline.after(1))
    assert answer.data == {"unavailable": "there is no vmlinux"}


def test_every_dump_has_its_scene_and_pages_are_kept_by_range() -> None:
    for name in NAMES:
        assert set(json.loads((DUMPS / f"{name}.scene.json").read_text())) >= {"ksm", "moved", "pid"}
    assert walk.pages_between([(7, 10, 20)])(7, 19)
    assert not walk.pages_between([(7, 10, 20)])(8, 19)
