# SPDX-License-Identifier: GPL-2.0
"""JUnit XML: valid against a schema, with the evidence of failures, whatever a guest printed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import xmlschema

from harness.host import safe_text
from harness.report import junit
from harness.report.artifacts import Artifacts
from harness.report.runs import Run
from tests.recorded import MIXED, NEW, OLD, hostile, line, run

SCHEMA = xmlschema.XMLSchema(str(Path(__file__).with_name("junit.xsd")))


def document(recorded: Run, artifacts: str = "") -> ET.Element:
    """The document of a run, which has to be valid."""
    text = junit.text(recorded, artifacts=artifacts)
    SCHEMA.validate(text)
    return ET.fromstring(text)


def case(root: ET.Element, name: str) -> ET.Element:
    (found,) = (each for each in root.iter("testcase") if each.get("name") == name)
    return found


def test_each_outcome_has_its_element() -> None:
    root = document(run(*MIXED))
    assert {each.get("name"): [child.tag for child in each] for each in root.iter("testcase")} == {
        "test_passes": [],
        "test_lacks": [],
        "test_fails[1]": ["failure", "system-out"],
        "test_skips": ["skipped"],
        "test_shows": ["skipped"],
        "test_fixed": ["failure"],
        "test_misses": ["error"],
        "test_breaks": ["error"],
    }
    (suite,) = root
    assert [suite.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["8", "2", "2", "2"]
    assert [root.get(name) for name in ("tests", "failures", "errors")] == ["8", "2", "2"]
    assert suite.get("time") == "10.000"


def test_a_failure_has_its_message_its_text_and_its_evidence() -> None:
    found = case(document(run(*MIXED)), "test_fails[1]")
    assert found.get("classname") == f"{OLD.label}.guest_tests.test_a"
    failure = found.find("failure")
    assert failure is not None
    assert (failure.get("type"), failure.get("message")) == ("FAIL", "lost a page")
    assert failure.text == "E   lost a page\n    assert 1 == 2"
    evidence = found.findtext("system-out", "")
    for each in ("--- kernel console ---", "BUG: Bad page state", "--- machine ---", "--- run it again ---\npytest "):
        assert each in evidence


def test_the_files_of_a_failure_are_attached(tmp_path: Path) -> None:
    root = document(run(*MIXED), artifacts=str(tmp_path))
    run_files = Artifacts(tmp_path)
    for item in MIXED:
        run_files.add(item)
    for name in ("test_fails[1]", "test_misses"):
        attached = re.findall(r"\[\[ATTACHMENT\|(.*)\]\]", case(root, name).findtext("system-out", ""))
        assert attached
        assert all(Path(each).is_file() for each in attached)
    assert case(root, "test_passes").find("system-out") is None


def test_an_expected_finding_is_skipped_by_its_name() -> None:
    skipped = case(document(run(*MIXED)), "test_shows").find("skipped")
    assert skipped is not None
    assert skipped.get("message") == "finding kpageflags-ksm: the walk does not find it"


def test_the_kernel_is_a_property_of_its_suite() -> None:
    root = document(run(line("test_one"), line("test_one", kernel=NEW), kernels=(OLD, NEW)))
    assert [each.get("name") for each in root] == [OLD.label, NEW.label]
    properties = {each.get("name"): each.get("value") for each in root[1].iter("property")}
    assert properties["kernel"] == NEW.release
    assert properties["provenance"] == NEW.provenance
    assert properties["command"] == "pytest --kernel=debian:6.12"


def test_two_kernels_have_no_test_of_the_same_class_and_name() -> None:
    root = document(run(line("test_one"), line("test_one", kernel=NEW), kernels=(OLD, NEW)))
    names = [(each.get("classname"), each.get("name")) for each in root.iter("testcase")]
    assert len(set(names)) == len(names) == 2


def test_a_run_that_was_cut_short_is_an_error() -> None:
    root = document(run(line("test_one"), status=None))
    assert root.get("errors") == "1"
    error = case(root, "the record is complete (1)").find("error")
    assert error is not None
    assert "cut short" in error.get("message", "")


def test_what_a_hostile_guest_printed_stays_text() -> None:
    root = document(run(*hostile()))
    assert root.get("tests") == "4"
    assert {each.tag for each in root.iter()} <= {
        *("testsuites", "testsuite", "testcase", "properties", "property"),
        *("failure", "error", "skipped", "system-out"),
    }
    evidence = case(root, "test_0[# SKIP <b>]").findtext("system-out", "")
    assert "]]> </failure></testsuites> &amp; <!-- <b>bold</b>" in evidence
    assert evidence == safe_text.escape(evidence, columns=1 << 30)


def test_control_characters_that_are_not_escaped_are_noticed() -> None:
    with pytest.raises(ET.ParseError):
        document(run(line("test_one", "failed", "\x1b[31mred")))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('<testcase classname="', '<testcase group_name="'),
        ("<failure ", "<failures "),
        ('<property name="kernel" value=', '<property name="kernel" values='),
        ('time="10.000"', 'time="ten"'),
    ],
)
def test_the_schema_notices_what_it_does_not_allow(old: str, new: str) -> None:
    text = junit.text(run(*MIXED))
    assert old in text
    broken = text.replace(old, new).replace("</failure>", "</failures>" if "failures " in new else "</failure>")
    assert not SCHEMA.is_valid(broken)


def test_properties_of_a_test_as_pytest_writes_them_are_not_valid() -> None:
    """The reason for a writer of our own beside ``--junitxml``."""
    text = junit.text(run(line("test_one")))
    assert not SCHEMA.is_valid(text.replace('time="1.250" />', 'time="1.250"><properties /></testcase>'))
