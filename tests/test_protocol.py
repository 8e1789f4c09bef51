# SPDX-License-Identifier: GPL-2.0
"""Frames are decoded exactly, and an agent that violates the protocol is detected at once."""

from __future__ import annotations

import json
import zlib
from typing import Any

import pytest

from harness.agent import protocol

MESSAGES: list[protocol.Message] = [
    protocol.Hello(1.5, "00ff", ""),
    protocol.Ready("6.12", "x86_64", "3.13", 4096, 0, 3.5, ""),
    protocol.Collect("YWJj", ["-v"]),
    protocol.Collected(["a::b"], []),
    protocol.Run("a::b", "", "m1"),
    protocol.Report({"outcome": "passed", "nested": [1, {"two": None}]}),
    protocol.Finished("a::b", 512),
    protocol.Call("guest_tests.explorer.serve:main", {}),
    protocol.Tell({"programs": []}),
    protocol.Say({"at": 1}),
    protocol.Returned(""),
    protocol.Shell("ssh-ed25519 AAAA"),
    protocol.ShellReady(),
]


def frame(payload: bytes) -> bytes:
    return protocol.HEADER.pack(protocol.MAGIC, len(payload), zlib.crc32(payload)) + payload


def frame_of(**values: Any) -> bytes:
    return frame(json.dumps(values).encode())


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.kind)
def test_what_is_sent_is_what_arrives(message: protocol.Message) -> None:
    assert protocol.Decoder().feed(protocol.encode(message)) == [message]


def test_frames_may_arrive_in_pieces_and_together() -> None:
    stream = b"".join(map(protocol.encode, MESSAGES))
    decoder = protocol.Decoder()
    arrived = [message for byte in stream for message in decoder.feed(bytes([byte]))]
    assert arrived == MESSAGES
    assert protocol.Decoder().feed(stream) == MESSAGES


def test_half_a_frame_is_waited_for() -> None:
    data = protocol.encode(MESSAGES[0])
    decoder = protocol.Decoder()
    assert decoder.feed(data[:-1]) == []
    assert decoder.feed(data[-1:]) == [MESSAGES[0]]


FINISHED = {"kind": "finished", "nodeid": "a", "tainted": 0}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x1b[2J a login prompt", "expected a frame"),
        (protocol.HEADER.pack(b"nope", 0, 0), "expected a frame"),
        (protocol.HEADER.pack(protocol.MAGIC, protocol.MAX_PAYLOAD + 1, 0), "at most"),
        (protocol.HEADER.pack(protocol.MAGIC, 2, 0) + b"{}", "checksum"),
        (frame(b"{"), "not JSON"),
        (frame(b"\xff\xfe"), "not JSON"),
        (frame(b"[" * 100_000), "not JSON"),
        (frame(b"[]"), "not a JSON object"),
        (frame_of(), "unknown message"),
        (frame_of(kind="own"), "unknown message 'own'"),
        (frame_of(kind=["finished"]), "unknown message"),
        (frame_of(kind="finished", nodeid="a"), "fields are"),
        (frame_of(**FINISHED, more=1), "fields are"),
        (frame_of(**(FINISHED | {"nodeid": 7})), "finished.nodeid is not of type str"),
        (frame_of(**(FINISHED | {"tainted": True})), "finished.tainted is not of type int"),
        (frame_of(**(FINISHED | {"tainted": 0.5})), "finished.tainted is not of type int"),
        (frame_of(kind="collected", nodeids=["a", 1], errors=[]), "collected.nodeids is not of type list"),
        (frame_of(kind="report", data=[]), "report.data is not of type dict"),
        (frame_of(kind="hello", time="now", entropy="", mutant=""), "hello.time is not of type float"),
    ],
)
def test_anything_else_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(protocol.BadFrame, match=says):
        protocol.Decoder().feed(data)


@pytest.mark.parametrize(
    "data",
    [
        frame_of(kind="\x1b[2J" * 10_000),
        frame_of(kind="finished", **{"\x1b[2J" * 10_000: 1}),
        frame_of(kind="finished", **{f"key {n}": n for n in range(10_000)}),
        b"\x1b[2J" * 10_000,
    ],
)
def test_a_refusal_quotes_little_and_nothing_that_a_terminal_obeys(data: bytes) -> None:
    with pytest.raises(protocol.BadFrame) as caught:
        protocol.Decoder().feed(data)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_an_oversized_frame_is_refused_before_it_is_stored() -> None:
    decoder = protocol.Decoder()
    with pytest.raises(protocol.BadFrame):
        decoder.feed(protocol.HEADER.pack(protocol.MAGIC, 0xFFFFFFFF, 0))
