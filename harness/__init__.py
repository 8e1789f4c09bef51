# SPDX-License-Identifier: GPL-2.0
"""Boots Linux kernels under QEMU and judges what they do to anonymous memory.

The map of the modules stands in ``CONTRIBUTING.md``.
"""

__version__ = "0.1.0"
