# SPDX-License-Identifier: GPL-2.0
"""A patch series on standard input: ``--kernel=SOURCE+-``.

Standard input is read once. The series is kept in the cache, and takes the place of the dash in the name of the kernel.
So the name means the same in a worker of pytest-xdist, and in the command that runs a test again.
"""

from __future__ import annotations

import email
import re
import sys
from collections.abc import Callable, Sequence
from email.header import decode_header, make_header
from hashlib import sha256
from pathlib import Path

from harness.build import series
from harness.errors import SpecError
from harness.host.cache import Cache

#: ``+-`` at the end of a name, or before more patches or a preset.
_DASH = re.compile(r"\+-(?=[+:]|\Z)")

#: The limit for a series in bytes. The largest series on the kernel's lists have a few MiB.
_LIMIT = 64 << 20

#: Characters of a subject in the name of a file.
_SUBJECT = 40


def named(texts: Sequence[str], read: Callable[[], bytes] | None = None) -> list[str]:
    """The names of kernels with the file of the series in place of the dash.

    :param read: gives what is on standard input, at most once.
    :raises SpecError: if a series is wanted, and there is none.
    """
    if not any(map(_DASH.search, texts)):
        return list(texts)
    path = _keep((read or standard_input)())
    return [_DASH.sub(lambda _: f"+{path}", text) for text in texts]


def standard_input() -> bytes:
    """What is on standard input.

    :raises SpecError: if nobody writes to it.
    """
    if sys.stdin is None or sys.stdin.isatty():
        raise SpecError("+- reads patches from standard input, and nothing is there: b4 am -o - MESSAGE-ID | pytest …")
    return sys.stdin.buffer.read(_LIMIT + 1)


def _keep(data: bytes) -> Path:
    if not data.strip():
        raise SpecError("+- reads patches from standard input, which is empty: see what the command before the | says")
    if len(data) > _LIMIT:
        raise SpecError(f"standard input has more than {_LIMIT >> 20} MiB, which is no patch series: give a file")

    def write(path: Path) -> None:
        path.write_bytes(data)
        series.load(path)  # a series without a patch is not kept

    try:
        return Cache().file("series", sha256(data).hexdigest()[:32], write, name=f"{_subject(data)}.mbx")
    except SpecError:
        raise SpecError("standard input holds no diff: give patches as b4 am or git format-patch write them") from None


def _subject(data: bytes) -> str:
    """The subject of the first message in characters that are safe anywhere."""
    message = email.message_from_bytes(re.sub(rb"\AFrom .*\n", b"", data[: 64 << 10]))
    plain = str(make_header(decode_header(str(message.get("Subject", "")))))
    words = re.findall(r"[a-z0-9]+", re.sub(r"\A\s*\[[^]]*\]", "", plain).lower())
    return "-".join(words)[:_SUBJECT].strip("-") or "stdin"
