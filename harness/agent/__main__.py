# SPDX-License-Identifier: GPL-2.0
"""Starts the agent: ``python3 -m harness.agent`` in a guest, with ``--stdio`` on a board."""

import base64
import contextlib
import dataclasses
import faulthandler
import fcntl
import io
import mmap
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

from harness.agent import channel, mutants, protocol
from harness.agent.processes import kernel_thread, state_of
from harness.agent.session import run_pytest

#: _IO('R', 0x07) in include/uapi/linux/random.h: reseed from the pool now
RNDRESEEDCRNG = 0x5207


def send_heartbeats(parent: int) -> None:
    """Write a line to the heartbeat port four times a second, as long as the parent process lives.

    This runs in a process of its own. A thread would stop while a test holds the interpreter lock, and would be an
    additional thread in the process under test. When the host sends ``q``, it has given up on the test, and the parent
    prints its Python traceback and ends.
    """
    port = channel.open_port("harness.heartbeat")
    while os.getppid() == parent:
        try:
            os.write(port, b"%d\n" % time.monotonic_ns())
            if b"q" in os.read(port, 64):
                os.kill(parent, signal.SIGABRT)
        except OSError:
            pass  # the host is not connected, or sent nothing
        time.sleep(0.25)


def answer_hello(hello: protocol.Hello) -> protocol.Ready:
    """Set the clock, reseed the random number generators, activate the mutant asked for, and describe this guest.

    Clock and generators are the same in all clones of a template, so the host sends its time and random data.
    """
    if os.geteuid() == 0 and hello.time:
        time.clock_settime(time.CLOCK_REALTIME, hello.time)
        with open("/dev/urandom", "r+b", buffering=0) as pool:
            pool.write(bytes.fromhex(hello.entropy))
            fcntl.ioctl(pool, RNDRESEEDCRNG)
    random.seed(hello.entropy)
    if hello.mutant:
        mutants.select(hello.mutant)
    return protocol.Ready(
        release=platform.release(),
        machine=platform.machine(),
        python=platform.python_version(),
        page_size=resource.getpagesize(),
        tainted=int(Path("/proc/sys/kernel/tainted").read_text()),
        uptime=float(Path("/proc/uptime").read_text().split()[0]),
        mutant=mutants.active(),
    )


def answer_board(hello: protocol.Hello) -> protocol.Ready:
    """Describe this board, and do not change its clock or random number generator."""
    return answer_hello(dataclasses.replace(hello, time=0.0))


def start_shell(request: protocol.Shell) -> protocol.ShellReady:
    """Run dropbear on the guest's loopback device, and relay between it and the shell port."""
    # Links to busybox for all its tools; existing programs are not replaced.
    subprocess.run(["/bin/busybox", "--install", "-s", "/usr/bin"], check=False, stderr=subprocess.DEVNULL)
    Path("/etc/dropbear").mkdir(exist_ok=True)  # for the host key, which is made on the first connection
    home = Path("/root/.ssh")
    home.mkdir(mode=0o700, exist_ok=True)
    (home / "authorized_keys").write_text(request.authorized_key + "\n")
    subprocess.run(["/usr/sbin/dropbear", "-R", "-s", "-j", "-k", "-p", "127.0.0.1:22"], check=True)
    # Must be open before the answer is sent: QEMU drops data for a port that the guest has not opened.
    port = channel.open_port("harness.shell")
    if os.fork() == 0:  # a process and not a thread, see send_heartbeats()
        try:
            channel.join_port_to_tcp(port, 22)
        finally:
            os._exit(0)
    os.close(port)
    return protocol.ShellReady()


def let_khugepaged_scan() -> None:
    """Have khugepaged make the scan that it makes when the first process has memory that may have huge pages.

    In it, khugepaged would collapse memory of the first such test. After it, khugepaged sleeps as the init has set.
    """
    known = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
    if not known.exists():
        return
    size = int(known.read_text())
    with mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory[size - 1]  # advice alone is not enough (hugepage_vma_check() of 6.1); this is in an aligned range
    khugepaged, limit = kernel_thread("khugepaged"), time.monotonic() + 2
    while khugepaged is not None and state_of(khugepaged) != "S" and time.monotonic() < limit:
        time.sleep(0.01)


def write_pid_file() -> None:
    """Become the leader of a process group, and write its ID to a file for the keeper, which ends the group."""
    with contextlib.suppress(PermissionError):
        os.setsid()  # fails if this process is a group leader already
    Path(os.environ["HARNESS_PID_FILE"]).write_text(str(os.getpid()))


def unpack(archive: str, directory: Path) -> None:
    """Unpack the tests into ``directory``, and make it the current directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive))) as tar:
        tar.extractall(directory, filter="data")
    os.chdir(directory)


def main() -> None:
    """Answer the host's messages until it closes the connection."""
    stdio = "--stdio" in sys.argv
    greet = answer_board if stdio else answer_hello
    if stdio:
        write_pid_file()
        link = channel.Channel.over_stdio()
        faulthandler.enable()
    else:
        link = channel.Channel(channel.open_port("harness.agent"))
        let_khugepaged_scan()
        parent = os.getpid()
        if os.fork() == 0:
            send_heartbeats(parent)
            os._exit(0)
        faulthandler.enable(open("/dev/console", "w"))  # noqa: SIM115 - stays open until the process ends
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
