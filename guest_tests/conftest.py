# SPDX-License-Identifier: GPL-2.0
"""Makes the shared fixtures and hooks available to the tests below this directory."""

from guest_tests.support.fixtures import *  # noqa: F403
