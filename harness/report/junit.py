# SPDX-License-Identifier: GPL-2.0
"""Writes results as JUnit XML, in the form that Jenkins and GitLab read: one test suite for each kernel.

pytest's own ``--junitxml`` puts properties into each test, which the schema of Jenkins' xUnit plug-in does not allow.
Here they are in the test suite, which it does.
"""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator

from harness.report.artifacts import contents, place
from harness.report.record import Item
from harness.report.results import Outcome
from harness.report.runs import KernelRun, Run


def text(run: Run, *, artifacts: str = "") -> str:
    """The text of the file. A record that is not complete is an error of its own, so that nobody misses it.

    :param artifacts: the directory of ``--artifacts``, as the reader will name it; empty if there is none.
    """
    root = ET.Element("testsuites", name="mremap-harness")
    for kernel in run.kernels:
        root.append(_suite(run, kernel, artifacts))
    if run.missing:
        root.append(_missing(run))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ET.indent(root)
    return f"<?xml version='1.0' encoding='utf-8'?>\n{ET.tostring(root, encoding='unicode')}\n"


def _suite(run: Run, kernel: KernelRun, artifacts: str) -> ET.Element:
    cases = [_case(kernel.label, item, artifacts) for item in kernel.items]
    suite = _counted(kernel.label, cases)
    suite.set("time", f"{sum(item.duration for item in kernel.items):.3f}")
    suite.set("timestamp", time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(run.started)))
    properties = ET.SubElement(suite, "properties")
    facts = kernel.facts
    about = {
        "harness": run.harness,
        "kernel": facts.release,
        "version": facts.version,
        "arch": facts.arch,
        "provenance": facts.provenance,
        "accelerator": facts.accelerator,
        "spec": facts.spec,
    }
    for name, value in [*about.items(), *(("command", " ".join(each)) for each in run.commands)]:
        ET.SubElement(properties, "property", name=name, value=value)
    suite.extend(cases)
    return suite


def _counted(name: str, cases: list[ET.Element]) -> ET.Element:
    """A suite without its tests, with the numbers of them."""
    numbers = {tag: str(sum(each.find(tag) is not None for each in cases)) for tag in ("failure", "error", "skipped")}
    suite = ET.Element("testsuite", name=name, tests=str(len(cases)))
    suite.set("failures", numbers["failure"])
    suite.set("errors", numbers["error"])
    suite.set("skipped", numbers["skipped"])
    return suite


def _case(label: str, item: Item, artifacts: str) -> ET.Element:
    module, _, name = item.test.partition("::")
    # With the label, because readers take two tests of the same class and name for one.
    classname = f"{label}.{module.removesuffix('.py').replace('/', '.')}"
    case = ET.Element("testcase", classname=classname, name=name or module, time=f"{item.duration:.3f}")
    shown = list(item.sections)
    if item.failed:
        tag = "error" if item.outcome in (Outcome.ERROR, Outcome.MISS) else "failure"
        trouble = ET.SubElement(case, tag, type=item.verdict, message=item.message)
        trouble.text = shown.pop(0)[1] if shown else item.message
    elif item.outcome == Outcome.XFAILED:
        known = f"finding {item.finding}: {item.message}" if item.finding else item.message
        ET.SubElement(case, "skipped", type="expected failure", message=known)
    elif item.outcome == Outcome.SKIPPED:
        ET.SubElement(case, "skipped", type="skip", message=item.message)
    if item.failed and artifacts:
        shown.append(("files", "\n".join(_attachments(item, artifacts))))
    if shown:
        ET.SubElement(case, "system-out").text = "\n".join(f"--- {title} ---\n{text}\n" for title, text in shown)
    return case


def _attachments(item: Item, artifacts: str) -> Iterator[str]:
    """The files of a failure, as GitLab and Jenkins' JUnit Attachments plug-in find them in the output of a test."""
    for name in contents(item):
        yield f"[[ATTACHMENT|{artifacts.rstrip('/')}/{place(item).as_posix()}/{name}]]"


def _missing(run: Run) -> ET.Element:
    cases = []
    for number, why in enumerate(run.missing, 1):
        case = ET.Element("testcase", classname="harness", name=f"the record is complete ({number})", time="0.000")
        ET.SubElement(case, "error", type="MISS", message=why)
        cases.append(case)
    suite = _counted("the record", cases)
    suite.extend(cases)
    return suite
