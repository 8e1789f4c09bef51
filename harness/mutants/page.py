# SPDX-License-Identifier: GPL-2.0
"""Draws what became of mutants as one HTML page that needs no script and no other file."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from harness.build.mutants import Mutant
from harness.matrix.table import clipped, plural
from harness.mutants import table
from harness.mutants.outcome import Result, Score, State
from harness.report import markup

_COLOURS = {State.KILLED: "good", State.EQUIVALENT: "known", State.SURVIVED: "surprise", State.UNDECIDED: "surprise"}

_STYLE = """
.list td { white-space: normal; vertical-align: top; }
.list code { font-size: 12px; overflow-wrap: normal; }
.list td:nth-child(1), .list td:nth-child(3) { white-space: pre; }
.list td:nth-child(5) { min-width: 34rem; }
"""

#: How much is shown of the first line of a failure, in characters.
_MESSAGE = 240


def page(scores: Sequence[Score], mutants: Mapping[str, Mutant], started: float) -> str:
    """The text of the page.

    :param mutants: those of the results, by name.
    :param started: when the run began, in seconds since the epoch.
    """
    return "\n".join(_page(scores, mutants, started)) + "\n"


def _page(scores: Sequence[Score], mutants: Mapping[str, Mutant], started: float) -> Iterator[str]:
    yield from markup.head("Mutants", _STYLE)
    yield "<h1>Mutants</h1>"
    yield f'<p class="dim">{time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(started))}</p>'
    yield "<p>Each mutant is a deliberate bug that is active while the guest tests run. A mutant is killed when a test "
    yield "that reaches its place fails.</p>"
    for score in scores:
        yield f"<h2>{escape(score.kernel)} {escape(score.arch)}</h2>"
        yield f"<p>{escape(table.total(score))}.</p>"
        yield f'<p class="dim">{escape(score.release)}, {escape(score.accelerator)}</p>'
        yield from _table(score, mutants)


def _table(score: Score, mutants: Mapping[str, Mutant]) -> Iterator[str]:
    heads = ("mutant", "breaks", "in", "state", "by", "seconds")
    yield '<div class="scroll"><table class="list"><thead><tr>'
    yield "".join(f"<th>{each}</th>" for each in heads) + "</tr></thead><tbody>"
    for group in dict.fromkeys(each.group for each in score.results):
        yield f'<tr><th colspan="{len(heads)}">{escape(group)}</th></tr>'
        for each in score.results:
            if each.group == group:
                yield from _row(each, mutants[each.name])
    yield "</tbody></table></div>"


def _row(result: Result, mutant: Mutant) -> Iterator[str]:
    real = f'<br><span class="dim">a bug once, fixed by {escape(mutant.commit)}</span>' if mutant.commit else ""
    yield f"<tr><td><code>{escape(result.name)}</code></td><td>{escape(mutant.breaks)}{real}</td>"
    places = "<br>".join(map(escape, mutant.places.split(", ")))
    yield f"<td><code>{places}</code></td>"
    yield f'<td class="{_COLOURS.get(result.state, "")}">{escape(result.state)}</td>'
    if result.kills:
        kill = result.kills[0]
        more = f" and {plural(len(result.kills) - 1, 'other test')}" if len(result.kills) > 1 else ""
        yield f"<td><code>{escape(table.short(kill.test))}</code>{more}<br>"
        yield f'<span class="dim">{escape(clipped(kill.message, _MESSAGE))}</span></td>'
    else:
        yield f"<td>{escape(result.trouble or mutant.equivalent)}</td>"
    yield f"<td>{result.seconds:.1f}</td></tr>"
