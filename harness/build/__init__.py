# SPDX-License-Identifier: GPL-2.0
"""Kernels built here: what they are called, where sources come from, how they are configured and compiled."""
