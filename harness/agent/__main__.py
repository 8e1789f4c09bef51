# SPDX-License-Identifier: GPL-2.0
"""The agent's entry point: ``python3 -m harness.agent`` in a guest, with ``--stdio`` on a board reached over SSH."""

import base64
import contextlib
import dataclasses
import faulthandler
import fcntl
import io
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

from harness.agent import channel, protocol
from harness.agent.session import run_pytest

#: _IO('R', 0x07), include/uapi/linux/random.h: mix what was written into the pool now
RNDRESEEDCRNG = 0x5207


def beat(parent: int) -> None:
    """Write a line now and then on a port of its own, for as long as the parent lives.

    A process rather than a thread: it must beat while a test holds the interpreter, and must not be an extra thread
    in the process under test. A ``q`` from the host asks for the parent's Python traceback: the host gave up on it.
    """
    port = channel.open_port("harness.heartbeat")
    while os.getppid() == parent:
        try:
            os.write(port, b"%d\n" % time.monotonic_ns())
            if b"q" in os.read(port, 64):
                os.kill(parent, signal.SIGABRT)
        except OSError:
            pass  # nobody listens at this moment, or nobody asks
        time.sleep(0.25)


def answer_hello(hello: protocol.Hello) -> protocol.Ready:
    """Take over the host's clock and randomness, and say who we are."""
    if os.geteuid() == 0 and hello.time:
        time.clock_settime(time.CLOCK_REALTIME, hello.time)
        with open("/dev/urandom", "r+b", buffering=0) as pool:
            pool.write(bytes.fromhex(hello.entropy))
            fcntl.ioctl(pool, RNDRESEEDCRNG)
    random.seed(hello.entropy)
    return protocol.Ready(
        release=platform.release(),
        machine=platform.machine(),
        python=platform.python_version(),
        page_size=resource.getpagesize(),
        tainted=int(Path("/proc/sys/kernel/tainted").read_text()),
        uptime=float(Path("/proc/uptime").read_text().split()[0]),
    )


def answer_board(hello: protocol.Hello) -> protocol.Ready:
    """Say who we are, and leave the clock and the randomness of a machine that is not ours alone."""
    return answer_hello(dataclasses.replace(hello, time=0.0))


def start_shell(request: protocol.Shell) -> protocol.ShellReady:
    """Run dropbear on the guest's loopback and join it to the shell port. No network device is involved."""
    # Every tool of busybox under its own name; what is there already stays.
    subprocess.run(["/bin/busybox", "--install", "-s", "/usr/bin"], check=False, stderr=subprocess.DEVNULL)
    Path("/etc/dropbear").mkdir(exist_ok=True)  # receives the host key, made on the first connection
    home = Path("/root/.ssh")
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "authorized_keys").write_text(request.authorized_key + "\n")
    subprocess.run(["/usr/sbin/dropbear", "-R", "-s", "-j", "-k", "-p", "127.0.0.1:22"], check=True)
    # Opened before we answer: QEMU drops what the host sends to a port that nobody has open.
    port = channel.open_port("harness.shell")
    if os.fork() == 0:  # a process, as in beat()
        try:
            channel.join_port_to_tcp(port, 22)
        finally:
            os._exit(0)
    os.close(port)
    return protocol.ShellReady()


def be_found() -> None:
    """Leave our process id where the board's keeper looks for it, and lead a group that it can end as a whole."""
    with contextlib.suppress(PermissionError):
        os.setsid()  # refused to a group's leader, which is what we want to be
    Path(os.environ["HARNESS_PID_FILE"]).write_text(str(os.getpid()))


def unpack(archive: str, directory: Path) -> None:
    """Unpack the tests where pytest will find them."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive))) as tar:
        tar.extractall(directory, filter="data")
    os.chdir(directory)


def main() -> None:
    """Serve the host until it hangs up."""
    stdio = "--stdio" in sys.argv
    greet = answer_board if stdio else answer_hello
    if stdio:
        be_found()
        link = channel.Channel.over_stdio()
        faulthandler.enable()
    else:
        link = channel.Channel(channel.open_port("harness.agent"))
        parent = os.getpid()
        if os.fork() == 0:
            beat(parent)
            os._exit(0)
        faulthandler.enable(open("/dev/console", "w"))  # noqa: SIM115 - stays open for the process's life
    home = Path(__file__).resolve().parent.parent.parent
    while True:
        message = link.receive()
        if isinstance(message, protocol.Hello):
            link.send(greet(message))
        elif isinstance(message, protocol.Shell):
            link.send(start_shell(message))
        elif isinstance(message, protocol.Collect):
            unpack(message.archive, home / "tests")
            run_pytest(link, message.args, home / "tests", {"hello": greet, "shell": start_shell})
            return
        else:
            raise protocol.BadFrame(f"{message.kind} comes after collect")


if __name__ == "__main__":
    main()
