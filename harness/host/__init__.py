# SPDX-License-Identifier: GPL-2.0
"""Facilities of the host: processes, directories, the cache, memory, the terminal."""
