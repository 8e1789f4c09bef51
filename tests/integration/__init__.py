# SPDX-License-Identifier: GPL-2.0
"""Tests that boot machines or use the network."""
