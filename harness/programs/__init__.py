# SPDX-License-Identifier: GPL-2.0
"""The programs that the explorer runs: their language, and a model of the memory that they should leave.

Host and guest both import this room. It needs Python 3.11 or later and nothing else.
"""
