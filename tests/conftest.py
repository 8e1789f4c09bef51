# SPDX-License-Identifier: GPL-2.0
"""Fixtures of all tests: a home directory of their own for unit tests, and a lab that runs guest tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import Lab

_INTEGRATION = Path(__file__).parent / "integration"


@pytest.fixture(autouse=True)
def own_home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests see nothing of this user's, and leave nothing. Integration tests share kernels that were fetched."""
    if not request.path.is_relative_to(_INTEGRATION):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A directory of guest tests to fill and to run, one for each test module."""
    with Lab() as lab:
        yield lab
