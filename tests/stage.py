# SPDX-License-Identifier: GPL-2.0
"""What tests stage in a lab: guest tests that run in children of pytest, and some that differ between two kernels."""

from __future__ import annotations

#: Runs each guest test in a child of pytest, and tells it which kernel it is on.
STAGE = """
    import json
    import os

    from _pytest.runner import runtestprotocol

    from harness.judging.verdict import Observation, judge, missed
    from harness.pytest_plugin import session
    from harness.pytest_plugin.target import VirtualTarget
    from harness.pytest_plugin.testrun import Ran, TestRunner
    from harness.report.results import Facts, test_id


    def run(self, item, next_item):
        facts = Facts(label=self.target.label, test=test_id(item, str(self._tests.parent)))
        if "no_guest" in item.name and "7.3" in self.target.label:
            return Ran(missed(item, "no guest for this test"), facts)
        reader, writer = os.pipe()
        if os.fork() == 0:  # a guest: nothing that happens here is left in pytest
            os.environ["LAB_KERNEL"] = self.target.label
            session.kernel_label = lambda item: ""
            item.fixturenames = item._fixtureinfo.names_closure
            told = runtestprotocol(item, nextitem=None, log=False)
            told = [item.ihook.pytest_report_to_serializable(config=item.config, report=each) for each in told]
            os.write(writer, json.dumps(told).encode())
            os._exit(0)
        os.close(writer)
        with open(reader) as pipe:
            told = json.load(pipe)
        os.wait()
        return Ran(judge(item, Observation(told, None, "", (0, 0), [])), facts)


    VirtualTarget.prepare = lambda self: None
    TestRunner.prepare = lambda self, item: None
    TestRunner.run = run
"""

CHECKS = """
    import os

    import pytest


    @pytest.fixture
    def old():
        return os.environ["LAB_KERNEL"].startswith("debian:6.12")

    def test_whole():
        pass

    @pytest.mark.parametrize("order", [0, 9])
    def test_hole(old, order):
        assert not (old and order), "a page of the \\033[31mold\\033[0m kernel was lost"

    def test_walk(old):
        assert old, "the walk lost a page"

    def test_idle(old):
        if not old:
            pytest.skip("needs CONFIG_IDLE_PAGE_TRACKING")

    def test_relocates(old):
        if old:
            pytest.skip("needs MREMAP_RELOCATE_ANON")

    def test_no_guest():
        pass
"""
