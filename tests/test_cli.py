# SPDX-License-Identifier: GPL-2.0
"""What the ``harness`` command makes of its options. Nothing boots here."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from harness import __version__
from harness.commands import cli
from harness.debian import mirror
from harness.options import MachineOptions


def test_the_shell_fetches_from_the_mirror_it_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing listens on the reserved port 9 of this host, so the error names the mirror that was asked.
    monkeypatch.setenv(mirror.MIRROR_VARIABLE, "http://127.0.0.1:9/environment")
    status = cli.main(["shell", "--kernel=debian:6.12", "--debian-mirror=http://127.0.0.1:9/option", "true"])
    said = capsys.readouterr().err
    assert status == 1, said
    assert "http://127.0.0.1:9/option" in said, f"another mirror was asked: {said}"


def test_options_of_machines_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        MachineOptions("slub_debug=F", 640, 1, "http://127.0.0.1:9/debian")  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    "command",
    [[], *([each] for each in sorted(set(cli._COMMANDS)))],
)
def test_every_command_says_which_version_it_is(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mremap-harness {__version__}\n"


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word() -> None:
    program = "from harness.commands import cli; import sys; sys.exit(cli.main(['kernels']))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_command_that_is_told_to_end_ends_as_after_ctrl_c() -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from harness.commands import cli
        def waits(chosen):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            except KeyboardInterrupt:
                print("said what there is")
                raise
        cli._COMMANDS["doctor"] = waits
        sys.argv[1:] = ["doctor"]
        sys.exit(cli.main())
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (130, "said what there is\n"), done.stderr
