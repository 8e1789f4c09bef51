# SPDX-License-Identifier: GPL-2.0
"""The fixtures and hooks of guest tests, as a pytest plug-in.

A ``conftest.py`` in a directory of guest tests makes them available there with
``from guest_tests.support.fixtures import *``; ``-p guest_tests.support.fixtures`` does so for a whole run. Use one of
the two: with both, reports of failures have their evidence twice.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Final

import pytest

from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import memcg, system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, Mapping, carve_out
from guest_tests.mm.memcg import Memcg
from guest_tests.mm.probes import Probe
from guest_tests.support import audited
from guest_tests.support.audited import Audit, Watch
from guest_tests.support.evidence import Evidence
from guest_tests.support.found import usable
from guest_tests.support.observer import Observed

_EVIDENCE: Final = pytest.StashKey[Evidence]()
_WATCH: Final = pytest.StashKey[Watch]()


@pytest.fixture
def relocate(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> bool:
    """Whether mremap() of this kernel knows the relocation flags: which of a test's two expectations holds."""
    able = system.supports_relocate()
    callspec = getattr(request.node, "callspec", None)
    plain = callspec is not None and callspec.params.get("flags") == 0  # see moves.ways
    if not able and not plain:
        # A pass then shows only that the flag is refused. The comparison of kernels reads this property.
        record_property("lacks", "MREMAP_RELOCATE_ANON")
    return able


@pytest.fixture
def area() -> Iterator[CarveOut]:
    """A carve-out of 40 pages. It is unmapped at the end of the test."""
    with carve_out(40) as carved:
        yield carved


@pytest.fixture
def source(area: CarveOut) -> Mapping:
    """Five faulted pages at the beginning of the carve-out."""
    return area.map(0, 5).fill()


@pytest.fixture
def ksm() -> Iterator[Ksm]:
    """KSM under the test's control, with ksmd stopped. All knobs are restored in the end. Skips without CONFIG_KSM."""
    system.require_config("KSM")
    if not mm_ksm.available():
        pytest.skip(f"needs CONFIG_KSM=y: this kernel has no {mm_ksm.DIRECTORY}")
    with Ksm() as controlled:
        yield controlled


@pytest.fixture
def own_group() -> Iterator[Memcg | None]:
    """A control group that this process is in during the test; None where the kernel has no memory controller.

    Reclaim by group needs memory that was charged to a group of its own. A test that has its memory from other
    fixtures must ask for this one first: ``pytest.mark.usefixtures("own_group")`` does.
    """
    if not memcg.available():
        yield None
        return
    with Memcg("test") as group:
        group.enter()
        yield group


@pytest.fixture
def probe(request: pytest.FixtureRequest) -> Probe:
    """The probe that ``found.every_probe`` names. Skips the test if it cannot run here."""
    wanted: Probe = request.param
    return usable(wanted)


@pytest.fixture
def audit(request: pytest.FixtureRequest) -> Audit:
    """Audits of this guest's whole reverse map by the host, at moments that the test chooses."""
    found = audited.auditor(request.config)
    if found is None:
        pytest.skip("needs a guest whose host audits its memory: give --audit=end")
    return found


@pytest.fixture(autouse=True)
def observed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Observed:
    """Collects evidence in every test, and audits it if ``--audit`` asks for that."""
    if "probe" in request.fixturenames:
        # Before the other fixtures: where the kernel has no such walk, they would be set up in vain.
        request.getfixturevalue("probe")
    test = Observed(monkeypatch)
    request.node.stash[_EVIDENCE] = Evidence(test)
    mode = request.config.getoption("--audit", "off")
    found = audited.auditor(request.config)
    if found is not None and mode != "off":
        request.node.stash[_WATCH] = Watch(found, test, each_move=mode == "each-move")
    return test


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Audit moved memory at the end of the test function, while the memory is still there."""
    watch = pyfuncitem.stash.get(_WATCH, None)
    try:
        result = yield
    except pytest.skip.Exception:
        if watch is not None:
            watch.over()  # a probe may be unable to tell where an audit can
        raise
    except (Exception, pytest.fail.Exception):
        if watch is not None:
            watch.failed()
        raise
    if watch is not None:
        watch.over()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the evidence to the report of a failed test, while its carve-outs are still there."""
    report = yield
    if call.when == "call" and report.failed and _EVIDENCE in item.stash:
        report.sections += item.stash[_EVIDENCE].sections()
    return report
