# SPDX-License-Identifier: GPL-2.0
"""Makes the title of a kernel report from its kind and the function it is about.

Titles have the form that syzbot gives them, because bots group reports by title: "KASAN: slab-use-after-free Read in
rmap_walk_ksm", "WARNING in move_ptes". Which form a report has is data, see :mod:`harness.judging.console_grammar`, and
so is which functions a title never names, see :mod:`harness.judging.frames`. Addresses and numbers are left out. The
file and the line are in the text of the report.
"""

from __future__ import annotations

import re

from harness.host.safe_text import escape
from harness.judging import frames
from harness.judging.console_rule import Rule

#: a title has at most this many characters
MAX_TITLE = 200

_NUMBERS = (
    (re.compile(r"\b0x[0-9a-fA-F]+|\b[0-9a-f]{8,}\b"), "ADDR"),
    (re.compile(r"\S{1,40}/\d+(?:/0x[0-9a-f]+)?"), "task"),
    (re.compile(r"\b\d+(?=s?\b)"), "NUM"),
)


def title(rule: Rule, headline: re.Match[str], body: str) -> str:
    """The title of a report; escaped, at most :data:`MAX_TITLE` characters before that.

    :param headline: what ``rule.start`` matched.
    :param body: the lines from the headline on, without their prefixes and without those of other tasks.
    """
    groups = {name: value or "" for name, value in headline.groupdict().items()}
    if rule.fact and (match := rule.fact.search(body)):
        groups |= {name: value for name, value in match.groupdict().items() if value}
    form, where = rule.title, rule.where
    for variant in rule.variants:
        if variant.headline.search(headline.string):
            form, where = variant.title, variant.where
            break
    if where and (function := frames.function(body, where)):
        groups["fn"] = function
    what = groups.get("what", "")
    for pattern, stable in _NUMBERS:
        what = pattern.sub(stable, what)
    unknown = dict.fromkeys(re.findall(r"{(\w+)}", form), "")
    made = " ".join(form.format_map(unknown | groups | {"what": what}).split())
    # Facts are missing if the log ended early: remove the words that stand before them.
    made = re.sub(r" in$| \(\)$|:$", "", made)
    return escape(made[:MAX_TITLE])
