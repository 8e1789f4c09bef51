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

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fdfdfc; --line: #d4d6da; --soft: #f1f2f4; --dim: #666b73;
        --good: #d9efdd; --known: #fdf0c8; --bad: #f8cfcb; --badink: #a3211a; --link: #1559a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe1e5; --paper: #17191c; --line: #3a3e45; --soft: #22252a; --dim: #989ea8;
          --good: #1d3b26; --known: #463a12; --bad: #58211d; --badink: #ff9d94; --link: #7db4f5; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 1.5rem auto;
       max-width: 110rem; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
a { color: var(--link); } .dim { color: var(--dim); } .bad { color: var(--badink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .6rem; white-space: nowrap; }
th { background: var(--soft); font-weight: 600; text-align: left; } thead th { vertical-align: bottom; }
td { text-align: right; } .list td { text-align: left; } td a { color: inherit; display: block; }
td.good { background: var(--good); } td.known { background: var(--known); }
td.surprise { background: var(--bad); font-weight: 600; }
article { border: 1px solid var(--line); border-left: 4px solid var(--line); border-radius: 4px; margin: .6rem 0;
          padding: .5rem .8rem; }
article.surprise { border-left-color: var(--badink); }
article:target, section:target > h3 { outline: 2px solid var(--link); outline-offset: 2px; }
article p { margin: .2rem 0; } code { overflow-wrap: anywhere; }
pre { background: var(--soft); overflow: auto; max-height: 32rem; padding: .6rem .8rem; font-size: 12.5px;
      line-height: 1.35; border-radius: 4px; }
summary { cursor: pointer; color: var(--link); }
"""


def page(reports: Sequence[Report], started: float, changes: Sequence[Change] | None, base: str) -> str:
    """The text of the page.

    :param started: when the matrix began, in seconds since the epoch.
    :param changes: since a recorded matrix; None if there was none to compare with.
    :param base: the name of that one.
    """
    return "\n".join(_page(reports, started, changes, base)) + "\n"


def _page(reports: Sequence[Report], started: float, changes: Sequence[Change] | None, base: str) -> Iterator[str]:
    when = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started))
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8"><title>Test matrix</title>'
    # Texts come from guests. They are escaped; should one not be, nothing in it may run or load.
    yield "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_STYLE}</style></head><body>"
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
    yield "</body></html>"


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
    yield '<div class="scroll"><table class="list"><thead><tr>'
    yield "".join(f"<th>{each}</th>" for each in ("kernel", "test", "before", "now")) + "</tr></thead><tbody>"
    for each in changes:
        texts = (each.cell, each.test, each.before, each.after)
        yield f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
    yield "</tbody></table></div>"


def _kernels(reports: Sequence[Report]) -> Iterator[str]:
    yield '<h2>Kernels</h2><div class="scroll"><table class="list"><thead><tr>'
    titles = ("cell", "release", "provenance", "accelerator", "machine", "time", "results")
    yield "".join(f"<th>{each}</th>" for each in titles) + "</tr></thead><tbody>"
    for each in reports:
        took = table.clock(each.seconds) if each.seconds else ""
        texts = (each.name, each.release, each.provenance, each.accelerator, each.host, took, str(each.state))
        yield f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
    yield "</tbody></table></div>"


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
        yield f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
    yield "</article>"
