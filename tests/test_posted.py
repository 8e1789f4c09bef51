# SPDX-License-Identifier: GPL-2.0
"""A patch series on standard input. Toy kernels stand for real ones; nothing boots."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.build import posted, series
from harness.commands import cli
from harness.errors import SpecError
from tests.lab import Lab
from tests.stage import STAGE
from tests.test_bisect_command import Toys, install
from tests.toy_kernel import PATCH, lay_out, programs

#: As b4 writes it.
MBOX = f"""\
From git@z Thu Jan  1 00:00:00 1970
Subject: [PATCH v3 1/2] mm/mremap: move it, =?utf-8?q?f=C3=BCr?= Anna
From: A <a@example.org>

{PATCH.partition("---")[2].lstrip()}
--
2.47

From git@z Thu Jan  1 00:00:00 1970
Subject: [PATCH v3 2/2] mm/ksm: more
From: A <a@example.org>

---
diff --git a/mm/ksm.c b/mm/ksm.c
--- a/mm/ksm.c
+++ b/mm/ksm.c
@@ -1 +1 @@
-merge
+merged
"""


class Once:
    """Standard input, which can be read once."""

    def __init__(self, data: bytes = MBOX.encode()) -> None:
        self._data = [data]

    def __call__(self) -> bytes:
        return self._data.pop()


# --- names -----------------------------------------------------------------------------------------------------------


def test_the_file_of_the_series_takes_the_place_of_the_dash() -> None:
    base, patched, debug = posted.named(["linux-source-7.3", "linux-source-7.3+-", "~/linux+fix.patch+-:debug"], Once())
    path = Path(patched.removeprefix("linux-source-7.3+"))
    assert base == "linux-source-7.3"
    assert debug == f"~/linux+fix.patch+{path}:debug"
    assert path.read_bytes() == MBOX.encode()
    assert path.name == "mm-mremap-move-it-f-r-anna.mbx", "the label of the kernel says which series it is"
    assert len(series.load(path)) == 2


def test_more_patches_may_follow() -> None:
    (text,) = posted.named(["linux-source-7.3+-+more.patch"], Once())
    assert text.endswith(".mbx+more.patch")


@pytest.mark.parametrize("text", ["linux-source-7.3", "git:~/linux+-x@HEAD", "~/a+-b", "relocate-anon+./-"])
def test_nothing_is_read_for_other_names(text: str) -> None:
    def read() -> bytes:
        raise AssertionError("standard input was read")

    assert posted.named([text], read) == [text]


def test_the_same_series_has_the_same_file() -> None:
    assert posted.named(["a+-"], Once()) == posted.named(["a+-"], Once())
    assert posted.named(["a+-"], Once()) != posted.named(["a+-"], Once(MBOX.replace("merged", "other").encode()))


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("Subject: [PATCH] ../../etc/passwd", "etc-passwd"),
        ("Subject: [RFC PATCH 0/9] " + "long " * 30, "long-long-long-long-long-long-long-long"),
        ("Subject: \x1b[31mred", "31mred"),
        ("Subject: [PATCH]", "stdin"),
        ("", "stdin"),
    ],
)
def test_a_subject_makes_a_safe_name(subject: str, name: str) -> None:
    data = f"{subject}\n\n{PATCH.partition('---')[2]}".encode()
    (text,) = posted.named(["a+-"], Once(data))
    assert Path(text.removeprefix("a+")).name == f"{name}.mbx"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "standard input, which is empty"),
        (b"\n \n", "standard input, which is empty"),
        (b"Subject: hello\n\nno patch at all\n", "standard input holds no diff"),
        (bytes(range(256)) * 10, "standard input holds no diff"),
        (b"x" * ((64 << 20) + 1), "more than 64 MiB"),
    ],
    ids=["empty", "blank", "a letter", "bytes", "huge"],
)
def test_what_is_no_series_is_refused_and_not_kept(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        posted.named(["a+-"], Once(data))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.mbx"))


def test_a_terminal_is_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stdin in (Terminal(), None):
        monkeypatch.setattr(sys, "stdin", stdin)
        with pytest.raises(SpecError, match=r"b4 am -o - MESSAGE-ID \| pytest"):
            posted.named(["a+-"])


# --- pytest ----------------------------------------------------------------------------------------------------------

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def piped(lab: Lab, tmp_path: Path) -> Run:
    """Runs a test on a toy kernel with and without the series that pytest's standard input has."""
    tree = lay_out(tmp_path / "linux")
    lab.write("test_it.py", "def test_a():\n    pass\n\ndef test_b():\n    pass\n")
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))

    def run(*args: str, data: str = MBOX) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "stage", "-v", f"--kernel={tree}:debug", f"--kernel={tree}+-"]
        return subprocess.run([*command, *args], cwd=lab.root, input=data, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize(
    "args",
    [(), ("-s",), ("--capture=sys",), ("--capture=tee-sys",), ("-n", "2")],
    ids=" ".join,
)
def test_pytest_tests_a_base_and_the_series(piped: Run, args: tuple[str, ...]) -> None:
    done = piped(*args, "--results=results.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mremap-harness" in done.stdout, "the header is not captured"
    assert "4 passed" in done.stdout
    assert "test_a[linux+mm-mremap-move-it-f-r-anna-x86_64]" in done.stdout
    assert "compared with linux:debug-x86_64" in done.stdout


def test_what_names_the_kernel_again_has_the_file(piped: Run, lab: Lab) -> None:
    piped("--results=results.jsonl")
    text = (lab.root / "results.jsonl").read_text()
    assert "mm-mremap-move-it-f-r-anna.mbx:fast" in text.splitlines()[0]


def test_an_empty_pipe_is_a_usage_error(piped: Run) -> None:
    done = piped(data="")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "standard input, which is empty" in done.stderr


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toys:
    monkeypatch.setenv("PATH", f"{programs(tmp_path / 'bin')}:{os.environ['PATH']}")
    return install(monkeypatch)


def pipe(monkeypatch: pytest.MonkeyPatch, data: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data.encode())))


def test_a_bisect_step_applies_the_series(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, MBOX)
    assert cli.main(["bisect-step", f"--tree={lay_out(tmp_path / 'linux')}", "+-", "--", "guest_tests/test_a.py"]) == 0
    assert b"patched 33" in toys.image
    assert b"merged" in toys.image


def test_a_bisect_step_without_a_series_stops_git(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the second step of git bisect run on, whose standard input has been read."""
    pipe(monkeypatch, "")
    tree = lay_out(tmp_path / "linux")
    assert cli.main(["bisect-step", f"--tree={tree}", "+-", "--", "guest_tests/test_a.py"]) == 129


def test_the_shell_takes_the_series(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("harness.commands.shell.shell", lambda spec, *_: asked.append(spec.text) or 0)
    pipe(monkeypatch, MBOX)
    assert cli.main(["shell", f"--kernel={lay_out(tmp_path / 'linux')}+-", "uname", "-r"]) == 0
    assert asked[0].endswith("mm-mremap-move-it-f-r-anna.mbx:fast")
