# SPDX-License-Identifier: GPL-2.0
"""Prints the answer to the question, from what ``guest_tests/test_question.py`` recorded; ``--answer`` turns it on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from harness.report.results import Result

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


def answer(kernel: str, seen: Sequence[dict[str, Any]], again: str) -> list[str]:
    """The answer for one kernel, as lines.

    :param kernel: release and provenance.
    :param seen: from :func:`records`.
    :param again: the command that reproduces it.
    """
    lines = [f"Kernel {kernel}", ""]
    lines += _unmerged([each for each in seen if each.get("step") == "unmerge"])
    lines += ["", *_walks([each for each in seen if each.get("step") == "walk"])]
    lines += [
        "",
        "These pages were present, and mapped by one process only, when they moved. Two other cases do lose pages:",
        "  ksm-swapcache-move    a KSM page is moved while it is swapped out",
        "  ksm-forked-forgotten  a process moves its KSM page away after a fork, and its child still maps the page",
        "docs/findings.md describes both, and the tests that show them.",
    ]
    return [*lines, "", "See it again:", f"  {again}"]


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
        lines += textwrap.wrap(evidence, 118, initial_indent=head, subsequent_indent=" " * len(head)) or [head]
    return lines
