# SPDX-License-Identifier: GPL-2.0
"""Builds kernels: their names, sources, patches, configurations, and the compilation."""
