# SPDX-License-Identifier: GPL-2.0
"""Reads patch series: a directory of patches, an mbox, or one patch.

The output of ``git format-patch`` and ``b4 am``, messages from a mail archive, and plain diffs are understood.
"""

from __future__ import annotations

import email
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.header import decode_header, make_header
from email.message import Message
from pathlib import Path

from harness.errors import SpecError

#: a directory of patches is searched for files with these suffixes
SUFFIXES = (".patch", ".diff", ".mbx", ".mbox", ".eml")

#: the line that separates the messages of an mbox: "From ", a sender, and a date
_POSTMARK = re.compile(rb"^From \S+ .*\d\d:\d\d:\d\d.* \d{4}.*\n(?=[A-Za-z-]+:)", re.MULTILINE)
_DIFF = re.compile(rb"^(?:diff --git |--- \S.*\n\+\+\+ \S)", re.MULTILINE)


@dataclass(frozen=True)
class Patch:
    """One patch."""

    #: the name of its file; with its subject if that file holds several patches
    name: str
    #: the bytes of the file or message, which the digest is computed from
    raw: bytes
    #: text for ``git apply``, with the transfer encoding of the mail decoded
    diff: bytes

    def hunk(self, file: str, line: int) -> str:
        """A description of the hunk that starts at a line of the old file."""
        sections = re.split(rb"^(?=--- \S)", self.diff, flags=re.MULTILINE)
        for section in sections:
            head = section[:4096].split(b"\n", 2)
            named = any(name.split(b"\t")[0].endswith(b"/" + file.encode()) for name in head[:2])
            starts = [int(found[1]) for found in re.finditer(rb"^@@ -(\d+)", section, re.MULTILINE)]
            if named and line in starts:
                return f"hunk {starts.index(line) + 1} of {len(starts)} of {file} (line {line})"
        return f"the hunk at line {line} of {file}"


def load(path: Path) -> list[Patch]:
    """The patches of a series in order. Messages without a diff, such as a cover letter, are left out.

    :param path: a directory, whose files are sorted by name; an mbox; or one patch.
    :raises SpecError: if there is no patch.
    """
    try:
        if path.is_dir():
            files = sorted(each for each in path.iterdir() if each.suffix in SUFFIXES)
            patches = [patch for file in files for patch in _split(file)]
        else:
            patches = list(_split(path))
    except OSError as error:
        raise SpecError(f"cannot read the patches {path}: {error.strerror}") from None
    if not patches:
        what = f"no {', '.join(SUFFIXES)} file with a diff" if path.is_dir() else "no diff"
        raise SpecError(f"{path} holds {what}: give patches as git format-patch or b4 am write them")
    return patches


def patchset_hash(patches: Sequence[Patch]) -> str:
    """The digest of a series as KCIDB defines it; empty if there are no patches.

    It is the SHA-256 of the concatenated SHA-256 digests of the patches, each in hex and followed by a newline.
    """
    lines = "".join(f"{hashlib.sha256(patch.raw).hexdigest()}\n" for patch in patches)
    return hashlib.sha256(lines.encode()).hexdigest() if patches else ""


def _split(file: Path) -> Iterator[Patch]:
    data = file.read_bytes()
    starts = [found.start() for found in _POSTMARK.finditer(data)]
    bounds = [0, *(start for start in starts if start), len(data)]
    messages = [data[start:end] for start, end in itertools.pairwise(bounds)]
    for number, raw in enumerate(messages, 1):
        diff, subject = _decoded(raw)
        if _DIFF.search(diff):
            name = file.name if len(messages) == 1 else f"message {number} of {file.name}{subject}"
            yield Patch(name, raw, diff)


def _decoded(raw: bytes) -> tuple[bytes, str]:
    """The text of a message with its transfer encoding decoded, and its subject for error messages."""
    message = email.message_from_bytes(_POSTMARK.sub(b"", raw, count=1))
    if not message.keys():
        return raw, ""  # a plain diff
    subject = next((_text(value) for name, value in message.raw_items() if name.lower() == "subject"), "")
    encoded = message.is_multipart() or message.get("Content-Transfer-Encoding", "").lower() in _ENCODINGS
    if not encoded:
        return raw, subject
    texts = [_payload(part) for part in message.walk() if part.get_content_maintype() == "text"]
    return b"\n".join(texts), subject


def _text(value: object) -> str:
    """The text of a header. Git writes it in UTF-8, and mail programs encode it."""
    plain = str(value).encode("ascii", "surrogateescape").decode("utf-8", "replace")
    return re.sub(r"\s+", " ", f" ({make_header(decode_header(plain))})")


_ENCODINGS = ("quoted-printable", "base64")


def _payload(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    return payload.replace(b"\r\n", b"\n") if isinstance(payload, bytes) else b""
