# SPDX-License-Identifier: GPL-2.0
"""What all tests share: places for memory, KSM under control, whether the kernel relocates, evidence on failure."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Final

import pytest

from guest_tests import audited
from guest_tests.audited import Audit, Watch
from guest_tests.evidence import Evidence
from guest_tests.mm import ksm as mm_ksm
from guest_tests.mm import system
from guest_tests.mm.ksm import Ksm
from guest_tests.mm.mapping import CarveOut, carve_out

_EVIDENCE: Final = pytest.StashKey[Evidence]()
_WATCH: Final = pytest.StashKey[Watch]()


@pytest.fixture
def relocate(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> bool:
    """Whether mremap() of this kernel knows the relocation flags: which column of a test's expectations holds."""
    able = system.supports_relocate()
    callspec = getattr(request.node, "callspec", None)
    plain = callspec is not None and callspec.params.get("flags") == 0  # see relocation.ways
    if not able and not plain:
        record_property("lacks", "MREMAP_RELOCATE_ANON")  # what passes shows no ability: the comparison of kernels asks
    return able


@pytest.fixture
def area() -> Iterator[CarveOut]:
    """A carve-out of 40 pages, unmapped in the end."""
    with carve_out(40) as carved:
        yield carved


@pytest.fixture
def ksm() -> Iterator[Ksm]:
    """KSM under control, with ksmd standing still; every knob is restored in the end. Skips without CONFIG_KSM."""
    system.require_config("KSM")
    if not mm_ksm.available():
        pytest.skip(f"needs CONFIG_KSM=y: this kernel has no {mm_ksm.DIRECTORY}")
    with Ksm() as controlled:
        yield controlled


@pytest.fixture
def audit(request: pytest.FixtureRequest) -> Audit:
    """Has this guest's whole reverse map audited from outside, at an instant the test chooses."""
    found = audited.auditor(request.config)
    if found is None:
        pytest.skip("needs a guest: its memory is audited from outside")
    return found


@pytest.fixture(autouse=True)
def _audited(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    mode = request.config.getoption("--audit", "off")
    found = audited.auditor(request.config)
    if found is not None and mode != "off":
        request.node.stash[_WATCH] = Watch(found, monkeypatch, each_move=mode == "each-move")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Audit what a test moved while it is still there, as a part of the test."""
    watch = pyfuncitem.stash.get(_WATCH, None)
    try:
        result = yield
    except pytest.skip.Exception:
        if watch is not None:
            watch.over()  # a probe may be unable to tell, the audit is not
        raise
    except (Exception, pytest.fail.Exception):
        if watch is not None:
            watch.failed()
        raise
    if watch is not None:
        watch.over()
    return result


@pytest.fixture(autouse=True)
def _evidence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    request.node.stash[_EVIDENCE] = Evidence(monkeypatch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach evidence to the report of a test that failed, while its carve-outs are still there."""
    report = yield
    if call.when == "call" and report.failed and _EVIDENCE in item.stash:
        report.sections += item.stash[_EVIDENCE].sections()
    return report
