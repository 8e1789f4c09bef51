# SPDX-License-Identifier: GPL-2.0
"""Prints the answer to the project's question in words, for ``--answer``.

Every part of it was measured in this run, on the kernel that it is about: by ``guest_tests/test_question.py``, and by
the tests that show the known findings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from harness.judging.findings import known
from harness.report.results import Outcome, Result

#: Columns that long evidence is wrapped to.
_WIDTH = 118

#: The property under which the tests record what they saw.
PROPERTY = "question"

#: What a record of each step holds; a walk that is not possible says so.
_SHAPES: dict[str, tuple[dict[str, type], ...]] = {
    "unmerge": ({"unmerged": bool, "from": int, "to": int, "pfn": list},),
    "walk": (
        {"probe": str, "missing": str},
        {"probe": str, "found": int, "places": int, "lost": list, "inconclusive": str, "evidence": str},
    ),
}


def records(results: Iterable[Result], label: str) -> list[dict[str, Any]]:
    """What was recorded on one kernel."""
    return [
        value
        for result in results
        if result.facts.label == label
        for name, value in result.records
        if name == PROPERTY and isinstance(value, dict) and _well_formed(value)
    ]


def _well_formed(record: dict[str, Any]) -> bool:
    """Whether a record is one: like all of a report it was written by the guest."""
    return any(
        all(isinstance(record.get(name), kind) for name, kind in shape.items())
        for shape in _SHAPES.get(str(record.get("step")), ())
    )


def answer(kernel: str, results: Sequence[Result], label: str, again: str) -> list[str]:
    """The answer for one kernel, as lines.

    :param kernel: what to call it: its release, architecture and accelerator.
    :param results: of the whole run.
    :param label: the kernel's label.
    :param again: the command that reproduces it.
    """
    seen = records(results, label)
    shown = [each for each in results if each.facts.label == label and each.facts.finding]
    return [
        f"Kernel {kernel}",
        "",
        *_unmerged([each for each in seen if each.get("step") == "unmerge"]),
        "",
        *_walks([each for each in seen if each.get("step") == "walk"]),
        "",
        *_findings(shown),
        "",
        "See it again:",
        f"  {again}",
    ]


def _findings(seen: Sequence[Result]) -> list[str]:
    question = "3. Which of the known bugs does this kernel have?"
    if not seen:
        return [f"{question}  No answer: no test for any of them ran."]
    told = [
        (finding, *_shows([each for each in seen if each.facts.finding == finding.name]))
        for finding in known().values()
    ]
    width = max(len(finding.name) for finding, _, _ in told)
    lines = [question, ""]
    for finding, shows, why in told:
        lines.append(f"   {finding.name:{width}}  {shows}")
        for text in (finding.summary, why):
            indent = " " * (width + 5)
            lines += textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
    return [*lines, "", "   docs/findings.md gives their causes, and the tests that show them."]


def _shows(seen: Sequence[Result]) -> tuple[str, str]:
    """Whether the tests for one finding show it, and the evidence."""
    by_outcome = {outcome: [each for each in seen if each.outcome is outcome] for outcome in Outcome}
    shown, passed = by_outcome[Outcome.XFAILED], by_outcome[Outcome.PASSED]
    broken = [each for each in seen if each.outcome in (Outcome.FAILED, Outcome.ERROR, Outcome.MISS)]
    ran = len(shown) + len(passed) + len(broken)
    if shown:
        return f"YES: {len(shown)} of {ran} tests show it.", shown[0].message
    if broken:
        return "Cannot tell: a test failed in another way.", broken[0].message
    if passed:
        return f"No: {ran} tests ran, and none shows it." if ran > 1 else "No: its test does not show it.", ""
    return "Cannot tell: no test for it can run here.", seen[0].message if seen else ""


def _unmerged(seen: Sequence[dict[str, Any]]) -> list[str]:
    question = "1. Does a move un-merge KSM pages first?"
    if not seen:
        return [f"{question}  No answer: the test did not get that far."]
    one = seen[0]
    before, after = (f"{pfn:#x}" if isinstance(pfn, int) else "none" for pfn in one["pfn"])
    verdict = "Yes." if one["unmerged"] else "NO: it stayed merged."
    detail = f"KSM page at {one['from']:#x}, PFN {before}; moved to {one['to']:#x} it has PFN {after}"
    return [f"{question}  {verdict}", f"   {detail} and is {'a page of its own' if one['unmerged'] else 'still KSM'}."]


def _walks(seen: Sequence[dict[str, Any]]) -> list[str]:
    question = "2. After KSM merged them again at the new place, does every reverse walk find every mapping?"
    told = [each for each in seen if "found" in each and not each["inconclusive"]]
    whole = [each for each in told if not each["lost"]]
    if not told:
        verdict = "No answer: no walk could be forced."
    elif len(whole) == len(told):
        verdict = f"Yes: all {len(told)} kinds of walk that can be forced here found all mappings."
    else:
        verdict = f"NO: {len(told) - len(whole)} of {len(told)} kinds of walk lost a mapping."
    rows = [("walk", "found", "evidence")]
    for each in seen:
        if "missing" in each:
            rows.append((each["probe"], "-", each["missing"]))
        elif each["inconclusive"]:
            rows.append((each["probe"], "?", each["inconclusive"]))
        else:
            rows.append((each["probe"], f"{each['found']} of {each['places']}", each["evidence"]))
    width = max(len(row[0]) for row in rows)
    lines = [question, f"   {verdict}", ""]
    for name, found, evidence in rows:
        head = f"   {name:{width}}  {found:7}  "
        lines += textwrap.wrap(evidence, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)) or [head]
    return lines
