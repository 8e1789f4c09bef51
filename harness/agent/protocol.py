# SPDX-License-Identifier: GPL-2.0
"""What host and agent say to each other, over a virtio-serial port or an SSH channel.

A frame is a magic number, the payload's length and its CRC-32, then one JSON object. JSON and never pickle, with
every field's type checked and every size bounded: the guest runs a kernel that may be broken, and its bytes are not
trusted. The host speaks first; see the messages below, in the order of a conversation.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

MAGIC = b"mrh1"
HEADER = struct.Struct(">4sII")
#: bytes of payload; the largest legitimate frame is the tests' archive, some hundred KiB
MAX_PAYLOAD = 32 << 20


class BadFrame(ValueError):
    """The bytes are not a frame, or the frame is not a message."""


@dataclass(frozen=True)
class Hello:
    """Host: who are you? Also sets the clock and stirs the random pool: a cloned guest's are those of its template."""

    kind: ClassVar[str] = "hello"
    #: seconds since the epoch
    time: float
    #: hexadecimal
    entropy: str


@dataclass(frozen=True)
class Ready:
    """Agent: the answer to Hello."""

    kind: ClassVar[str] = "ready"
    release: str
    machine: str
    python: str
    page_size: int
    #: /proc/sys/kernel/tainted
    tainted: int
    #: seconds since boot
    uptime: float


@dataclass(frozen=True)
class Collect:
    """Host: unpack these tests and collect them. Only once in a guest's life."""

    kind: ClassVar[str] = "collect"
    #: a tar archive in base64, unpacked in the agent's directory
    archive: str
    #: command line for pytest
    args: list[str]


@dataclass(frozen=True)
class Collected:
    """Agent: the answer to Collect."""

    kind: ClassVar[str] = "collected"
    nodeids: list[str]
    #: what pytest said when it could not collect
    errors: list[str]


@dataclass(frozen=True)
class Run:
    """Host: run one test."""

    kind: ClassVar[str] = "run"
    nodeid: str
    #: the test that follows in this guest, so that wider fixtures survive; empty for none
    next_nodeid: str
    #: written to the console before and after, to cut the log
    marker: str


@dataclass(frozen=True)
class Report:
    """Agent: a pytest report, as ``pytest_report_to_serializable`` made it."""

    kind: ClassVar[str] = "report"
    data: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """Agent, in the middle of a test: freeze us here and look at our memory; see ``harness.audit.live``."""

    kind: ClassVar[str] = "audit"
    data: dict[str, Any]


@dataclass(frozen=True)
class Audited:
    """Host: the answer to Audit."""

    kind: ClassVar[str] = "audited"
    data: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """Agent: the test is over and all its reports are sent."""

    kind: ClassVar[str] = "finished"
    nodeid: str
    #: /proc/sys/kernel/tainted
    tainted: int


@dataclass(frozen=True)
class Shell:
    """Host: start an SSH server on the shell port."""

    kind: ClassVar[str] = "shell"
    #: OpenSSH's one-line form
    authorized_key: str


@dataclass(frozen=True)
class ShellReady:
    """Agent: the answer to Shell."""

    kind: ClassVar[str] = "shell-ready"


Message = Hello | Ready | Collect | Collected | Run | Report | Audit | Audited | Finished | Shell | ShellReady
_TYPES: dict[str, Any] = {
    m.kind: m for m in (Hello, Ready, Collect, Collected, Run, Report, Audit, Audited, Finished, Shell, ShellReady)
}
# Annotations are strings here; JSON can only produce these few types.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda v: isinstance(v, str),
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "list[str]": lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
    "dict[str, Any]": lambda v: isinstance(v, dict),
}


def encode(message: Message) -> bytes:
    """The message as one frame."""
    payload = json.dumps({"kind": message.kind, **asdict(message)}).encode()
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


class Decoder:
    """Turns a stream of bytes into messages; holds what is incomplete."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by ``data``.

        :raises BadFrame: if the stream cannot be followed any more.
        """
        self._buffer += data
        messages: list[Message] = []
        while len(self._buffer) >= HEADER.size:
            magic, length, crc = HEADER.unpack_from(self._buffer)
            if magic != MAGIC:
                raise BadFrame(f"expected a frame, got {bytes(self._buffer[:16])!r}")
            if length > MAX_PAYLOAD:
                raise BadFrame(f"frame of {length} bytes, at most {MAX_PAYLOAD} are allowed")
            if len(self._buffer) < HEADER.size + length:
                break
            payload = bytes(self._buffer[HEADER.size : HEADER.size + length])
            del self._buffer[: HEADER.size + length]
            if zlib.crc32(payload) != crc:
                raise BadFrame(f"frame of {length} bytes has a wrong checksum")
            messages.append(_decode(payload))
        return messages


def _decode(payload: bytes) -> Message:
    try:
        values = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"frame is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BadFrame("frame is not a JSON object")
    kind = values.pop("kind", None)
    message = _TYPES.get(kind) if isinstance(kind, str) else None
    if message is None:
        raise BadFrame(f"unknown message {str(kind)[:40]!r}")
    wanted = {field.name: str(field.type) for field in fields(message)}
    if values.keys() != wanted.keys():
        raise BadFrame(f"{kind}: fields are {str(sorted(values))[:200]}, expected {sorted(wanted)}")
    for name, type_name in wanted.items():
        if not _CHECKS[type_name](values[name]):
            raise BadFrame(f"{kind}.{name} is not of type {type_name}")
    result: Message = message(**values)
    return result
