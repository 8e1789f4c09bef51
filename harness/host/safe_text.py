# SPDX-License-Identifier: GPL-2.0
"""Makes text of a guest safe for a terminal and for XML.

A guest may run a broken or hostile kernel. What it prints must not move the cursor, hide lines or make a report file
invalid. All text from a guest passes through :func:`escape` before it is shown or stored.
"""

from __future__ import annotations

import re

#: Characters that :func:`escape` replaces: control characters except tab and newline, characters that reorder or hide
#: text on a terminal, and code points that XML 1.0 does not allow.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\uffff]"
)


def decode(raw: bytes) -> str:
    """Bytes from a guest as text; bytes that are not UTF-8 become ``\\xNN``."""
    return raw.decode("utf-8", errors="backslashreplace")


def escape(text: str, columns: int = 4096) -> str:
    """Replace everything in ``text`` that a terminal or an XML parser would act on.

    Control characters other than tab and newline become visible escapes. Carriage returns at the end of a line are
    removed.

    :param columns: lines longer than this many characters are cut; a note says how many characters are missing.
    """
    text = _UNSAFE.sub(_visible, text.replace("\r\n", "\n"))
    if len(text) <= columns:
        return text
    return "\n".join(_clip(line, columns) for line in text.split("\n"))


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _clip(line: str, columns: int) -> str:
    return line if len(line) <= columns else f"{line[:columns]}[… {len(line) - columns} more]"
