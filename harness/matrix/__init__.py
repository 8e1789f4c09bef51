# SPDX-License-Identifier: GPL-2.0
"""Runs the guest tests on many kernels, and keeps the results of those that have not changed."""
