# SPDX-License-Identifier: GPL-2.0
"""Upstream's own tests of memory management: which there are, their sources, and their programs for a guest."""
