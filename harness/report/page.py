# SPDX-License-Identifier: GPL-2.0
"""Writes results as one HTML page, which loads no other file and can be read without scripts.

What is shown is chosen by style sheets. The only script searches for a test, and its field appears if it runs.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from html import escape

from harness.report import answer, drawing, markup
from harness.report.compare import Change, Row
from harness.report.record import Item
from harness.report.results import Outcome
from harness.report.runs import Run

#: Characters of evidence that a page has. Beyond that the record has to be read.
_MOST_EVIDENCE = 24 << 20

#: Lists with more entries are folded.
_FEW_TESTS = 60


#: Characters of a message in tables. The failures have it all.
_CLIPPED = 160


class Kind(StrEnum):
    """What a test counts as on the page, what asks for attention first."""

    FAILED = "failed"
    MISSED = "missed"
    FINDING = "known finding"
    SKIPPED = "skipped"
    LACKING = "lacking"
    PASSED = "passed"
    NONE = "not run"


_KINDS = {
    Outcome.MISS: Kind.MISSED,
    Outcome.XFAILED: Kind.FINDING,
    Outcome.SKIPPED: Kind.SKIPPED,
    Outcome.LACKING: Kind.LACKING,
    Outcome.PASSED: Kind.PASSED,
}

_MARKS = {
    Kind.FAILED: "✗",
    Kind.MISSED: "?",
    Kind.FINDING: "f",
    Kind.SKIPPED: "–",
    Kind.LACKING: "○",
    Kind.PASSED: "✓",
    Kind.NONE: "",
}

_LEGEND = "✓ passed, ✗ failed, f known finding, – skipped, ○ passed as a kernel that lacks the ability, ? missed"

#: The look of each kind, see markup.STYLE.
_CLASSES = {Kind.FAILED: "surprise", Kind.MISSED: "surprise", Kind.FINDING: "known", Kind.PASSED: "good"}

#: The changes that have a style of their name.
_COLOURED = (Change.FIXED, Change.REGRESSED)

_STYLE = """
td.wraps { white-space: normal; overflow-wrap: anywhere; }
.filters { position: sticky; top: 0; z-index: 1; background: var(--paper); border-bottom: 1px solid var(--line);
           padding: .5rem 0; display: flex; flex-wrap: wrap; gap: .3rem 1rem; align-items: center; }
.filters label { white-space: nowrap; cursor: pointer; }
.filters input[type=search] { font: inherit; padding: .15rem .5rem; min-width: 18rem; }
.tests td { text-align: center; } .tests th[scope=row] { font-weight: 400; background: none; }
.tests th[scope=row] { white-space: normal; overflow-wrap: anywhere; }
.missing { border: 1px solid var(--badink); border-radius: 4px; padding: .5rem .8rem; color: var(--badink); }
.fixed { color: var(--ink); background: var(--good); } .regressed { color: var(--ink); background: var(--bad); }
.fixed, .regressed { border-radius: 3px; padding: 0 .35rem; }
.searched { display: none !important; }
"""

_SCRIPT = """
const field = document.getElementById('search');
field.hidden = false;
field.addEventListener('input', () => {
  const wanted = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const each of document.querySelectorAll('[data-test]')) {
    const name = each.dataset.test.toLowerCase();
    each.classList.toggle('searched', !wanted.every(word => name.includes(word)));
  }
  if (wanted.length) for (const each of document.querySelectorAll('details.module')) each.open = true;
});
"""


def text(run: Run) -> str:
    """The text of the page."""
    return "\n".join(_page(run)) + "\n"


def kind(item: Item | None) -> Kind:
    """What a test counts as; None is one that was not run."""
    if item is None:
        return Kind.NONE
    if item.failed and item.outcome != Outcome.MISS:
        return Kind.FAILED
    return _KINDS.get(Outcome(item.outcome), Kind.FAILED)


def _page(run: Run) -> Iterator[str]:
    yield from markup.head("Test results", f"{_STYLE}{drawing.STYLE}{''.join(_filter_rules(run))}", _SCRIPT)
    yield "<h1>Test results</h1>"
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(run.started))
    yield f'<p class="dim">{escape(when)}, mremap-harness {escape(run.harness)}</p>'
    for command in run.commands:
        yield f"<p><code>{escape(' '.join(command))}</code></p>"
    for note in run.missing:
        yield f'<p class="missing">Tests are missing: {escape(note)}.</p>'
    for note in run.notes:
        yield f'<p class="dim">{escape(note)}.</p>'
    yield from _kernels(run)
    yield from _comparison(run)
    yield from _probes(run)
    yield from _filters(run)
    yield from _failures(run)
    yield from _tests(run)
    yield from markup.tail(_SCRIPT)


def _kernels(run: Run) -> Iterator[str]:
    yield '<h2>Kernels</h2><div class="scroll"><table><thead><tr><th>kernel</th>'
    all_kinds = {kind(item) for item in run.items}
    shown = [each for each in Kind if each in all_kinds]
    yield "".join(f"<th>{each}</th>" for each in shown)
    yield "<th>time</th><th>release</th><th>under</th><th>provenance</th></tr></thead><tbody>"
    for kernel in run.kernels:
        counts = Counter(kind(item) for item in kernel.items)
        yield f'<tr><th scope="row">{escape(kernel.label)}</th>'
        for each in shown:
            look = f' class="{_CLASSES[each]}"' if counts[each] and each in _CLASSES else ""
            yield f"<td{look}>{counts[each] or ''}</td>"
        yield f"<td>{sum(item.duration for item in kernel.items):.0f} s</td>"
        facts = kernel.facts
        for value in (facts.release, facts.accelerator, facts.provenance):
            yield f'<td style="text-align: left">{escape(value)}</td>'
        yield "</tr>"
    yield "</tbody></table></div>"


def _comparison(run: Run) -> Iterator[str]:
    for label, rows in run.compared.items():
        counts = Counter(row.change for row in rows)
        yield f"<h2>{escape(label)} compared with {escape(run.baselines[label])}</h2>"
        yield f"<p>{escape(', '.join(f'{counts[each]} {each}' for each in Change if counts[each]))}.</p>"
        told = [
            row
            for change in (Change.REGRESSED, Change.FIXED, Change.NOT_COMPARED)
            for row in rows
            if row.change is change
        ]
        if told:
            shown = " open" if len(told) <= _FEW_TESTS else ""
            yield f"<details{shown}><summary>what changed</summary>"
            yield '<div class="scroll"><table class="list"><tbody>'
            yield from map(_changed, told)
            yield "</tbody></table></div></details>"


def _changed(row: Row) -> str:
    outcomes = f"{escape(str(row.baseline.outcome))} → {escape(str(row.other.outcome))}"
    why = f'<br><span class="dim">{escape(_clipped(row.why))}</span>' if row.why else ""
    change = f'<span class="{row.change}">{row.change}</span>' if row.change in _COLOURED else str(row.change)
    return f'<tr><td>{change}</td><td>{outcomes}</td><td class="wraps">{escape(row.test)}{why}</td></tr>'


def _clipped(text: str) -> str:
    return text if len(text) <= _CLIPPED else f"{text[:_CLIPPED]}…"


def _probes(run: Run) -> Iterator[str]:
    """What each forced walk of the question's tests found, if they ran."""
    seen: dict[str, dict[str, dict[str, object]]] = {}
    results = [item.result for item in run.items]
    for kernel in run.kernels:
        for each in answer.records(results, kernel.label):
            if each["step"] == "walk":
                seen.setdefault(each["probe"], {})[kernel.label] = each
    if not seen:
        return
    yield "<h2>Probes</h2><p>After a move, does each forced walk of the reverse map find each mapping?</p>"
    yield '<div class="scroll"><table class="list"><thead><tr><th>walk</th>'
    yield "".join(f"<th>{escape(each.label)}</th>" for each in run.kernels) + "</tr></thead><tbody>"
    for probe, by_kernel in seen.items():
        yield f'<tr><th scope="row">{escape(probe)}</th>'
        for kernel in run.kernels:
            yield _probe(by_kernel.get(kernel.label))
        yield "</tr>"
    yield "</tbody></table></div>"


def _probe(found: Mapping[str, object] | None) -> str:
    if found is None:
        return "<td></td>"
    if why := found.get("missing") or found.get("inconclusive"):
        return f'<td class="dim" title="{escape(str(why))}">? {escape(str(why))}</td>'
    lost = bool(found["lost"])
    told = f"{'✗' if lost else '✓'} {found['found']} of {found['places']}"
    return f'<td class="{"surprise" if lost else "good"}" title="{escape(str(found["evidence"]))}">{told}</td>'


# --- what is shown ---------------------------------------------------------------------------------------------------


def _filters(run: Run) -> Iterator[str]:
    counts = Counter(kind(item) for item in run.items)
    yield '<h2 id="tests">Tests</h2><div class="filters">'
    for each in Kind:
        if counts[each]:
            yield _checkbox(f"show-{each.name.lower()}", f"{_MARKS[each]} {counts[each]} {each}")
    if len(run.kernels) > 1:
        for number, kernel in enumerate(run.kernels):
            yield _checkbox(f"show-kernel-{number}", kernel.label)
        yield _checkbox("only-changed", "only what changed", checked=False)
    words = "search for a test"
    yield f'<input type="search" id="search" placeholder="{words}" aria-label="{words}" hidden></div>'


def _checkbox(name: str, label: str, *, checked: bool = True) -> str:
    on = " checked" if checked else ""
    return f'<label><input type="checkbox" id="{name}"{on}> {escape(label)}</label>'


def _filter_rules(run: Run) -> Iterator[str]:
    """Style rules that hide what is not chosen."""
    for each in Kind:
        name = each.name.lower()
        yield f"body:has(#show-{name}:not(:checked)) .is-{name} {{ display: none; }}\n"
    for number in range(len(run.kernels)):
        yield f"body:has(#show-kernel-{number}:not(:checked)) .kernel-{number} {{ display: none; }}\n"
    yield "body:has(#only-changed:checked) [data-test]:not(.changed) { display: none; }\n"


# --- failures --------------------------------------------------------------------------------------------------------


def _failures(run: Run) -> Iterator[str]:
    changes = _changes(run)
    room = _MOST_EVIDENCE
    for title, kinds in (("Failures", (Kind.FAILED, Kind.MISSED)), ("Known findings", (Kind.FINDING,))):
        told = [
            (number, item) for number, kernel in enumerate(run.kernels) for item in kernel.items if kind(item) in kinds
        ]
        if told:
            yield f"<section><h3>{title}</h3>"
        for number, item in told:
            size = sum(len(text) for _, text in item.sections)
            room -= size
            yield from _failure(number, item, changes.get((item.label, item.test)), evidence=room >= 0)
        if told:
            yield "</section>"


def _failure(number: int, item: Item, change: Change | None, *, evidence: bool) -> Iterator[str]:
    found = kind(item)
    classes = [f"is-{found.name.lower()}", f"kernel-{number}", "changed" if change else ""]
    classes += ["surprise" if found is not Kind.FINDING else ""]
    yield f'<article class="{" ".join(filter(None, classes))}" data-test="{escape(item.test)}">'
    known = f" ({item.finding})" if item.finding else ""
    yield f'<p><code>{escape(item.test)}</code> <span class="dim">on {escape(item.label)}</span> '
    yield f'<span class="{"dim" if found is Kind.FINDING else "bad"}">{found}{escape(known)}</span>'
    if change in _COLOURED:
        yield f' <span class="{change}">{change}</span>'
    yield "</p>"
    if item.message:
        yield f"<p>{escape(item.message)}</p>"
    if not evidence and item.sections:
        yield '<p class="dim">The page has no room for more evidence. The record has it.</p>'
    elif item.sections:
        yield from drawing.drawing(dict(item.sections))
        for title, text in item.sections:
            yield markup.evidence(title, text)
    yield "</article>"


def _changes(run: Run) -> Mapping[tuple[str, str], Change]:
    return {
        (label, row.test): row.change
        for label, rows in run.compared.items()
        for row in rows
        if row.change is not Change.SAME
    }


# --- all tests -------------------------------------------------------------------------------------------------------


def _tests(run: Run) -> Iterator[str]:
    found = [{item.test: item for item in kernel.items} for kernel in run.kernels]
    changed = {test for _, test in _changes(run)}
    modules: dict[str, list[str]] = {}
    for item in sorted(run.items, key=lambda item: item.test):
        tests = modules.setdefault(item.module, [])
        if not tests or tests[-1] != item.test:
            tests.append(item.test)
    few = sum(map(len, modules.values())) <= _FEW_TESTS
    yield f'<section><h3>All tests</h3><p class="dim">{_LEGEND}.</p>'
    for module, tests in modules.items():
        yield from _module(run, module, tests, found, changed, opened=few)
    yield "</section>"


def _module(
    run: Run,
    module: str,
    tests: Sequence[str],
    found: Sequence[Mapping[str, Item]],
    changed: Iterable[str],
    *,
    opened: bool,
) -> Iterator[str]:
    counts = Counter(kind(each[test]) for each in found for test in tests if test in each)
    numbers = ", ".join(f"{counts[each]} {each}" for each in Kind if counts[each])
    shown = " open" if opened else ""
    yield f'<details class="module"{shown}><summary><code>{escape(module)}</code>: {numbers}</summary>'
    yield '<div class="scroll"><table class="tests"><thead><tr><th>test</th>'
    for number, kernel in enumerate(run.kernels):
        yield f'<th class="kernel-{number}">{escape(kernel.label)}</th>'
    yield "</tr></thead><tbody>"
    for test in tests:
        yield _row(test, [each.get(test) for each in found], changed=test in changed)
    yield "</tbody></table></div></details>"


def _row(test: str, items: Sequence[Item | None], *, changed: bool) -> str:
    kinds = [kind(each) for each in items]
    # A row is shown as what asks for attention first in it.
    worst = min(kinds, key=list(Kind).index)
    classes = f"is-{worst.name.lower()}{' changed' if changed else ''}"
    name = test.partition("::")[2] or test
    cells = "".join(_cell(number, *each) for number, each in enumerate(zip(items, kinds, strict=True)))
    return f'<tr class="{classes}" data-test="{escape(test)}"><th scope="row">{escape(name)}</th>{cells}</tr>'


def _cell(number: int, item: Item | None, found: Kind) -> str:
    look = _CLASSES.get(found, "dim")
    why = f' title="{escape(_clipped(item.message))}"' if item is not None and item.message else ""
    return f'<td class="{look} kernel-{number}" aria-label="{found}"{why}>{_MARKS[found]}</td>'
