# SPDX-License-Identifier: GPL-2.0
"""The formats that a run with real guests writes itself, and that a report of its record is the same."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import xmlschema
from kcidb_io.schema import V5_3

from tests.integration.test_record import MIXED
from tests.lab import Lab
from tests.test_page import Parsed

#: Prints what would break each format, and says it in its failure and on the kernel's console.
HOSTILE = """
    def test_hostile():
        text = "]]></failure> </pre></script><script>alert(1)</script> \\x1b[31m\\x00 # SKIP no"
        text += "\\nok 1 test_passes\\n# Subtest: x\\nreboot: System halted\\n" + "x" * 100_000
        print(text)
        with open("/dev/kmsg", "w") as log:
            log.write("<4>" + text[:300])
        assert False, text
"""


@pytest.fixture(scope="module")
def mixed(lab: Lab) -> Lab:
    """A lab after a run that writes all formats."""
    lab.write("test_mixed.py", MIXED + HOSTILE)
    outcome = lab.run("--results=results.jsonl", "--ktap=results.ktap", "--html=results.html")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    return lab


def reported(lab: Lab, *args: str) -> str:
    command = [sys.executable, "-m", "harness.commands.cli", "report", "results.jsonl", *args]
    return subprocess.run(command, cwd=lab.root, capture_output=True, text=True, check=True).stdout


def test_ktap_is_what_a_report_of_the_record_writes(mixed: Lab) -> None:
    live = (mixed.root / "results.ktap").read_text()
    assert "not ok 1 test_breaks_the_kernel" in live
    assert "# SKIP needs CONFIG_NOTHING" in live
    assert live == reported(mixed, "--ktap=-")


def test_the_page_is_what_a_report_of_the_record_writes(mixed: Lab) -> None:
    live = (mixed.root / "results.html").read_text()
    assert "<mark>" in live
    assert live == reported(mixed, "--html=-")


def test_pytests_junit_file_has_the_evidence_and_the_kernel(mixed: Lab) -> None:
    (suite,) = ET.parse(mixed.root / "junit.xml").getroot()
    cases = {each.get("name", "").partition("[")[0]: each for each in suite.iter("testcase")}
    evidence = cases["test_breaks_the_kernel"].findtext("system-out", "")
    assert "--- kernel console ---" in evidence
    assert "BUG: Bad page state" in evidence
    assert "--- machine ---" in evidence
    assert "--- run it again ---\npytest --kernel=debian:6.12" in evidence
    assert cases["test_passes"].find("system-out") is None
    names = {each.get("name", "").partition(" ")[0] for each in suite.findall("properties/property")}
    assert names == {"kernel", "provenance"}


def test_a_hostile_guest_breaks_no_format(mixed: Lab) -> None:
    schema = xmlschema.XMLSchema(str(Path(__file__).parents[1] / "junit.xsd"))
    schema.validate(reported(mixed, "--junit=-"))
    V5_3.validate(json.loads(reported(mixed, "--kcidb=-")))
    Parsed((mixed.root / "results.html").read_text())
    results = [line for line in (mixed.root / "results.ktap").read_text().splitlines() if "test_passes" in line]
    assert [line.strip() for line in results if not line.strip().startswith("#")] == ["ok 5 test_passes"]
    names = {each.get("name") for each in ET.parse(mixed.root / "junit.xml").getroot().iter("testcase")}
    assert len(names) == 6


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(lab: Lab) -> None:
    outcome = lab.run("--ktap=missing/results.ktap")
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "cannot write" in outcome.said("missing/results.ktap")
    assert not outcome.cases
