# SPDX-License-Identifier: GPL-2.0
"""The audit of running guests: in place, from dumps of each format, and while a test runs.

It needs the debug information of Debian's kernels. Each is fetched once, and has about 350 MB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import arch
from harness.audit import debuginfo, dump, formats, walk
from harness.audit.layout import Layout
from harness.deadline import Deadline
from harness.debian.apt import Archive
from harness.host.cache import Cache
from harness.kernels import grammar, kernel
from harness.machine.vm import Vm
from tests.audit_scene import Scene, standing
from tests.lab import Lab

pytest.importorskip("drgn", reason="needs drgn: install the extra 'audit'")
pytestmark = pytest.mark.debuginfo

KERNELS = [("debian:7.3", "x86_64"), ("debian:6.12", "arm64")]


@pytest.fixture(scope="module", params=KERNELS, ids=lambda pair: "-".join(pair))
def guest(request: pytest.FixtureRequest) -> Iterator[tuple[Vm, Scene, Layout]]:
    spec, machine = request.param
    archive = Archive(Cache())
    chosen = grammar.parse(spec, arch.find(machine))
    assert isinstance(chosen, kernel.BootSpec)
    layout = debuginfo.layout_of(chosen.resolve(archive.cache, archive), archive, fetch=True)
    with standing(spec, machine) as (vm, scene):
        yield vm, scene, layout


def test_a_running_guest_is_audited_in_place_and_continues(guest: tuple[Vm, Scene, Layout]) -> None:
    vm, scene, layout = guest
    deadline = Deadline.after(60)
    with dump.memory_of(vm, deadline) as image:
        assert isinstance(image, dump.InPlace)
        assert not vm.qmp.execute("query-status", deadline)["running"]
        audit = walk.audit(image, layout, keep=lambda pid, at: pid == scene.pid and str(at) in scene.pfns)
    assert vm.qmp.execute("query-status", deadline)["running"]
    assert audit.errors == ()
    assert {str(page.address): page.pfn for page in audit.pages} == scene.pfns


@pytest.mark.parametrize("compressed", [False, True], ids=["raw", "compressed"])
def test_the_audit_of_a_dump_sees_the_pages_that_the_guest_saw(
    guest: tuple[Vm, Scene, Layout], tmp_path: Path, compressed: bool
) -> None:
    vm, scene, layout = guest
    path = tmp_path / "dump"
    dump.take(vm, path, Deadline.after(300), compressed=compressed)
    if compressed:
        assert path.stat().st_size < 320 << 20
    with formats.opened(path) as image:
        audit = walk.audit(image, layout, keep=lambda pid, at: pid == scene.pid and str(at) in scene.pfns)
    assert audit.errors == ()
    assert {str(page.address): page.pfn for page in audit.pages} == scene.pfns


MIDDLE = """
    from guest_tests.support.ksm_scenes import hugh
    from guest_tests.mm.mapping import move

    def test_looks_in_the_middle(audit, area, ksm):
        pair = hugh(area, ksm)
        audit.check()
        seen = audit.look("of the scene", pair.places)
        assert [seen.reached[place] for place in pair.places] == [True, True]
        assert len(set(seen.frames.values())) == 1

    def test_moves(area):
        move(area.map(0, 4).fill(), area.page(10))

    def test_moves_and_fails(area):
        move(area.map(0, 4).fill(), area.page(10))
        assert False, "the test's own reason"

    def test_moves_nothing(area):
        area.map(0, 4).fill()
"""


def test_the_guest_of_a_test_is_audited_while_the_test_runs(lab: Lab) -> None:
    outcome = lab.run(lab.write("test_middle.py", MIDDLE), "--audit=end", kernel="debian:7.3")
    assert outcome.verdicts == {
        "test_looks_in_the_middle": "PASS",
        "test_moves": "PASS",
        "test_moves_and_fails": "FAIL",
        "test_moves_nothing": "PASS",
    }
    audits = {case.name: case.properties["audits"].split()[0] for case in outcome.cases}
    assert audits == {
        "test_looks_in_the_middle": "3",
        "test_moves": "1",
        "test_moves_and_fails": "2",
        "test_moves_nothing": "0",
    }
    assert {case.properties["audit errors"] for case in outcome.cases} == {"0"}
    failed = outcome["test_moves_and_fails"]
    assert "the test's own reason" in failed.message
    assert "at the failure" in outcome.output
    assert "drawn in" in outcome.output


def test_a_test_that_needs_an_audit_is_skipped_without_the_option(lab: Lab) -> None:
    outcome = lab.run(lab.write("test_middle.py", MIDDLE), "-k", "looks or moves", kernel="debian:7.3")
    assert outcome["test_looks_in_the_middle"].outcome == "skipped"
    assert "--audit=end" in outcome["test_looks_in_the_middle"].message
    assert outcome["test_moves"].outcome == "passed"
    assert "audits" not in outcome["test_moves"].properties
