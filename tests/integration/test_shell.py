# SPDX-License-Identifier: GPL-2.0
"""``harness shell``, interactively and in scripts."""

from __future__ import annotations

import subprocess
import sys

from harness import paths
from tests.integration.ssh_guest import KERNEL
from tests.integration.terminal import Terminal


def _run(*command: str, stdin: bytes = b"", kernel: str = KERNEL) -> subprocess.CompletedProcess[bytes]:
    argv = [sys.executable, "-m", "harness.commands.cli", "shell", f"--kernel={kernel}", *command]
    return subprocess.run(argv, cwd=paths.PROJECT, input=stdin, capture_output=True, check=False)


def test_a_command_has_its_own_streams_and_exit_status() -> None:
    blob = bytes(range(256)) * 4096  # more than any buffer on the way holds
    done = _run("cat; echo oops >&2; exit 7", stdin=blob)
    assert done.returncode == 7
    assert done.stdout == blob
    assert done.stderr == b"oops\n"


def test_words_arrive_as_they_are() -> None:
    done = _run("printf", "[%s]", "two words", "$HOME", "it's")
    assert done.stdout == b"[two words][$HOME][it's]"


def test_tests_run_by_hand_and_the_guest_has_no_network() -> None:
    done = _run("python3 -m pytest -q guest_tests/test_library_proctree.py -k errno && ls /sys/class/net")
    assert done.returncode == 0, done.stdout
    assert b"passed" in done.stdout
    assert done.stdout.split()[-1] == b"lo"


def test_without_a_terminal_a_command_is_wanted() -> None:
    done = _run()
    assert done.returncode == 2
    assert b"give a command" in done.stderr


def test_an_unknown_kernel_is_a_usage_error_of_one_line() -> None:
    done = _run("true", kernel="debian:0.1.2")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_a_terminal_is_passed_on_with_its_size_and_its_keys() -> None:
    with Terminal("harness.commands.cli", "shell", f"--kernel={KERNEL}", cwd=paths.PROJECT, size=(31, 97)) as terminal:
        terminal.expect(r"kernel +7\.3.*\r\n +tests +python3 -m pytest")
        terminal.expect(r"guest:/harness/tests# ")
        terminal.type("stty size; echo $TERM\n")
        terminal.expect(r"31 97\r\nxterm")
        terminal.resize(20, 50)
        terminal.type("while [ \"$(stty size)\" = '31 97' ]; do sleep 1; done; stty size\n")
        terminal.expect(r"\n20 50\r")
        terminal.expect(r"guest:/harness/tests# ")
        # Said by the very process that the key is to reach: a shell between two commands would swallow it.
        terminal.type("sh -c \"echo go''ing; exec sleep 1000\"\n")
        terminal.expect("going")
        terminal.type("\x03")
        terminal.expect(r"guest:/harness/tests# ")
        terminal.type("exit 3\n")
        assert terminal.status() == 3


def test_a_guest_that_dies_ends_the_shell() -> None:
    done = _run("echo c >/proc/sysrq-trigger; sleep 1000")
    assert done.returncode == 1
    assert b"harness: the kernel panicked" in done.stderr
