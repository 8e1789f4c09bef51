# SPDX-License-Identifier: GPL-2.0
"""The plug-in's own hooks: how features take part in a run without the run knowing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from harness.pytest_plugin.target import Target
    from harness.pytest_plugin.testrun import Ran


def pytest_guest_test_judged(item: pytest.Item, target: Target, ran: Ran) -> None:
    """A guest test has run and was judged, and its reports have not been given to pytest yet: they may be changed."""


def pytest_guest_test_finished(item: pytest.Item, target: Target, ran: Ran) -> None:
    """All reports of a guest test have been given to pytest; a guest that was kept is still alive."""
