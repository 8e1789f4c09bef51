# SPDX-License-Identifier: GPL-2.0
"""Runs of two kernels end with the comparison. No test here boots."""

from __future__ import annotations

import textwrap

import pytest

from tests.lab import Lab
from tests.stage import CHECKS, STAGE

SUMMARY = """\
            fixed  regressed  new ability  same  not compared
test_it.py      1          2            1     2             1
all             1          2            1     2             1

fixed:
  failed -> passed  checks/test_it.py::test_hole[9]
      AssertionError: a page of the \\x1b[31mold\\x1b[0m kernel was lost

regressed:
  passed -> skipped  checks/test_it.py::test_idle
      no longer runs: needs CONFIG_IDLE_PAGE_TRACKING
  passed -> failed   checks/test_it.py::test_walk
      AssertionError: the walk lost a page
"""


@pytest.fixture
def staged(lab: Lab) -> Lab:
    lab.write("test_it.py", CHECKS)
    (lab.root / "stage.py").write_text(textwrap.dedent(STAGE))
    return lab


@pytest.mark.parametrize("args", [[], ["-n2"], ["-q"], ["--tb=native"], ["--tb=no"]], ids=lambda args: "".join(args))
def test_a_run_of_two_kernels_ends_with_the_comparison(staged: Lab, args: list[str]) -> None:
    outcome = staged.run("-p", "stage", *args, "--kernel=debian:6.12", kernel="debian:7.3")
    assert outcome.status == pytest.ExitCode.TESTS_FAILED
    outcome.said("= debian:7.3-x86_64 compared with debian:6.12-x86_64 =")
    assert SUMMARY in outcome.output
    assert "\x1b" not in outcome.output


def test_a_comparison_leaves_the_exit_status_alone(staged: Lab) -> None:
    """Here something was skipped that was not, which is a regression; pytest does not mind."""
    outcome = staged.run("-p", "stage", "-k", "test_idle", "--kernel=debian:6.12", kernel="debian:7.3")
    assert outcome.status == pytest.ExitCode.OK
    outcome.said("passed -> skipped")


def test_a_run_of_one_kernel_ends_as_ever(staged: Lab) -> None:
    assert "compared with" not in staged.run("-p", "stage", kernel="debian:7.3").output


def test_colours_are_pytests_own_affair(staged: Lab) -> None:
    run = ("-p", "stage", "--kernel=debian:6.12")
    coloured = staged.run(*run, "--color=yes", kernel="debian:7.3")
    assert "\x1b[31mregressed:" in coloured.output
    assert "\x1b[32mfixed:" in coloured.output
    plain = staged.run(*run, kernel="debian:7.3", env={"NO_COLOR": "1", "FORCE_COLOR": "1"})
    assert "\x1b" not in plain.output
