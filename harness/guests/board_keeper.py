# SPDX-License-Identifier: GPL-2.0
"""Runs on a board, sent there as source text: keeps our directory there, and reports the kernel's log.

Uses nothing but the standard library of Python 3.6, so that it can say when Python is too old for the agent. It lives
for as long as the SSH channel it was started on; when that ends, for whatever reason, the agent is killed and the
directory removed.

stdin: the size of a tar archive as 8 bytes, big-endian, the archive, then commands, one a line: ``sync TOKEN`` is
answered once everything the kernel logged before is written; ``abort`` asks the agent for a traceback, ``kill`` ends
it. stdout: one line of JSON, then the kernel's log as the console would show it; answers are lines that start with a
NUL byte, which the kernel's log never holds.
"""

import io
import json
import os
import select
import shutil
import signal
import struct
import sys
import tarfile
import tempfile


def signal_agent(directory: str, number: int) -> None:
    """Signal the agent's process group, if there is one."""
    try:
        with open(os.path.join(directory, "pid")) as file:
            os.killpg(int(file.read()), number)
    except (OSError, ValueError):
        pass


def open_log() -> int:
    """The kernel's log from now on; -1 if it is not ours to read."""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(log, 0, os.SEEK_END)
        return log
    except OSError:
        return -1


def drain(log: int) -> bytes:
    """All new records, as the console prints them."""
    lines = []
    while log >= 0:
        try:
            record = os.read(log, 16384).decode("utf-8", "replace")
        except BlockingIOError:
            break
        except BrokenPipeError:
            lines.append("[log records were overwritten here before they were read]")
            continue
        head, _, text = record.partition(";")
        stamp = int(head.split(",")[2])
        # Lines that start with a space are the record's dictionary, not its text.
        body = [line for line in text.splitlines() if not line.startswith(" ")]
        lines += [f"[{stamp // 1000000:5d}.{stamp % 1000000:06d}] {line}" for line in body]
    return "".join(line + "\n" for line in lines).encode()


def say(data: bytes) -> None:
    """Write to the host."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def hear(size: int) -> bytes:
    """Exactly so many bytes from the host."""
    data = b""
    while len(data) < size:
        part = os.read(0, min(size - len(data), 1 << 16))
        if not part:
            sys.exit(1)
        data += part
    return data


def serve(directory: str, log: int) -> None:
    """Pass on the log and obey, until stdin ends."""
    commands = b""
    while True:
        readable = select.select([0] if log < 0 else [0, log], [], [])[0]
        say(drain(log))
        if 0 in readable:
            data = os.read(0, 4096)
            if not data:
                return
            commands += data
        while b"\n" in commands:
            line, _, commands = commands.partition(b"\n")
            if line.startswith(b"sync "):
                say(drain(log) + b"\0" + line + b"\n")
            elif line in (b"abort", b"kill"):
                signal_agent(directory, signal.SIGABRT if line == b"abort" else signal.SIGKILL)


def main() -> None:
    """Unpack, announce, serve, clean up."""
    archive = hear(struct.unpack(">Q", hear(8))[0])
    directory = tempfile.mkdtemp(prefix="mremap-board-", dir="/tmp")
    # A connection that goes away must not keep us from cleaning up.
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
            tar.extractall(directory)
        log = open_log()
        about = {
            "directory": directory,
            "python": "{}.{}.{}".format(*sys.version_info),
            "filter": hasattr(tarfile, "data_filter"),
            "log": log >= 0,
        }
        say(json.dumps(about).encode() + b"\n")
        serve(directory, log)
    finally:
        signal_agent(directory, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


main()
