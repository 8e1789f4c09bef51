# SPDX-License-Identifier: GPL-2.0
"""Debian's archive and its packages."""
