# SPDX-License-Identifier: GPL-2.0
"""Finds the first kernel that a test fails on: among Debian's versions, or among the commits of a repository."""
