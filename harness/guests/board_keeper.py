# SPDX-License-Identifier: GPL-2.0
"""The keeper: a program that runs on a board, manages the harness's directory there, and forwards the kernel's log.

It is sent to the board as source text. It needs only the standard library of Python 3.6, so that it can report a
Python that is too old for the agent. It runs as long as its SSH channel exists. When the channel ends, it kills the
agent and removes the directory.

stdin: the size of a tar archive as 8 bytes, big-endian; the archive; then one command in each line. ``sync TOKEN`` is
answered when everything that the kernel logged before is written. ``abort`` asks the agent for a traceback. ``kill``
ends the agent.

stdout: one line of JSON; then the kernel's log in the form of the console. Answers are lines that start with a NUL
byte, which is never in the kernel's log.
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
    """Send a signal to the process group of the agent, if there is one."""
    try:
        with open(os.path.join(directory, "pid")) as file:
            os.killpg(int(file.read()), number)
    except (OSError, ValueError):
        pass


def open_log() -> int:
    """Open the kernel's log at its end; -1 if this user may not read it."""
    try:
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(log, 0, os.SEEK_END)
        return log
    except OSError:
        return -1


def read_log(log: int) -> bytes:
    """All new records, in the form of the console."""
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
        # Lines that start with a space are the dictionary of the record, not its text.
        body = [line for line in text.splitlines() if not line.startswith(" ")]
        lines += [f"[{stamp // 1000000:5d}.{stamp % 1000000:06d}] {line}" for line in body]
    return "".join(line + "\n" for line in lines).encode()


def send(data: bytes) -> None:
    """Send data to the host."""
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def receive(size: int) -> bytes:
    """Receive exactly ``size`` bytes from the host."""
    data = b""
    while len(data) < size:
        part = os.read(0, min(size - len(data), 1 << 16))
        if not part:
            sys.exit(1)
        data += part
    return data


def serve(directory: str, log: int) -> None:
    """Forward the log and execute commands, until stdin ends."""
    commands = b""
    while True:
        readable = select.select([0] if log < 0 else [0, log], [], [])[0]
        send(read_log(log))
        if 0 in readable:
            data = os.read(0, 4096)
            if not data:
                return
            commands += data
        while b"\n" in commands:
            line, _, commands = commands.partition(b"\n")
            if line.startswith(b"sync "):
                send(read_log(log) + b"\0" + line + b"\n")
            elif line in (b"abort", b"kill"):
                signal_agent(directory, signal.SIGABRT if line == b"abort" else signal.SIGKILL)


def main() -> None:
    """Unpack the archive, describe the board, serve the host, and clean up."""
    archive = receive(struct.unpack(">Q", receive(8))[0])
    directory = tempfile.mkdtemp(prefix="mremap-board-", dir="/tmp")
    # Clean up if the connection is lost as well.
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
        send(json.dumps(about).encode() + b"\n")
        serve(directory, log)
    finally:
        signal_agent(directory, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


main()
