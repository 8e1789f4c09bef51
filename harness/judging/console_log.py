# SPDX-License-Identifier: GPL-2.0
"""Cleans the lines of a console log, and cuts the log into the parts that belong to each test.

The agent writes a marker to ``/dev/kmsg`` before and after each test, see :func:`harness.agent.session.mark`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

#: only this many characters of a line are looked at and kept
MAX_COLUMNS = 1024

#: the marker that the agent writes before and after each test
MARKER = re.compile(r"harness: (?P<verb>begin|end) (?P<id>\S{1,128})\s*$")

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[@-Z\\-_])")
#: log level, time stamp and caller id (CONFIG_PRINTK_CALLER); text before a time stamp is an unfinished line of user
#: space
_PREFIX = re.compile(
    r"(?:.{0,200}?(?=\[ {0,4}\d+\.\d{6}\]))?(?:<\d{1,3}>)?(?:\[ {0,4}\d+\.\d{6}\])?"
    r"(?:\[ *(?P<caller>[TC]\d+)\])? ?(?:<\d>)?"
)


def plain(line: str) -> str:
    """A line without terminal colours and carriage return, at most :data:`MAX_COLUMNS` characters."""
    line = line[:MAX_COLUMNS].rstrip("\r")
    return _ANSI.sub("", line) if "\x1b" in line else line


def unprefixed(line: str) -> str:
    """A plain line without log level, time stamp and caller id."""
    match = _PREFIX.match(line)
    # Without a prefix, a leading space stays: it is part of a stack frame.
    return line[match.end() :] if match and match.end() and not match[0].isspace() else line


def clean(line: str) -> str:
    """A line as the kernel formatted it: without colours, carriage return and prefix."""
    return unprefixed(plain(line))


def caller(line: str) -> str:
    """The caller id of a line, such as "T412" or "C0"; empty without CONFIG_PRINTK_CALLER."""
    match = _PREFIX.match(line)
    return (match["caller"] if match else "") or ""


def is_of(line: str, who: str) -> bool:
    """Whether ``who`` may have printed a line: another task did not.

    A processor in an interrupt may print for another one, for example its stack.

    :param who: a caller id. If it is empty, nothing is known of any line.
    """
    return not who or (other := caller(line)) in ("", who) or other.startswith("C")


@dataclass(frozen=True)
class _Marker:
    verb: str
    id: str
    #: offset of the marker's line, and of the line below it
    start: int
    end: int


def cut(text: str, id: str) -> str:
    """The console lines of one test, without its markers.

    The lines end at the end marker of the test, at the begin marker of the next test, or at the end of the log if the
    guest died. A flooded console drops lines: if the begin marker is missing, the lines begin after the last marker
    before the end marker.

    :param id: the token in the markers of the test: no spaces, unique within a boot.
    :returns: empty if the log has no marker of the test.
    """
    previous = 0
    begun: int | None = None
    for mark in _markers(text):
        if begun is not None:
            return text[begun : mark.start]
        if mark.id == id:
            if mark.verb == "end":
                return text[previous : mark.start]
            begun = mark.end
        previous = mark.end
    return "" if begun is None else text[begun:]


def aftermath(text: str, id: str) -> str:
    """The console lines between the end marker of a test and the next test.

    Reports that the kernel printed late, after the test had ended, are found here.

    :param id: see :func:`cut`.
    """
    ended: int | None = None
    for mark in _markers(text):
        if ended is not None:
            return text[ended : mark.start]
        if mark.id == id and mark.verb == "end":
            ended = mark.end
    return "" if ended is None else text[ended:]


def _markers(text: str) -> Iterator[_Marker]:
    at = text.find("harness: ")
    while at >= 0:
        start = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at)
        end = len(text) if end < 0 else end + 1
        # A guest may print one endless line.
        if end - start <= MAX_COLUMNS and (match := MARKER.match(clean(text[start:end].rstrip("\n")))):
            yield _Marker(match["verb"], match["id"], start, end)
        at = text.find("harness: ", end)
