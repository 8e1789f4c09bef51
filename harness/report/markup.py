# SPDX-License-Identifier: GPL-2.0
"""What HTML pages of results share: the look, the head, tables, and evidence. They load no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from harness.judging import console

STYLE = """
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
pre mark { background: var(--bad); color: inherit; display: block; }
summary { cursor: pointer; color: var(--link); }
"""


def head(title: str, style: str = "", script: str = "") -> Iterator[str]:
    """The beginning of a page, up to its body.

    :param style: more rules.
    :param script: what the page may run, which is given here so that nothing else may.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    yield "<!DOCTYPE html>"
    yield f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    # Texts come from guests. They are escaped; should one not be, nothing in it may run or load.
    policy = f"default-src 'none'; style-src 'unsafe-inline'{allowed}"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{STYLE}{style}</style></head><body>"


def tail(script: str = "") -> Iterator[str]:
    """The end of a page.

    :param script: the one that :func:`head` was given.
    """
    if script:
        yield f"<script>{script}</script>"
    yield "</body></html>"


def table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A table of texts, which are escaped here."""
    yield '<div class="scroll"><table class="list"><thead><tr>'
    yield "".join(f"<th>{escape(each)}</th>" for each in titles) + "</tr></thead><tbody>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>"
    yield "</tbody></table></div>"


def evidence(title: str, text: str) -> str:
    """A section of a failure, folded. A kernel's complaint is highlighted, and its section is open."""
    marked = highlighted(text) if title == "kernel console" else escape(text)
    shown = " open" if "<mark>" in marked else ""
    return f"<details{shown}><summary>{escape(title)}</summary><pre>{marked}</pre></details>"


def highlighted(text: str) -> str:
    """Console text with each complaint marked for which a test fails."""
    lines = text.split("\n")
    parts: list[str] = []
    here = 0
    for splat in console.splats(text):
        end = splat.line + splat.text.count("\n") + 1
        parts.append(escape(_text(lines[here : splat.line])))
        # Its last line break is inside: a block has one at its end anyway.
        parts.append(f"<mark>{escape(_text(lines[splat.line : end]))}</mark>")
        here = end
    rest = escape("\n".join(lines[here:]))
    return "".join(parts) + rest if here < len(lines) else "".join(parts).removesuffix("\n</mark>") + "</mark>"


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
