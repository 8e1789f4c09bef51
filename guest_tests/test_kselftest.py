# SPDX-License-Identifier: GPL-2.0
"""Upstream's own tests: ``--kselftest=merge``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest

from guest_tests.support import audited, kselftest, ktap
from guest_tests.support.kselftest import Broken, Outcome
from guest_tests.support.ktap import Verdict


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each name that ``--kselftest`` gives."""
    metafunc.parametrize("upstream", metafunc.config.getoption("--kselftest", []) or ["none"])


@pytest.fixture
def outcome(upstream: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Outcome:
    """How the program ended. It runs here, so that a test that says nothing of the kernel is an error in set-up."""
    try:
        return _run(upstream, request, record_property)
    except Broken as error:
        pytest.fail(str(error), pytrace=False)


def _run(upstream: str, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Outcome:
    test = kselftest.find(upstream)
    test.require()
    subtests = request.getfixturevalue("subtests") if hasattr(pytest, "Subtests") else None  # pytest 9

    def tell(result: ktap.Result, known: str) -> None:
        with subtests.test(result.name) if subtests else nullcontext():
            if subtests:
                _report(result, known)

    ended = kselftest.run(test, tell)
    record_property("kselftest", f"{ended.counts() or 'no subtest'}; {test.source}")
    return ended


@pytest.mark.kselftest
def test_program(outcome: Outcome, request: pytest.FixtureRequest) -> None:
    """No row: a program of tools/testing/selftests/mm.

    Every kernel: no subtest fails that is not known to, the program ends in time, and the reverse map is intact.
    """
    auditor = audited.auditor(request.config)
    if auditor is not None and request.config.getoption("--audit", "off") != "off":
        label = "after the program"
        if (seen := auditor.look(label)) is not None:
            audited.assert_clean(seen, label)
    if outcome.failures:
        pytest.fail("\n".join(outcome.failures), pytrace=False)
    if outcome.skipped:
        pytest.skip(outcome.skipped)


def _report(result: ktap.Result, known: str) -> None:
    """End a subtest as upstream's did."""
    if result.verdict is Verdict.SKIPPED:
        pytest.skip(result.reason or "it gives no reason")
    if result.verdict is Verdict.XFAILED or known:
        pytest.xfail(known or result.reason or "upstream expects it to fail")
    if result.verdict is Verdict.FAILED:
        pytest.fail("\n".join([f"not ok {result.number} {result.name}", *result.diagnostics]), pytrace=False)
