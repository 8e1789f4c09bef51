# SPDX-License-Identifier: GPL-2.0
"""``--kselftest``: runs upstream's tests instead of the guest tests."""

from __future__ import annotations

import pytest

from harness.kselftest import catalog

#: The marker of guest tests that run one of upstream's tests, and their parameter with its name.
MARKER, PARAMETER = "kselftest", "upstream"

#: What a test takes beside its program, in seconds: its reports.
_BESIDE = 5.0


def option(item: pytest.Item) -> str:
    """What ``--kselftest`` needs to be for a test to be run again, with a blank in front; empty for other tests."""
    if item.get_closest_marker(MARKER) and isinstance(item, pytest.Function):
        return f" --kselftest={item.callspec.params[PARAMETER]}"
    return ""


class Upstream:
    """Chooses what runs, and how long it may take."""

    def __init__(self, config: pytest.Config) -> None:
        self._alone = config.args_source is not config.ArgsSource.ARGS
        self._found = False

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Give each test the time that its program may take."""
        if item.get_closest_marker(MARKER) and isinstance(item, pytest.Function):
            test = catalog.load()[str(item.callspec.params[PARAMETER])]
            item.add_marker(pytest.mark.guest_timeout(test.seconds + _BESIDE))
            self._found = True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Run upstream's tests alone, unless others are named.

        :raises pytest.UsageError: if no test here runs them.
        """
        if not self._found:
            raise pytest.UsageError(
                "--kselftest is given, and no test that was named runs upstream's tests: "
                "name guest_tests/test_kselftest.py of mremap-harness, or no test at all"
            )
        if self._alone:
            config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker(MARKER)])
            items[:] = [item for item in items if item.get_closest_marker(MARKER)]
