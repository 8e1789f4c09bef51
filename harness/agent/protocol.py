# SPDX-License-Identifier: GPL-2.0
"""The messages between host and agent, which are sent over a virtio-serial port or an SSH channel.

A frame is a magic number, the length of the payload, its CRC-32, and the payload, which is one JSON object. The kernel
of a guest may be broken, so nothing that the guest sends is trusted: the type of each field is checked, all sizes are
limited, and the format is JSON and not pickle. The host sends the first message. The messages below are in the order
in which they are sent.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

MAGIC = b"mrh1"
HEADER = struct.Struct(">4sII")
#: limit of the payload in bytes; the largest frame has the archive of the tests, some hundred KiB
MAX_PAYLOAD = 32 << 20


class BadFrame(ValueError):
    """The data is not a frame, or the frame is not a message."""


@dataclass(frozen=True)
class Hello:
    """Host: asks for a description of the guest.

    Also sets the clock and reseeds the random number generators, which a clone has in the state of its template.
    """

    kind: ClassVar[str] = "hello"
    #: seconds since the epoch
    time: float
    #: random bytes in hexadecimal
    entropy: str
    #: the mutant to activate; empty to activate none
    mutant: str


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
    #: the mutant that is active; empty if none is
    mutant: str


@dataclass(frozen=True)
class Collect:
    """Host: unpack and collect these tests. Sent at most once to a guest."""

    kind: ClassVar[str] = "collect"
    #: a tar archive in base64
    archive: str
    #: arguments for pytest
    args: list[str]


@dataclass(frozen=True)
class Collected:
    """Agent: the answer to Collect."""

    kind: ClassVar[str] = "collected"
    nodeids: list[str]
    #: the messages of collection errors
    errors: list[str]


@dataclass(frozen=True)
class Run:
    """Host: run one test."""

    kind: ClassVar[str] = "run"
    nodeid: str
    #: the next test in this guest, so that fixtures with a wider scope are kept for it; empty if there is none
    next_nodeid: str
    #: the token in the console markers before and after the test
    marker: str


@dataclass(frozen=True)
class Report:
    """Agent: a pytest report, as ``pytest_report_to_serializable`` made it."""

    kind: ClassVar[str] = "report"
    data: dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """Agent, during a test: stop this guest and audit its memory; see ``harness.audit.live``."""

    kind: ClassVar[str] = "audit"
    data: dict[str, Any]


@dataclass(frozen=True)
class Audited:
    """Host: the answer to Audit."""

    kind: ClassVar[str] = "audited"
    data: dict[str, Any]


@dataclass(frozen=True)
class Finished:
    """Agent: the test has ended, and all its reports were sent."""

    kind: ClassVar[str] = "finished"
    nodeid: str
    #: /proc/sys/kernel/tainted
    tainted: int


@dataclass(frozen=True)
class Call:
    """Host: call a function of the tests, which exchanges messages with the host until it returns."""

    kind: ClassVar[str] = "call"
    #: module and name, as in ``guest_tests.explorer.serve:main``
    function: str
    #: its argument
    data: dict[str, Any]


@dataclass(frozen=True)
class Tell:
    """Host: a message to the function that was called."""

    kind: ClassVar[str] = "tell"
    data: dict[str, Any]


@dataclass(frozen=True)
class Say:
    """Agent: a message of the function that was called."""

    kind: ClassVar[str] = "say"
    data: dict[str, Any]


@dataclass(frozen=True)
class Returned:
    """Agent: the function that was called has returned, or failed."""

    kind: ClassVar[str] = "returned"
    #: the traceback if it failed; empty if it did not
    error: str


@dataclass(frozen=True)
class Shell:
    """Host: start an SSH server on the shell port."""

    kind: ClassVar[str] = "shell"
    #: a line of an authorized_keys file
    authorized_key: str


@dataclass(frozen=True)
class ShellReady:
    """Agent: the answer to Shell."""

    kind: ClassVar[str] = "shell-ready"


Message = (
    Hello
    | Ready
    | Collect
    | Collected
    | Run
    | Report
    | Audit
    | Audited
    | Finished
    | Call
    | Tell
    | Say
    | Returned
    | Shell
    | ShellReady
)
_TYPES: dict[str, Any] = {message.kind: message for message in get_args(Message)}
# The annotations are strings. These are all types that JSON values of messages have.
_CHECKS: dict[str, Callable[[Any], bool]] = {
    "str": lambda v: isinstance(v, str),
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "list[str]": lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
    "dict[str, Any]": lambda v: isinstance(v, dict),
}


def encode(message: Message) -> bytes:
    """The message as one frame."""
    # Not asdict(), which copies everything: fields are plain JSON values.
    payload = json.dumps({"kind": message.kind, **vars(message)}).encode()
    return HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


class Decoder:
    """Turns a stream of bytes into messages. Incomplete frames are kept until the rest arrives."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages completed by ``data``.

        :raises BadFrame: if the data is not a valid frame; the stream cannot be used any more.
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
