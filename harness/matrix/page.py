# SPDX-License-Identifier: GPL-2.0
"""Draws the results of a matrix as one HTML page that needs no script and no other file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from harness.matrix import table
from harness.matrix.changes import Change
from harness.matrix.outcome import SURPRISES, Kind, OneTest, Report, State, modules
from harness.report import markup


def page(reports: Sequence[Report], started: float, changes: Sequence[Change] | None, base: str) -> str:
    """The text of the page.

    :param started: when the matrix began, in seconds since the epoch.
    :param changes: since a recorded matrix; None if there was none to compare with.
    :param base: the name of that one.
    """
    return "\n".join(_page(reports, started, changes, base)) + "\n"


def _page(reports: Sequence[Report], started: float, changes: Sequence[Change] | None, base: str) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started))
    yield from markup.head("Test matrix")
    yield "<h1>Test matrix</h1>"
    yield f'<p class="dim">{escape(when)}</p>'
    yield f"<p>{escape(table.total(reports))}.</p>"
    yield f'<p class="dim">In the table: {escape(table.LEGEND)}. A coloured number leads to its failures.</p>'
    yield from _table(reports)
    if changes is not None:
        yield from _changes(changes, base)
    yield from _kernels(reports)
    # Those that somebody has to look at come first.
    for number, each in sorted(enumerate(reports), key=lambda numbered: not numbered[1].surprises):
        yield from _cell(number, each)
    yield from markup.tail()


def _table(reports: Sequence[Report]) -> Iterator[str]:
    yield '<div class="scroll"><table><thead><tr><th>module</th>'
    for number, each in enumerate(reports):
        yield f'<th scope="col"><a href="#cell-{number}">{_heading(each)}</a></th>'
    yield "</tr></thead><tbody>"
    for name in modules(reports):
        yield f'<tr><th scope="row">{escape(name)}</th>'
        for number, each in enumerate(reports):
            yield _number(each.counts(name), _anchor(number, name))
        yield "</tr>"
    yield '<tr><th scope="row">all</th>'
    for number, each in enumerate(reports):
        yield _number(each.counts(), f"cell-{number}", broken=bool(each.trouble), not_run=each.state is State.NOT_RUN)
    yield "</tr></tbody></table></div>"


def _heading(report: Report) -> str:
    kernel = f"{report.kernel}:{report.preset}" if report.preset else report.kernel
    return "<br>".join(escape(each) for each in (kernel, report.arch, report.options) if each)


def _number(counts: Counter[Kind], anchor: str, *, broken: bool = False, not_run: bool = False) -> str:
    text = escape(table.numbers(counts))
    if broken:
        text = f"{text} broken" if counts else "broken"
    elif not_run:
        return '<td class="dim">not run</td>'
    if broken or any(counts[kind] for kind in SURPRISES):
        return f'<td class="surprise"><a href="#{anchor}">{text}</a></td>'
    if counts[Kind.FINDING]:
        return f'<td class="known"><a href="#{anchor}">{text}</a></td>'
    return f'<td class="good">{text}</td>' if counts else f"<td>{text}</td>"


def _anchor(number: int, module: str) -> str:
    return f"cell-{number}-{escape(module)}"


def _changes(changes: Sequence[Change], base: str) -> Iterator[str]:
    yield f"<h2>Changes since {escape(base)}</h2>"
    if not changes:
        yield "<p>No test has another outcome.</p>"
        return
    rows = [(each.cell, each.test, each.before, each.after) for each in changes]
    yield from markup.table(("kernel", "test", "before", "now"), rows)


def _kernels(reports: Sequence[Report]) -> Iterator[str]:
    yield "<h2>Kernels</h2>"
    rows = []
    for each in reports:
        took = table.clock(each.seconds) if each.seconds else ""
        rows.append((each.name, each.release, each.provenance, each.accelerator, each.host, took, str(each.state)))
    yield from markup.table(("cell", "release", "provenance", "accelerator", "machine", "time", "results"), rows)


def _cell(number: int, report: Report) -> Iterator[str]:
    yield f'<section id="cell-{number}"><h2>{escape(report.name)}</h2>'
    yield f"<p>{escape(table.cell_line(report).removeprefix(report.name + ': '))}</p>"
    if report.trouble:
        yield f'<p class="bad">{escape(report.trouble)}</p>'
    for why in report.reruns:
        yield f"<p>{escape(why)}</p>"
    if report.output:
        yield f"<details><summary>what pytest printed last</summary><pre>{escape(report.output)}</pre></details>"
    told = [test for kinds in (SURPRISES, [Kind.FINDING]) for test in report.tests if test.kind in kinds]
    for module in dict.fromkeys(test.module for test in told):
        yield f'<section id="{_anchor(number, module)}"><h3>{escape(module)}</h3>'
        for test in sorted(
            (each for each in told if each.module == module), key=lambda each: each.kind is Kind.FINDING
        ):
            yield from _test(test)
        yield "</section>"
    yield "</section>"


def _test(test: OneTest) -> Iterator[str]:
    surprise = test.kind in SURPRISES
    known = f" ({test.finding})" if test.finding else ""
    yield f"<article{' class=surprise' if surprise else ''}>"
    yield f'<p><code>{escape(test.test)}</code> <span class="{"bad" if surprise else "dim"}">'
    yield f"{escape(str(test.kind))}{escape(known)}</span></p>"
    if test.message:
        yield f"<p>{escape(test.message)}</p>"
    for title, text in test.sections:
        yield markup.evidence(title, text)
    yield "</article>"
