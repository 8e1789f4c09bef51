# SPDX-License-Identifier: GPL-2.0
"""The explorer: makes programs that move memory, runs them in guests, and shrinks those that fail."""
