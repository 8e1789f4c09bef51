# SPDX-License-Identifier: GPL-2.0
"""Writes results as KTAP, version 1: kernels, their modules, and their tests, each level nested in the one above.

The format is defined in Documentation/dev-tools/ktap.rst of the kernel. ``tools/testing/kunit/kunit.py parse`` (Linux
7.3) reads it, and is more particular than the definition in some places. They are named below.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from harness.errors import LostCondition
from harness.report.record import Item
from harness.report.results import LACKS, Outcome
from harness.report.runs import KernelRun, Run

_VERSION = "KTAP version 1"

#: kunit.py takes a line with one of these anywhere for the end of the log (KTAP_END in kunit_parser.py). Guests print
#: them.
_ENDS = re.compile(r"(List of all partitions:|Kernel panic - not syncing: VFS:|reboot: System halted)")


@dataclass(frozen=True)
class _Node:
    """A test, or a group of tests."""

    name: str
    ok: bool
    #: a keyword and its reason, such as "SKIP needs CONFIG_KSM"; empty for a plain result
    directive: str = ""
    #: lines about it, without the "#"
    diagnostics: Sequence[str] = ()
    #: None for a test
    children: Sequence[_Node] | None = field(default=None)


def text(run: Run) -> str:
    """The text of the file. A record that is not complete is a failed test of its own, so that nobody misses it."""
    nodes = [_kernel(each) for each in run.kernels]
    nodes += [_Node("the record is complete", ok=False, directive=f"ERROR {each}") for each in run.missing]
    about = [f"mremap-harness {run.harness}", *(" ".join(each) for each in run.commands), *run.notes]
    return "".join(f"{line}\n" for line in (_VERSION, *_diagnostics(about), *_plan(nodes, "")))


def _kernel(run: KernelRun) -> _Node:
    facts = run.facts
    modules = [_group(name, [_test(item) for item in items]) for name, items in run.modules.items()]
    about = (facts.release, facts.arch, facts.accelerator, facts.provenance)
    return _group(run.label, modules, [f"kernel: {', '.join(filter(None, about))}"])


def _group(name: str, children: Sequence[_Node], diagnostics: Sequence[str] = ()) -> _Node:
    skipped = all(each.directive.startswith("SKIP") for each in children)
    directive = "SKIP no test of it ran" if skipped else ""
    return _Node(name, all(each.ok for each in children), directive, diagnostics, children)


def _test(item: Item) -> _Node:
    name = item.test.partition("::")[2] or item.test
    if item.outcome in (Outcome.MISS, Outcome.ERROR):
        return _Node(name, False, f"ERROR {item.message}", _evidence(item))
    if item.failed:
        late = item.message.startswith(f"guest lost ({LostCondition.TEST_TIMEOUT})")
        return _Node(name, False, f"TIMEOUT {item.message}" if late else "", _evidence(item))
    if item.outcome == Outcome.SKIPPED:
        return _Node(name, True, f"SKIP {item.message}")
    if item.outcome == Outcome.XFAILED:
        # As kselftest writes it. kunit.py knows no directive but SKIP, and takes this for a passed test.
        known = f"finding {item.finding}: {item.message}" if item.finding else item.message
        return _Node(name, True, f"XFAIL {known}", [known])
    if item.outcome == Outcome.LACKING:
        lacks = next((str(value) for key, value in item.properties if key == LACKS), "the ability")
        return _Node(name, True, "", [f"passed as a kernel that lacks {lacks}"])
    return _Node(name, True)


def _evidence(item: Item) -> list[str]:
    """The message, and the sections with their titles."""
    lines = [item.message]
    for title, text in item.sections:
        lines += [f"{title}:", *(f"  {line}" for line in text.split("\n"))]
    return lines


def _plan(nodes: Sequence[_Node], indent: str) -> Iterator[str]:
    yield f"{indent}1..{len(nodes)}"
    for number, node in enumerate(nodes, 1):
        yield from _node(node, number, indent)


def _node(node: _Node, number: int, indent: str) -> Iterator[str]:
    name = _name(node.name)
    below = f"{indent}  "
    if node.children:
        yield f"{below}{_VERSION}"
        yield f"{below}# Subtest: {name}"
        yield from _diagnostics(node.diagnostics, below)
        yield from _plan(node.children, below)
    else:  # kunit.py takes a plan without tests for an error, so a group without any is written like a test
        yield from _diagnostics(node.diagnostics, indent)
    directive = f" # {_one_line(node.directive)}" if node.directive else ""
    yield f"{indent}{'ok' if node.ok else 'not ok'} {number} {name}{directive}"


def _diagnostics(lines: Sequence[str], indent: str = "") -> Iterator[str]:
    # Two blanks, because kunit.py takes "# Subtest: " for the beginning of a test, whoever printed it.
    yield from (f"{indent}#  {_harmless(line)}".rstrip() for each in lines for line in each.split("\n"))


def _name(text: str) -> str:
    # A "#" begins the directive.
    return _one_line(text).replace("#", "_") or "unnamed"


def _one_line(text: str) -> str:
    return _harmless(" ".join(text.split()).replace("# ", "_ "))


def _harmless(line: str) -> str:
    """A line without the words that end the log. A second blank before the last word keeps it readable."""
    return _ENDS.sub(lambda match: "  ".join(match[0].rsplit(" ", 1)), line)
